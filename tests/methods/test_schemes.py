"Every scheme on every timm ResNet from 18 to 152: nothing missed, counts, inits"
import copy
import pytest, timm, torch
from conftest import FIVE
from safetensors.torch import load, save
from torch import nn
from nwrepro.methods.initialization import residual_blocks, init_norm_preserving, layer_parts
from nwrepro.methods.layers import NPAdd, NPReLU, TReLU, WNAdd, WNConv2d, filter_norms, weight_normalize
from nwrepro.methods.fast import fast_form
from nwrepro.methods.deploy import to_timm
from nwrepro.methods.schemes import SCHEMES, JoinBlock, Scheme, batch_norm, convert, keep_module, no_norm, parameter_roles, relu, strict_weight_normalize, with_bias

def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()

@pytest.mark.parametrize('norm', FIVE)
@pytest.mark.parametrize('arch', ('resnet18', 'resnet26', 'resnet34', 'resnet50', pytest.param('resnet101', marks=pytest.mark.slow), pytest.param('resnet152', marks=pytest.mark.slow)))
def test_nothing_is_missed(arch, norm):
    stock = timm.create_model(arch, num_classes=10)
    model = convert(stock, norm)
    before, after = ([m for m in net.modules() if not list(m.children())] for net in (stock, model))
    count = lambda modules, *kinds: sum(type(m) in kinds for m in modules)
    convs, acts = count(before, nn.Conv2d), count(before, nn.ReLU)
    assert count(after, WNConv2d if norm in ('wn', 'np', 'trelu') else nn.Conv2d) == convs
    assert count(after, *dict(np=(NPReLU,), trelu=(TReLU,)).get(norm, (nn.ReLU,))) == acts
    assert count(after, nn.BatchNorm2d) == 0
    assert sum(isinstance(m, nn.BatchNorm2d) for m in after) == (convs if norm == 'bn' else 0)
    assert sum(isinstance(m, JoinBlock) for m in model.modules()) == (sum(len(getattr(stock, f'layer{k}')) for k in (1, 2, 3, 4)) if norm in ('np', 'trelu') else 0)
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()

@pytest.mark.parametrize('norm', FIVE)
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
def test_wn_and_none_are_initialized_as_the_same_function(init):
    x = torch.randn(8, 3, 64, 64)
    nets = []
    for norm in ('none', 'wn'):
        torch.manual_seed(0)
        nets.append(convert(timm.create_model('resnet18', num_classes=10), norm, init=init, x=x).eval())
    assert error(*(net(x) for net in nets)) < 1e-3
    torch.testing.assert_close(nets[0].conv1.weight, nets[1].conv1.w)

@pytest.mark.parametrize('norm', ('wn', 'np', 'trelu'))
def test_v_has_one_norm_whatever_the_initialization(norm):
    for init in SCHEMES[norm].inits:
        model = convert(timm.create_model('resnet26', num_classes=10), norm, init=init, x=torch.randn(4, 3, 32, 32))
        for layer, (part, _) in layer_parts(model).items():
            wanted = 3**-0.5 if part == 'head' else (2*layer.in_channels/layer.out_channels)**0.5
            torch.testing.assert_close(filter_norms(layer.v), torch.full((len(layer.v),), wanted))

def test_period_strides_keep_shapes_and_are_not_exported():
    model, x = convert(timm.create_model('resnet50', num_classes=10), 'bn', strides='v1').eval(), torch.randn(1, 3, 64, 64)
    assert model.layer2[0].conv1.stride == (2, 2) and model.layer2[0].conv2.stride == (1, 1)
    assert model.forward_features(x).shape == (1, 2048, 2, 2)
    with pytest.raises(ValueError, match="strides 'v1'"): to_timm(model)

@pytest.mark.parametrize('arch, more, layer', [('seresnet50', {}, r'Sigmoid \(layer1.0.se.gate\)'), ('resnetv2_50', {}, r'BatchNormAct2d \(stages.0.blocks.0.norm1\)'), ('mobilenetv3_small_050', {}, r'BatchNormAct2d \(bn1\)'),
                                               ('resnetblur50', {}, r'BlurPool2d \(\S+\)'), ('resnet18', dict(act_layer='gelu'), r'GELU \(act1\)'), ('resnet50_gn', {}, r'GroupNorm \(bn1\)')], ids=str)
