"""What the lessons of the page cannot show: all schemes, dtypes, failing passes, and the rule against a second implementation"""
import io, json, math, subprocess, sys

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from nwrepro.methods.layers import WNConv2d, WNLinear
from nwrepro.training.monitor import DivergenceMonitor, divergence_reason, first_nonfinite, grad_norm
from nwrepro.methods.fast import compiler_works, fast_form
from nwrepro.training.probes import filter_coherence, layer_outputs, output_hooks, probed_layers, weight_norms
from conftest import FIVE
from nwrepro.methods.schemes import convert

torch.set_num_threads(1)


def resnet(arch='resnet18', seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=10, zero_init_last=False, **kwargs)


def images(n=4, size=32, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    return state, torch.get_rng_state(), [m.training for m in model.modules()], hooks


def assert_same(before, after):
    for name, value in before[0].items(): torch.testing.assert_close(after[0][name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


@pytest.mark.parametrize('arch,stages', [('resnet18', (1, 1, 1, 1)), ('resnet50', (2, 3, 5, 2))])
def test_block_sizes_agree_with_timms_own_features(arch, stages):
    model, x = resnet(arch), images(2)
    outputs = layer_outputs(model, x)
    by_name = {name: i for i, name in enumerate(outputs['layer'])}
    features = model.eval().forward_intermediates(x, intermediates_only=True)[-4:]
    for stage, (last, feature) in enumerate(zip(stages, features, strict=True), 1):
        i, y = by_name[f'layer{stage}.{last}'], feature.detach().numpy().astype(numpy.float64)
        assert outputs['rms'][i] == pytest.approx(numpy.sqrt((y**2).mean()), rel=6e-5)
        assert outputs['l2'][i] == pytest.approx(numpy.linalg.norm(y.reshape(len(y), -1), axis=1).mean(), rel=6e-5)
        assert outputs['mean'][i] == pytest.approx(y.mean(), rel=6e-5, abs=1e-6)


@pytest.mark.parametrize('norm', FIVE)
def test_every_scheme_has_the_same_rows(norm):
    stock = layer_outputs(resnet(), images())
    model = convert(resnet(), norm)
    outputs = layer_outputs(model, images())
    assert outputs['layer'] == stock['layer'] and len(outputs['layer']) == 20+8+1
    assert all(math.isfinite(value) for key in ('rms', 'l2', 'mean') for value in outputs[key])
    assert weight_norms(model)['layer'] == filter_coherence(model)['layer'] == [name for name in probed_layers(model) if name.count('.') != 1]


@pytest.mark.parametrize('probe', [layer_outputs, first_nonfinite])
@pytest.mark.parametrize('frozen', [False, True])
def test_probe_leaves_no_trace(probe, frozen):
    model = resnet(drop_rate=0.3, drop_path_rate=0.2).train()
    if frozen: model.layer1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    before, x = snapshot(model), images()
    probe(model, x)
    assert_same(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('probe', [layer_outputs, first_nonfinite])
def test_a_failing_pass_leaves_no_trace(probe):
    model = resnet(drop_rate=0.3).train()
    model.layer4[1].conv2.weight = nn.Parameter(torch.ones(512, 3, 3, 3))
    before = snapshot(model)
    with pytest.raises(RuntimeError): probe(model, images())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_precision_of_the_network(dtype):
    expected = layer_outputs(resnet(), images())
    outputs = layer_outputs(resnet().to(dtype), images().to(dtype))
    assert outputs['layer'] == expected['layer']
    assert outputs['rms'] == pytest.approx(expected['rms'], rel={torch.float64: 2e-5, torch.bfloat16: 5e-2}[dtype])


def test_values_whose_squares_overflow_are_measured():
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    nn.init.dirac_(net[0].weight)
    outputs = layer_outputs(net, 3e30*torch.ones(2, 3, 4, 4))
    assert outputs['rms'] == [3e30] and outputs['l2'] == [pytest.approx(3e30*math.sqrt(48), rel=1e-4)]
    assert layer_outputs(net, torch.full((2, 3, 4, 4), math.nan))['rms'] == [pytest.approx(math.nan, nan_ok=True)]


def test_only_the_last_linear_layer_is_kept_even_where_one_runs_twice():
    first, head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    net = nn.Sequential(first, WNLinear(4, 4), head, head)
    for layer in (first, head): nn.init.eye_(layer.weight)
    with torch.no_grad(): net[1].v.copy_(torch.eye(4)); net[1].g.fill_(1); net[1].bias.zero_()
    assert layer_outputs(net, -torch.ones(3, 4)) == {'layer': ['2'], 'rms': [1.], 'l2': [2.], 'mean': [-1.]}


@pytest.mark.parametrize('probe', [layer_outputs, first_nonfinite])
def test_a_probe_keeps_no_graph(probe):
    model, graphs = resnet(), []
    model.fc.register_forward_hook(lambda m, args, y: graphs.append(y.requires_grad))
    probe(model, images())
    assert graphs == [False]


def test_weight_lengths_against_numpy():
    torch.manual_seed(0)
    net = nn.ModuleDict(dict(wn=WNConv2d(3, 5, 3), strict=WNConv2d(3, 5, 3, affine=False), plain=nn.Conv2d(3, 5, 3), head=WNLinear(7, 2)))
    with torch.no_grad():
        net['wn'].g.copy_(torch.tensor([1., -1., 2., -2., 0.]))
        net['strict'].v.mul_(3)
    lengths = {name: value for name, *value in zip(*weight_norms(net).values(), strict=True)}
    def mean_length(p): return numpy.linalg.norm(p.detach().numpy().reshape(len(p), -1), axis=1).mean()
    assert lengths['wn'] == [pytest.approx(mean_length(net['wn'].v), rel=1e-4), pytest.approx(1.2)]
    assert lengths['strict'] == [pytest.approx(mean_length(net['strict'].v), rel=1e-4), 1.]
    assert lengths['plain'] == [pytest.approx(mean_length(net['plain'].weight), rel=1e-4)]*2
    assert lengths['head'] == [pytest.approx(mean_length(net['head'].v), rel=1e-4), pytest.approx(mean_length(net['head'].w), rel=1e-4)]


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**31-1), st.floats(0.01, 100))
def test_coherence_against_pairs_one_by_one(m, n, seed, scale):
    w = numpy.random.default_rng(seed).normal(size=(m, n)).astype(numpy.float32)
    layer = nn.Linear(n, m)
    with torch.no_grad(): layer.weight.copy_(torch.from_numpy(w)*torch.linspace(1, scale, m)[:, None])
    pairs = [abs(w[i]@w[j])/numpy.linalg.norm(w[i])/numpy.linalg.norm(w[j]) for i in range(m) for j in range(i)]
    coherence = filter_coherence(nn.ModuleList([layer]))
    assert coherence['mean'] == [pytest.approx(numpy.mean(pairs), rel=1e-3, abs=1e-5)]
    assert coherence['max'] == [pytest.approx(max(pairs), rel=1e-3, abs=1e-5)]


def test_coherence_of_odd_layers():
    zero, one = nn.Linear(3, 4), nn.Linear(3, 1)
    with torch.no_grad(): zero.weight.copy_(torch.tensor([[1., 0, 0], [0, 1, 0], [-2, 0, 0], [0, 0, 0]]))
    assert filter_coherence(nn.ModuleDict(dict(zero=zero, one=one))) == {'layer': ['zero'], 'mean': [0.16667], 'max': [1.]}


def test_grad_length():
    net = nn.ModuleList([nn.Linear(3, 2), nn.Linear(5, 5)]).double()
    assert grad_norm(net.parameters()) == 0
    net[0](torch.ones(1, 3).double()).sum().backward()
    assert grad_norm(net.parameters()).item() == pytest.approx(math.sqrt(8))
    assert nn.utils.clip_grad_norm_(net.parameters(), 1.).item() == pytest.approx(math.sqrt(8))

@pytest.mark.parametrize('layout', (torch.channels_last, torch.contiguous_format), ids=str)
def test_grad_length_is_that_of_torch_in_every_memory_format(layout):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4*36, 2)).to(memory_format=layout)
    net(images(2, size=8).contiguous(memory_format=layout)).square().sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert grad_norm(net.parameters()).item() == pytest.approx(torch.nn.utils.get_total_norm(grads).item(), rel=1e-6)
    for p, strange in zip(net.parameters(), (torch.ones(1, 3, 3, 3).expand(8, 3, 3, 3), torch.arange(16.)[::2]), strict=False): p.grad = strange  # with gaps, or one number for many
    assert grad_norm(net.parameters()).item() == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item(), rel=1e-6)


