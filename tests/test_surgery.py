"Every scheme on every timm ResNet from 18 to 152: nothing missed, counts, folding, and the way back to timm"
import copy
import pytest, timm, torch
from safetensors.torch import load, save
from torch import nn
from nwrepro.init import layer_parts
from nwrepro.layers import WNConv2d, filter_lengths
from nwrepro.passes import NPFloor, NPJoin, OnePassTReLU, WNJoin
from nwrepro.surgery import SCHEMES, JoinBlock, Scheme, convert, fold, parameter_roles, to_timm

def network(arch, norm, dtype=torch.float32, **kwargs):
    "A converted network with every parameter and statistic moved off its start"
    torch.manual_seed(0)
    model = convert(timm.create_model(arch, num_classes=10), norm, **kwargs).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1+0.2*torch.rand_like(p)).add_(0.05*torch.randn_like(p)*p.abs().mean())
    model.train()(torch.randn(8, 3, 64, 64, dtype=dtype))
    return model.eval()

def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()

LIMITS = {torch.float64: 1e-9, torch.float32: 5e-5}

@torch.no_grad()
@pytest.mark.parametrize('dtype', LIMITS, ids=str)
@pytest.mark.parametrize('norm', SCHEMES)
@pytest.mark.parametrize('arch', ('resnet18', 'resnet50'))
def test_fold_keeps_the_logits(arch, norm, dtype):
    model, x = network(arch, norm, dtype), torch.randn(4, 3, 64, 64, dtype=dtype)
    folded = fold(model)
    assert error(folded(x), model(x)) <= LIMITS[dtype]
    assert not [m for m in folded.modules() if isinstance(m, (nn.BatchNorm2d, WNConv2d))]
    assert all(m.bias is not None for m in folded.modules() if isinstance(m, nn.Conv2d))

@pytest.mark.parametrize('layout', (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize('norm', SCHEMES)
def test_fold_keeps_the_memory_format(norm, layout):
    folded = fold(network('resnet18', norm).to(memory_format=layout))
    assert all(m.weight.is_contiguous(memory_format=layout) for m in folded.modules() if isinstance(m, nn.Conv2d))

@torch.no_grad()
@pytest.mark.parametrize('dtype', LIMITS, ids=str)
@pytest.mark.parametrize('norm', ('bn', 'none', 'wn'))
@pytest.mark.parametrize('arch', ('resnet18', 'resnet50'))
def test_stock_timm_loads_what_to_timm_writes(arch, norm, dtype):
    model, x = network(arch, norm, dtype, bn_eps=1e-4), torch.randn(4, 3, 64, 64, dtype=dtype)
    stock = timm.create_model(arch, num_classes=10).to(dtype)
    stock.load_state_dict(load(save(to_timm(model))), strict=True)
    assert error(stock.eval()(x), model(x)) <= LIMITS[dtype]

@pytest.mark.parametrize('norm', SCHEMES)
@pytest.mark.parametrize('arch', ('resnet18', 'resnet26', 'resnet34', 'resnet50', pytest.param('resnet101', marks=pytest.mark.slow), pytest.param('resnet152', marks=pytest.mark.slow)))
def test_nothing_is_missed(arch, norm):
    stock = timm.create_model(arch, num_classes=10)
    model = convert(stock, norm)
    before, after = ([m for m in net.modules() if not list(m.children())] for net in (stock, model))
    count = lambda modules, *kinds: sum(type(m) in kinds for m in modules)
    convs, acts = count(before, nn.Conv2d), count(before, nn.ReLU)
    assert count(after, WNConv2d if norm in ('wn', 'np', 'trelu') else nn.Conv2d) == convs
    assert count(after, *dict(np=(NPFloor, NPJoin), trelu=(OnePassTReLU, WNJoin)).get(norm, (nn.ReLU,))) == acts
    assert count(after, nn.BatchNorm2d) == 0
    assert sum(isinstance(m, nn.BatchNorm2d) for m in after) == (convs if norm == 'bn' else 0)
    assert sum(isinstance(m, JoinBlock) for m in model.modules()) == (sum(len(getattr(stock, f'layer{k}')) for k in (1, 2, 3, 4)) if norm in ('np', 'trelu') else 0)
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()

@pytest.mark.parametrize('norm', SCHEMES)
def test_copies_files_and_gradients(norm):
    torch.manual_seed(0)
    model, x = convert(timm.create_model('resnet18', num_classes=10), norm), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, 'u'): m.u.fill_(0.7)  # at its start the branch of `trelu` is switched off
    model(x).pow(2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    twin = copy.deepcopy(model)
    fresh = convert(timm.create_model('resnet18', num_classes=10), norm)
    fresh.load_state_dict(load(save(model.state_dict())), strict=True)
    for other in (twin, fresh): torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)

@pytest.mark.parametrize('init', ('torch', 'data', 'norm_preserving'))
def test_wn_and_none_start_as_the_same_function(init):
    x = torch.randn(8, 3, 64, 64)
    nets = []
    for norm in ('none', 'wn'):
        torch.manual_seed(0)
        nets.append(convert(timm.create_model('resnet18', num_classes=10), norm, init=init, x=x).eval())
    assert error(*(net(x) for net in nets)) < 1e-3
    torch.testing.assert_close(nets[0].conv1.weight, nets[1].conv1.w)

@pytest.mark.parametrize('norm', ('wn', 'np', 'trelu'))
def test_v_has_one_length_whatever_the_start(norm):
    for init in SCHEMES[norm].inits:
        model = convert(timm.create_model('resnet26', num_classes=10), norm, init=init, x=torch.randn(4, 3, 32, 32))
        for layer, (part, _) in layer_parts(model).items():
            wanted = 3**-0.5 if part == 'head' else (2*layer.in_channels/layer.out_channels)**0.5
            torch.testing.assert_close(filter_lengths(layer.v), torch.full((len(layer.v),), wanted))

def test_period_strides_keep_shapes_and_are_not_exported():
    model, x = convert(timm.create_model('resnet50', num_classes=10), 'bn', strides='v1').eval(), torch.randn(1, 3, 64, 64)
    assert model.layer2[0].conv1.stride == (2, 2) and model.layer2[0].conv2.stride == (1, 1)
    assert model.forward_features(x).shape == (1, 2048, 2, 2)
    with pytest.raises(ValueError, match="strides 'v1'"): to_timm(model)

@pytest.mark.parametrize('arch', ('resnet50d', 'seresnet50', 'resnetv2_50', 'mobilenetv3_small_050'))
def test_networks_that_surgery_does_not_know_are_refused(arch):
    with pytest.raises(ValueError, match='not a stock timm ResNet'): convert(timm.create_model(arch, num_classes=10), 'wn')

def test_an_own_scheme_needs_one_line():
    SCHEMES['mine'] = Scheme(act=lambda channels: nn.PReLU(channels))
    try: model = convert(timm.create_model('resnet18', num_classes=10), 'mine')
    finally: del SCHEMES['mine']
    assert sum(isinstance(m, nn.PReLU) for m in model.modules()) == 17
    assert 'gamma' in parameter_roles(model).values()
