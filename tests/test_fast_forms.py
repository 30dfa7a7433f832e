"The forms that make a scheme cheap against the plain forms of the lessons: networks, gradients, training, and compiled kernels"
import copy, warnings
import pytest, timm, torch
import torch.nn.functional as F
from torch import nn
from nwrepro.layers import NPAdd, NPReLU, TReLU, WNAdd, WNConv2d, weight_normalize
from nwrepro.optimizer import WNSGD, clip_gradient, gradient_length, make_ready, normalised, renew
from nwrepro.passes import Kernel, NPJoin, WNJoin, end_branch
from nwrepro.probes import first_nonfinite_gradient, layer_outputs
from nwrepro.roofline import kept_bytes
from nwrepro.surgery import SCHEMES, JoinBlock, Scheme, convert, no_norm, parameter_roles, strict

PLAIN = dict(wn=SCHEMES['wn'], np=Scheme(conv=weight_normalize, norm=no_norm, act=lambda channels: NPReLU(), join=lambda channels: NPAdd(), head=weight_normalize, inits=('np',)),
             trelu=Scheme(conv=strict, norm=no_norm, act=TReLU, join=WNAdd, head=weight_normalize))

def pair(norm, arch, monkeypatch, layout):
    "A network in its plain form and in the form of the scheme, in float64, with parameters moved off their start"
    monkeypatch.setitem(SCHEMES, 'plain', PLAIN[norm])
    torch.manual_seed(0)
    plain, fast = (convert(timm.create_model(arch, num_classes=10), scheme).double().to(memory_format=layout) for scheme in ('plain', norm))
    with torch.no_grad():
        for p in plain.parameters(): p.mul_(1+0.2*torch.rand_like(p)).add_(0.05*torch.randn_like(p))
    fast.load_state_dict({plain_name(name, fast): value for name, value in plain.state_dict().items()})
    return plain.train(), fast.train()

def plain_name(name, fast):
    "The name in `fast` of a parameter of a plain network: a join that activates has the threshold"
    block, _, rest = name.rpartition('.act')
    joins = block and isinstance(fast.get_submodule(block), JoinBlock) and rest == fast.get_submodule(block).last_act[3:]+'.alpha'
    return f'{block}.join.alpha' if joins else name

def optimizer_of(model, layers):
    roles = parameter_roles(model)
    decays = [[p for name, p in model.named_parameters() if (roles[name] == 'v') is decay] for decay in (True, False)]
    return WNSGD([dict(params=decays[0], weight_decay=1e-3), dict(params=decays[1], weight_decay=1e-4)], layers, lr=1e-3, momentum=0.9)