def test_a_layer_that_surgery_does_not_know_is_named(arch, more, layer):
    with pytest.raises(ValueError, match=rf'surgery does not know the layer {layer} of \w+: it knows Conv2d, '): convert(timm.create_model(arch, num_classes=10, **more), 'wn')

def test_an_own_scheme_needs_one_line():
    SCHEMES['mine'] = Scheme(act=lambda channels: nn.PReLU(channels))
    try: model = convert(timm.create_model('resnet18', num_classes=10), 'mine')
    finally: del SCHEMES['mine']
    assert sum(isinstance(m, nn.PReLU) for m in model.modules()) == 17
    roles = parameter_roles(model)
    assert roles['act1.weight'] == 'weight' and roles['bn1.weight'] == 'gamma'

# what is put together wrongly

@pytest.fixture
def mine(monkeypatch):
    "Convert a ResNet-18 to a scheme of one's own"
    def make(arch='resnet18', zero_init=False, init=None, **slots):
        monkeypatch.setitem(SCHEMES, 'mine', Scheme(**slots))
        torch.manual_seed(0)
        return convert(timm.create_model(arch, num_classes=10, **({'drop_path_rate': 0.5} if arch == 'resnet26' else {})), 'mine', init, torch.randn(4, 3, 32, 32), zero_init=zero_init)
    return make

NP = dict(conv=weight_normalize, norm=no_norm, act=lambda channels: NPReLU(), join=lambda channels: NPAdd(), inits=('np',))
TRELU = dict(conv=strict_weight_normalize, norm=no_norm, act=TReLU, join=WNAdd, inits=('even',))

@pytest.mark.parametrize('slots', [NP | dict(join=None), NP | dict(act=relu), NP | dict(conv=with_bias, inits=('torch',)), NP | dict(conv=strict_weight_normalize, inits=('torch',)), NP | dict(arch='resnet26'),
                                   TRELU | dict(conv=weight_normalize), TRELU | dict(conv=with_bias), TRELU | dict(conv=keep_module, norm=batch_norm), TRELU | dict(arch='resnet26'), TRELU | dict(act=relu)],
                         ids=['np, plain sum', 'np, relu', 'np, plain convolutions', 'np, strict', 'np, dropped paths', 'trelu, affine', 'trelu, plain convolutions', 'trelu, bn', 'trelu, dropped paths', 'trelu, relu'])
def test_slots_go_together_as_one_likes(slots, mine):
    "And their fast form, fused where it can be, computes the same"
    model, x = mine(**slots).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05*torch.randn_like(p))
        for kernels in (False, True): assert error(fast_form(model, kernels)(x), model(x)) < 1e-4

@pytest.mark.parametrize('norm, init', [('bn', None), ('none', 'torch'), ('none', 'data'), ('wn', 'data'), ('mine', None)], ids=str)
def test_zero_init_branches_are_zero_and_change_slowly(norm, init, mine, monkeypatch):
    monkeypatch.setitem(SCHEMES, 'mine', Scheme(norm=lambda bn: nn.GroupNorm(8, bn.num_features)))
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    model = convert(timm.create_model('resnet18', num_classes=10), norm, init, x, zero_init=True)
    ends, seen = [block.bn2 for block, _ in residual_blocks(model)], []
    for end in ends: end.register_forward_hook(lambda m, args, out: seen.append(out.abs().max().item()))
    nn.functional.cross_entropy(model(x), y).backward()
    assert seen == [0.]*8
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    seen.clear(), model(x)
    assert 0 < max(seen) < 0.1

@pytest.mark.parametrize('norm', ('none', 'wn'))
def test_gains_of_the_norm_preserving_init_by_place(norm):
    "What Arpit, Campos & Bengio 2019 prescribe for ResNet-50, times out/in: squared gains of squared norm"
    model = convert(timm.create_model('resnet50'), norm)
    init_norm_preserving(model)
    def gain(conv): return (filter_norms(conv.w if norm == 'wn' else conv.weight).square()*conv.out_channels/conv.in_channels).tolist()
    assert gain(model.conv1) == pytest.approx([2]*64)
    for stage, size in zip((model.layer1, model.layer2, model.layer3, model.layer4), (3, 4, 6, 3), strict=True):
        for conv, kappa in ((stage[0].downsample[0], 1), *((conv, kappa) for block in stage for conv, kappa in ((block.conv1, 2), (block.conv2, 2), (block.conv3, 1/size)))):
            assert gain(conv) == pytest.approx([kappa]*conv.out_channels)