def verdict_by_the_book(losses, lengths, classes, patience):
    "The rule of the page, said again over the whole course of a run: verdict and step of divergence"
    limit = 2*max(losses[0], math.log(classes))
    for t in range(len(losses)):
        last = losses[max(0, t+1-patience):t+1]
        if not (math.isfinite(losses[t]) and math.isfinite(lengths[t])) or (len(last) == patience and all(loss > limit for loss in last)): return 'diverged', t
    return ('stuck' if numpy.mean(losses[-patience:]) > 0.95*math.log(classes) else 'learning'), None


loss_values = st.one_of(st.floats(0, 10), st.floats(4, 60), st.sampled_from([math.nan, math.inf]))
courses = st.lists(st.tuples(st.one_of(st.floats(0, 10), st.floats(3, 60)), st.floats(0, 1e30)), min_size=1, max_size=60)
breaks = st.lists(st.tuples(loss_values, st.one_of(st.floats(0, 10), st.sampled_from([math.nan, math.inf]))), max_size=2)


@settings(max_examples=300)
@given(courses, breaks, st.sampled_from([2, 10, 1000]), st.integers(1, 8), st.integers(0, 60))
def test_watch_against_the_book_and_cut_anywhere(course, end, classes, patience, cut):
    losses, lengths = zip(*(course+end), strict=True)
    watch, reasons = DivergenceMonitor(classes, patience), []
    for t, (loss, length) in enumerate(zip(losses, lengths, strict=True)):
        if t == cut:
            saved = io.BytesIO()
            torch.save(watch.state_dict(), saved)
            saved.seek(0)
            watch = DivergenceMonitor(classes, patience)
            watch.load_state_dict(torch.load(saved, weights_only=True))
        reasons.append(watch.step(loss, length))
    verdict, step = verdict_by_the_book(losses, lengths, classes, patience)
    assert watch.verdict() == verdict
    assert [r is not None for r in reasons] == [step is not None and t >= step for t in range(len(losses))]
    assert len({r for r in reasons if r}) <= 1
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert watch.last_finite_loss == (finite[-1] if finite else None)
    assert numpy.array_equal(watch.history, lengths, equal_nan=True)