def train(model, fast, steps, layout=torch.contiguous_format):
    "Gradient lengths of a few steps with momentum, decay and clipping"
    optimizer, lengths = optimizer_of(model, normalised(model) if fast else ()), []
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(4, 3, 32, 32).double().contiguous(memory_format=layout), torch.randint(10, (4,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        lengths.append(gradient_length(optimizer))
        clip_gradient(optimizer, 1., lengths[-1])
        optimizer.step()
    return torch.stack(lengths)

def relative(a, b): return ((a-b).abs().max()/b.abs().max().clamp(min=1e-30)).item()

@pytest.mark.parametrize('layout', (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize('arch', ('resnet18', 'resnet26'))
@pytest.mark.parametrize('norm', PLAIN)
def test_trains_as_the_plain_form(norm, arch, layout, monkeypatch):
    plain, fast = pair(norm, arch, monkeypatch, layout)
    x = torch.randn(2, 3, 32, 32).double().contiguous(memory_format=layout)
    assert relative(fast(x), plain(x)) < 1e-9
    assert relative(train(fast, True, 5, layout), train(plain, False, 5, layout)) < 1e-9
    saved = fast.state_dict()
    for name, value in plain.state_dict().items(): assert relative(saved[plain_name(name, fast)], value) < 1e-9, name
    assert relative(fast.eval()(x), plain.eval()(x)) < 1e-9

@pytest.mark.slow
@pytest.mark.parametrize('norm', ('wn', 'trelu'))
def test_a_hundred_steps(norm, monkeypatch):
    plain, fast = pair(norm, 'resnet18', monkeypatch, torch.channels_last)
    assert relative(train(fast, True, 100, torch.channels_last), train(plain, False, 100, torch.channels_last)) < 1e-9
    for name, value in plain.state_dict().items(): assert relative(fast.state_dict()[plain_name(name, fast)], value) < 1e-9, name

@pytest.mark.parametrize('norm', PLAIN)
def test_gradients_of_the_images_and_of_all_parameters(norm, monkeypatch):
    plain, fast = pair(norm, 'resnet26', monkeypatch, torch.channels_last)
    x = torch.randn(2, 3, 32, 32).double()
    found = {}
    for name, model in dict(plain=plain, fast=fast).items():
        images = x.clone().requires_grad_()
        F.cross_entropy(model(images), torch.tensor([1, 2])).backward()
        found[name] = {plain_name(n, fast) if model is plain else n: p.grad for n, p in model.named_parameters()} | dict(images=images.grad)
    assert found['fast'].keys() == found['plain'].keys()
    for name, grad in found['plain'].items(): assert relative(found['fast'][name], grad) < 1e-9, name

def test_a_filter_of_length_0_trains(monkeypatch):
    "Branches that start at zero have g = 0, which leaves a direction all the same"
    plain, fast = (convert(timm.create_model('resnet18', num_classes=10), 'wn', zero_init=True).double() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    assert (fast.layer1[0].conv2.g == 0).all()
    train(fast, True, 3), train(plain, False, 3)
    assert (fast.layer1[0].conv2.g != 0).all()
    for name, value in plain.state_dict().items(): assert relative(fast.state_dict()[name], value) < 1e-9, name

@pytest.mark.parametrize('conv', [nn.Conv2d(4, 4, 3), WNConv2d(4, 4, 3), WNConv2d(4, 4, 3, bias=False)], ids=str)
def test_a_join_with_weights_refuses_a_convolution_that_cannot_take_them(conv):
    with pytest.raises(ValueError, match='needs conv=strict'): end_branch(conv, WNJoin(4), 0)
    with pytest.raises(ValueError, match='needs conv=strict'): JoinBlock(timm.create_model('resnet18').layer1[0], WNJoin(64))

@pytest.mark.slow
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize('norm', PLAIN)
def test_compiled_kernels_compute_the_same(norm, dtype, monkeypatch):
    monkeypatch.setattr(Kernel, 'wanted', False)
    torch.manual_seed(0)
    model = convert(timm.create_model('resnet26', num_classes=10), norm).to(memory_format=torch.channels_last)
    nets = model, copy.deepcopy(model)
    x, y, ends = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.randint(10, (8,)), []
    for net, compiled in zip(nets, (False, True), strict=True):
        monkeypatch.setattr(Kernel, 'wanted', compiled)
        optimizer = WNSGD(net.parameters(), normalised(net), dtype, lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                warnings.filterwarnings('error', message='kernels run uncompiled')
                loss = F.cross_entropy(net(x), y)
                loss.backward()
            length = gradient_length(optimizer)
            optimizer.step()
        ends.append((loss.item(), length.item(), net.conv1.v))
    limit = 1e-4 if dtype == torch.float32 else 0.05
    assert ends[0][:2] == pytest.approx(ends[1][:2], rel=limit) and relative(ends[1][2], ends[0][2]) < limit

def test_a_kernel_runs_uncompiled_where_compiling_fails(monkeypatch):
    def fail(f, **kwargs):
        def g(*args): raise RuntimeError('no compiler here')
        return g
    monkeypatch.setattr(torch, 'compile', fail)
    monkeypatch.setattr(Kernel, 'wanted', True)
    doubled = Kernel(lambda x: 2*x)
    with pytest.warns(UserWarning, match='run uncompiled.*no compiler here'): assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert not Kernel.wanted

def test_no_length_outlives_its_gradient():
    layer = WNConv2d(2, 3, 1)
    optimizer = WNSGD(layer.parameters(), [layer], lr=0.1)
    gradient = torch.ones_like(layer.ready)
    def length():
        optimizer.zero_grad()
        layer.ready.grad = gradient  # the same place and version, as the memory of a freed tensor can be
        return gradient_length(optimizer).item()
    first = length()
    gradient.data.mul_(2)
    assert length() == pytest.approx(2*first) and first > 0

@pytest.mark.parametrize('more', [dict(dampening=0.1), dict(nesterov=True), dict(maximize=True)], ids=str)
def test_what_the_step_does_not_know_is_refused(more):
    layer = WNConv2d(2, 3, 1)
    with pytest.raises(ValueError, match=f'{next(iter(more))}: the step on v and g is that of plain SGD'): WNSGD(layer.parameters(), [layer], lr=0.1, momentum=0.9, **more)

def test_a_lack_of_memory_is_no_matter_of_the_compiler(monkeypatch):
    def fail(x):
        x.add_(1)
        raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: f)
    monkeypatch.setattr(Kernel, 'wanted', True)
    x = torch.ones(2)
    with pytest.raises(torch.OutOfMemoryError): Kernel(fail)(x)
    assert x.tolist() == [2, 2] and Kernel.wanted

def test_joins_take_over_the_memory_of_the_residual():
    for join in (NPJoin(), WNJoin(4)):
        residual = 1*torch.randn(2, 4, 3, 3, requires_grad=True)
        assert join(residual, torch.randn(2, 4, 3, 3)).data_ptr() == residual.data_ptr()
        assert join.around(lambda x: residual, torch.randn(2, 4, 3, 3)).data_ptr() == residual.data_ptr()

def trelu_net():
    "Its parameters moved off their start, where no branch counts"
    torch.manual_seed(0)
    net = convert(timm.create_model('resnet18', num_classes=3), 'trelu').double()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.1*torch.randn_like(p))
    return net

def ready_weights(net): return {name: p.clone() for name, p in net.named_parameters() if name.endswith('ready')}

@pytest.mark.parametrize('whole', (True, False), ids=('model', 'optimizer'))
def test_weights_that_are_loaded_carry_the_weights_of_their_branches(whole):
    nets, optimizers = (trelu_net(), trelu_net()), []
    for net in nets: optimizers.append(optimizer_of(net, normalised(net)))
    x = torch.randn(2, 3, 32, 32).double()
    nets[0](x).square().sum().backward()
    optimizers[0].step()
    assert all(not torch.equal(a, b) for a, b in zip(ready_weights(nets[0]).values(), ready_weights(nets[1]).values(), strict=True))
    nets[1].load_state_dict(nets[0].state_dict())
    if not whole: optimizers[1].load_state_dict(optimizers[0].state_dict())
    for name, weight in ready_weights(nets[0]).items():
        assert torch.equal(ready_weights(nets[1])[name], weight) if not whole else relative(ready_weights(nets[1])[name], weight) < 1e-12, name

def test_gradients_that_come_in_parts_reach_the_join_once():
    "Two batches, looked at in between, against both at once"
    nets = trelu_net(), trelu_net()
    once, parts = (optimizer_of(net, normalised(net)) for net in nets)
    x = torch.randn(4, 3, 32, 32).double()
    nets[0](x).sum().backward()
    for batch in x.split(2):
        nets[1](batch).sum().backward()
        gradient_length(parts)
    assert relative(gradient_length(parts), gradient_length(once)) < 1e-12
    for block, other in zip(nets[0].layer2, nets[1].layer2, strict=True): assert relative(other.join.u.grad, block.join.u.grad) < 1e-12
    assert nets[0].layer2[0].join.u.grad.abs().max() > 0

def test_the_filters_of_a_copy_follow_its_own_join():
    net = trelu_net()
    twin = copy.deepcopy(net)
    with torch.no_grad(): net.layer1[0].join.u.mul_(-1)
    torch.testing.assert_close(net.layer1[0].conv2.w, -twin.layer1[0].conv2.w)

@pytest.mark.parametrize('norm', PLAIN)
def test_as_little_is_kept_as_without_normalization(norm):
    x, nets = torch.randn(8, 3, 64, 64), {n: convert(timm.create_model('resnet50', num_classes=10), n) for n in ('none', norm)}
    optimizer_of(nets[norm], normalised(nets[norm]))
    kept = {n: kept_bytes(net, lambda: net(x)) for n, net in nets.items()}
    assert kept[norm] <= 1.01*kept['none']

@pytest.mark.parametrize('norm', PLAIN)
def test_probes_see_the_same_signals_in_both_forms(norm, monkeypatch):
    seen = [layer_outputs(model, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()) for model in pair(norm, 'resnet26', monkeypatch, torch.channels_last)]
    weighted = ('conv3', 'downsample.0') if norm == 'trelu' else ()  # the fast form gives these the weight that they have in the sum
    plain, fast = ({name: rms for name, rms in zip(one['layer'], one['rms'], strict=True) if not name.endswith(weighted)} for one in seen)
    assert len(plain) >= 26 and plain == pytest.approx(fast, rel=1e-4)

def test_a_gradient_that_arrives_at_the_weight_is_named_after_its_direction():
    model = convert(timm.create_model('resnet18', num_classes=3), 'wn')
    make_ready(model.layer1[0].conv1, torch.float32)
    renew([model.layer1[0].conv1])
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert first_nonfinite_gradient(model) is None
    model.layer1[0].conv1.ready.grad[0] = torch.inf
    assert first_nonfinite_gradient(model) == 'layer1.0.conv1.v'
