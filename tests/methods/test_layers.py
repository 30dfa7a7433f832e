"Layers against torch's own weight_norm, over shapes, groups and dtypes"
import copy
import pytest, torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from nwrepro.methods.layers import GhostBatchNorm2d, NPReLU, TReLU, WNAdd, WNConv2d, WNLinear, weight_normalize, wn_weight

CONVS = [dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1, groups=2),
         dict(kernel_size=(3, 1), dilation=2, padding='same'), dict(kernel_size=3, padding=1, padding_mode='reflect', bias=False)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

def pair(plain, ours, *args, dtype, **kwargs):
    "Our layer and torch's, with the same weights"
    torch.manual_seed(0)
    theirs = weight_norm(plain(*args, **kwargs).to(dtype))
    new = ours(*args, **kwargs).to(dtype)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.mul_(1.5)
        new.g.copy_(theirs.parametrizations.weight.original0.flatten())
        new.v.copy_(theirs.parametrizations.weight.original1)
        if new.bias is not None: new.bias.copy_(theirs.bias)
    return new, theirs

def agree(new, theirs, x, dtype):
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(x) for layer, x in zip((new, theirs), xs, strict=True)]
    for out in outs: out.pow(2).sum().backward()
    stored = theirs.parametrizations.weight
    pairs = [outs, [x.grad for x in xs], (new.v.grad, stored.original1.grad), (new.g.grad, stored.original0.grad.flatten())]
    if new.bias is not None: pairs.append((new.bias.grad, theirs.bias.grad))
    for a, b in pairs: torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]*max(1, b.abs().max().item()))

@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('kwargs', CONVS, ids=str)
def test_conv_agrees_with_torch(kwargs, dtype):
    agree(*pair(nn.Conv2d, WNConv2d, 4, 6, dtype=dtype, **kwargs), torch.randn(2, 4, 8, 8, dtype=dtype), dtype)

@pytest.mark.parametrize('kwargs', CONVS, ids=str)
def test_a_plain_convolution_stays_the_same_function(kwargs):
    plain, x = nn.Conv2d(4, 6, dtype=torch.float64, **kwargs), torch.randn(2, 4, 8, 8).double()
    torch.testing.assert_close(weight_normalize(plain)(x), plain(x), rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('bias', (True, False))
def test_linear_agrees_with_torch(bias, dtype):
    agree(*pair(nn.Linear, WNLinear, 5, 3, bias=bias, dtype=dtype), torch.randn(4, 5, dtype=dtype), dtype)

def test_gradients_by_central_differences():
    torch.manual_seed(0)
    v, g, x = torch.randn(3, 2, 2, 2).double(), torch.rand(3).double()+0.5, torch.randn(2, 3, 2, 2).double()
    wanted = [t.requires_grad_() for t in (v, g, x)]
    assert torch.autograd.gradcheck(wn_weight, wanted[:2])
    assert torch.autograd.gradcheck(lambda v: wn_weight(v), wanted[:1])
    assert torch.autograd.gradcheck(NPReLU(), wanted[2:])
    alpha, u = torch.tensor([-0.3, 0., 0.4]).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: torch.func.functional_call(TReLU(3), {'alpha': a}, (x,)), (wanted[2], alpha))
    assert torch.autograd.gradcheck(lambda x, u: torch.func.functional_call(WNAdd(3), {'u': u}, (x, x.flip(0)**2)), (wanted[2], u))

@pytest.mark.parametrize('half', (torch.float16, torch.bfloat16), ids=str)
def test_autocast_keeps_weights_in_float32(half):
    layer, x = WNConv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    with torch.autocast('cpu', half): out, w = layer(x), layer.w
    assert (out.dtype, w.dtype) == (half, torch.float32)
    out.float().sum().backward()
    assert layer.v.grad.dtype == torch.float32 and layer.v.grad.isfinite().all()

def test_there_is_no_weight_to_write_to_by_mistake():
    with pytest.raises(AttributeError): nn.init.zeros_(WNConv2d(3, 4, 3).weight)

@pytest.mark.parametrize('make', (lambda: WNConv2d(2, 4, 3), lambda: WNConv2d(2, 4, 3, affine=False), lambda: TReLU(2), lambda: WNAdd(2)),
                         ids=('conv', 'strict', 'trelu', 'add'))
def test_copies_and_state_go_round(make):
    layer = make()
    args = [torch.randn(2, 2, 5, 5)]*(2 if isinstance(layer, WNAdd) else 1)
    with torch.no_grad():
        for p in layer.parameters(): p.add_(torch.rand_like(p))
    out = layer(*args)
    fresh = make()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for other in (copy.deepcopy(layer), fresh): torch.testing.assert_close(other(*args), out, rtol=0, atol=0)

def test_ghost_groups_that_do_not_divide_the_batch():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4)
    parts = [nn.BatchNorm2d(3)(part) for part in x.split(3)]
    torch.testing.assert_close(GhostBatchNorm2d(3, bn_batch=3)(x), torch.cat(parts))