def test_watch_is_bounded_and_takes_tensors():
    watch = DivergenceMonitor(10)
    for step in range(250): assert watch.step(torch.tensor(1., requires_grad=True)*1, torch.tensor(float(step))) is None
    assert watch.history == [float(step) for step in range(150, 250)] and len(watch.losses) == 50
    assert json.loads(json.dumps(watch.state_dict()))['last_finite_loss'] == 1.
    assert watch.verdict() == 'learning'


def test_label_smoothing_leaves_chance_where_it_is():
    logits, y = torch.zeros(8, 10), torch.arange(8)
    assert F.cross_entropy(logits, y, label_smoothing=0.1).item() == pytest.approx(math.log(10))
    watch = DivergenceMonitor(10)
    for _ in range(60): watch.step(F.cross_entropy(logits, y, label_smoothing=0.1), 0.)
    assert watch.verdict() == 'stuck'


def test_a_first_loss_that_is_not_finite_is_a_divergence():
    assert DivergenceMonitor(10).step(math.nan, 1.) == 'loss is nan' and DivergenceMonitor(10).step(math.inf, 1.) == 'loss is inf'
    assert divergence_reason([1e9], 1., 4.6, patience=1) == 'loss above 4.6 for 1 steps'


convolutions = [name for name, m in resnet().named_modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize('norm', ['bn', 'wn', 'trelu'])
def test_a_planted_fault_is_found_in_every_convolution(norm):
    model = convert(resnet(), norm).train()
    assert first_nonfinite(model, images()) is None
    for name in convolutions:
        layer = model.get_submodule(name)
        w = layer.weight if norm == 'bn' else layer.v
        kept = w.data.clone()
        w.data[0] = math.nan
        assert first_nonfinite(model, images()) == name
        w.data.copy_(kept)
    assert first_nonfinite(model, images()) is None


def test_mode_decides_what_is_found():
    model = resnet()
    model.layer2[0].bn1.running_var.fill_(math.nan)
    assert first_nonfinite(model.eval(), images()) == 'layer2.0.bn1'
    assert first_nonfinite(model.train(), images()) is None
    assert model.layer2[0].bn1.running_var.isnan().all()


def test_overflow_of_a_sum_is_named_by_the_module_that_sees_it_first():
    model = convert(resnet(), 'none').eval()
    with torch.no_grad():
        for conv in (model.layer1[0].conv1, model.layer1[0].conv2): conv.weight.zero_()
        model.layer1[0].conv2.bias.fill_(3e38)
        model.conv1.bias.fill_(3e38)
    assert first_nonfinite(model, images()) == 'layer1.0.act2'


def test_input_root_and_replayed_dropout():
    assert first_nonfinite(nn.Linear(2, 2), torch.tensor([[math.inf, 0.]])) == 'input'
    root = nn.Linear(2, 2)
    with torch.no_grad(): root.weight[0, 0] = math.inf
    assert first_nonfinite(root, torch.ones(1, 2)) == 'Linear'
    masks, drop = [], nn.Sequential(nn.Dropout(0.5)).train()
    drop.register_forward_hook(lambda m, args, y: masks.append(y.clone()))
    for _ in range(2): first_nonfinite(drop, torch.ones(1, 64))
    drop(torch.ones(1, 64))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_import_is_light():
    heavy = 'IPython nbdev fastcore papermill matplotlib timm pandas sklearn'.split()
    code = f'import nwrepro.training.probes, sys; assert not [m for m in {heavy} if m in sys.modules], sorted(sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('norm', FIVE)
@pytest.mark.parametrize('kernels', (False, True))
def test_a_hook_sees_what_a_layer_puts_out(norm, kernels):
    "At its call in every scheme; afterwards too where activations are the package's own, readable or fused, which work on no map in place"
    if kernels and not compiler_works(): pytest.skip('no compiler works here')
    network = fast_form(convert(resnet(), norm), kernels=kernels)
    convs, seen = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}, {}
    with torch.no_grad(), output_hooks(convs, lambda name, y: seen.update({name: (y, y.clone())})): network(images())
    assert all((then < 0).any() for _, then in seen.values())
    rectified = [name for name, (kept, then) in seen.items() if not torch.equal(kept, then)]
    assert all(torch.equal(seen[name][0], F.relu(seen[name][1])) for name in rectified if name.endswith('conv1'))
    assert bool(rectified) == (norm in ('none', 'wn'))
