"The fast form of a network: the same as its readable form, whatever is done to either"
import copy, io, math, pickle, signal, warnings
import onnxruntime, pytest, timm, torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor
import nwrepro.methods.fast
from nwrepro.methods.fast import WNSGD, copy_norms, fast_form, fuse_activations, plain_weights, wn_layers, write_back
from nwrepro.training.recipe import RECIPES, make_recipe
from nwrepro.cost.roofline import kept_bytes
from nwrepro.methods.deploy import fold, to_timm
from nwrepro.methods.schemes import convert, parameter_roles
from nwrepro.training.checkpoint import Interrupted
from nwrepro.training.build import first_images, make_model, make_views
from nwrepro.training.engine import start_training
from nwrepro.training.lifecycle import trained
from nwrepro.training.loop import fit, train_step
from test_loop import digits, train as train_run

ALL, WN = ('bn', 'none', 'wn', 'np', 'trelu'), ('wn', 'np', 'trelu')
X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double()

def small(norm, **kwargs):
    "A network of four blocks in float64, every parameter moved off its init, half of the filters with g < 0"
    torch.manual_seed(0)
    model = convert(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 16, 16, 16)), norm, **kwargs).double()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1+0.2*torch.rand_like(p)).add_(0.05*torch.randn_like(p))
        for m in model.modules():
            if getattr(m, 'g', None) is not None: m.g[::2] *= -1
    return model

def optimizer_of(fast, model, **options):
    "Decay of v, of g and of the rest apart; another learning rate for the first layer"
    plain, groups = plain_weights(fast, model), {}
    for name, p in fast.named_parameters():
        layer = plain.get(name.removesuffix('.weight'), (None, None))[1] if name.endswith('.weight') else None
        roles = parameter_roles(model)
        if layer is None: kind = dict(weight_decay=dict(v=1e-2, g=1e-3).get(roles[name], 1e-4))
        elif layer.g is None: kind = dict(weight_norm='strict', weight_decay_v=1e-2)
        else: kind = dict(weight_norm='affine', weight_decay_v=1e-2, weight_decay_g=1e-3, train_g=layer.g.requires_grad)
        kind['lr'] = 3e-2 if name.startswith('conv1.') else 1e-2
        groups.setdefault(str(kind), dict(kind, params=[]))['params'].append(p)
    optimizer = WNSGD(groups.values(), 1e-2, momentum=0.9, **options)
    copy_norms(optimizer, fast, model)
    return optimizer

def plain_sgd(model):
    "The same on `v` and `g` themselves, by torch"
    roles = parameter_roles(model)
    return torch.optim.SGD([dict(params=[p], weight_decay=dict(v=1e-2, g=1e-3).get(roles[name], 1e-4), lr=3e-2 if name.startswith('conv1.') else 1e-2)
                            for name, p in model.named_parameters()], momentum=0.9)

def backward(network, batch=X, **kwargs): F.cross_entropy(network(batch), torch.arange(len(batch)) % 3, **kwargs).backward()

def step(network, optimizer, batch=X):
    optimizer.zero_grad()
    backward(network, batch)
    optimizer.step()

def near(a, b, limit=1e-9): return ((a-b).abs().max()/b.abs().max().clamp(min=1e-30)).item() <= limit

def same(networks, limit=1e-9):
    with torch.no_grad(): first, *others = [network.eval()(X) for network in networks]
    for network in networks: network.train()
    return all(near(other, first, limit) for other in others)

def reloaded(model):
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for p in fresh.parameters(): p.fill_(0.123)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return fresh

# the step

@pytest.mark.parametrize('layout', (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize('norm, kwargs', [*((norm, {}) for norm in WN), ('wn', dict(zero_init=True))], ids=str)
def test_a_hundred_steps_as_sgd_on_v_and_g(norm, kwargs, layout):
    "Momentum, decay of v and g apart, groups of other lr, clipping on the norm of the plain form, accumulated gradients, a frozen g, layers with g = 0"
    model = small(norm, **kwargs).to(memory_format=layout)
    if kwargs:
        with torch.no_grad(): model.layer1[0].conv2.g.zero_()
    if norm != 'trelu': model.layer2[0].conv1.g.requires_grad_(False)
    fast = fast_form(model)
    assert wn_layers(fast) == (['layer1.0.conv2'] if kwargs else [])
    optimizer, plain, sgd = optimizer_of(fast, model), copy.deepcopy(model), None
    sgd, clipped = plain_sgd(plain), 0
    random = torch.Generator().manual_seed(1)
    for k in range(100):
        batch = torch.randn(6, 3, 32, 32, generator=random).double().contiguous(memory_format=layout)
        for network, opt in ((plain, sgd), (fast, optimizer)):
            opt.zero_grad()
            for part in batch.split(3): backward(network, part)
        norm_plain = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert near(optimizer.clip_grad_norm_(0.5), norm_plain), k
        clipped += (norm_plain > 0.5).item()
        sgd.step(), optimizer.step()
    assert 10 < clipped
    write_back(fast, model, optimizer)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True): assert near(p, q), name
    assert same([fast, model, plain])

def test_frozen_means_frozen():
    model = small('wn')
    model.conv1.g.requires_grad_(False)
    model.layer1[0].conv1.v.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    fast = fast_form(model)
    optimizer, before = optimizer_of(fast, model), copy.deepcopy(model.state_dict())
    for _ in range(3): step(fast, optimizer)
    write_back(fast, model, optimizer)
    moved = {name for name, value in model.state_dict().items() if not near(value, before[name], 1e-12)}
    assert set(before)-moved == {'conv1.g', 'layer1.0.conv1.v', 'fc.bias'}

def test_groups_keep_their_own_rates():
    model = small('wn')
    fast = fast_form(model)
    optimizer = optimizer_of(fast, model)
    for group in optimizer.param_groups: group.update(lr=0.1 if any(p is fast.conv1.weight for p in group['params']) else 0.)
    before = copy.deepcopy(fast.state_dict())
    step(fast, optimizer)
    assert {name for name, value in fast.state_dict().items() if not near(value, before[name], 1e-12)} == {'conv1.weight'}

@pytest.mark.parametrize('wrong', [dict(weight_norm='wn'), dict(nesterov=True), dict(dampening=0.1)], ids=str)
def test_what_the_step_does_not_know_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))): WNSGD(nn.Linear(2, 2).parameters(), lr=0.1, **wrong)

def test_a_weight_that_lies_in_memory_otherwise_is_refused():
    w = nn.Parameter(torch.randn(4, 6).T)
    w.grad = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r'shape \[6, 4\] is neither contiguous nor channels_last in memory: call .contiguous'): WNSGD([dict(params=[w], weight_norm='affine')], lr=0.1).step()

def test_no_function_runs_twice_when_it_fails(monkeypatch):
    calls = []
    def failing(f):
        def g(w, *args):
            calls.append(f)
            w.add_(1)
            raise RuntimeError('a fault that no second call mends')
        return g
    monkeypatch.setattr(nwrepro.methods.fast, 'compiled', failing)
    w = nn.Parameter(torch.zeros(2, 3))
    w.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match='no second call mends'): WNSGD([dict(params=[w], weight_norm='affine')], lr=0.1, compile=True).step()
    assert len(calls) == 1 and w.tolist() == [[1]*3]*2

def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    def fail(f, **kwargs): raise OSError('no g++ here\nand more')
    monkeypatch.setattr(torch, 'compile', fail)
    nwrepro.methods.fast.compiler_works.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r'^kernels are not compiled, which is slower, since no compiler works here \(no g\+\+ here\): install g\+\+$'): assert not nwrepro.methods.fast.compiler_works()
    finally: nwrepro.methods.fast.compiler_works.cache_clear()

# after training, and with other tools

def after_fit(tmp_path, norm, **given):
    kept = []
    def keeping(model, *args, **kwargs):
        kept.append(model)
        return fit(model, *args, **kwargs)
    _, run = train_run(tmp_path, keeping, norm=norm, lr=0.01, max_steps=3, **given)
    return kept[0], run

@pytest.mark.parametrize('norm', WN)
def test_what_follows_a_fit_is_saved(norm, tmp_path):
    "Fine-tuning by torch's SGD, AdamW and a second WNSGD; copies"
    model, run = after_fit(tmp_path, norm, dropout=0.)
    count, x = sum(p.numel() for p in model.parameters()), torch.randn(20, 3, 16, 16)
    assert count == sum(p.numel() for p in trained(run).parameters()) and all(p.requires_grad for p in model.parameters())
    for name, value in load_file(run.checkpoints/'final.safetensors').items(): assert torch.equal(model.state_dict()[name].contiguous(), value), name
    makers = (lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), lambda: torch.optim.AdamW(model.parameters(), lr=1e-3))
    for make in makers:
        optimizer, before = make(), copy.deepcopy(model.state_dict())
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items() if name.endswith('.v'))
        out, twin = model.eval()(x), copy.deepcopy(model)
        assert near(reloaded(model)(x), out, 1e-5) and near(fold(model)(x), out, 1e-4) and near(twin(x), out, 1e-6)
    fast = fast_form(model)
    again = optimizer_of(fast, model)
    fast.train()(x).square().mean().backward()
    again.step()
    write_back(fast, model, again)
    assert near(reloaded(model).eval()(x), fast.eval()(x), 1e-4) and sum(p.numel() for p in model.parameters()) == count
    if norm == 'wn':
        stock = timm.create_model('resnet18', num_classes=10)
        with pytest.raises(ValueError, match="use fold"): to_timm(small('np'))
        stock.load_state_dict(to_timm(model))
        assert near(stock.eval()(x), model.eval()(x), 1e-4)

def predictions(run): return [line.split(',')[2] for line in (run.path/'predictions.csv').read_text().splitlines()[1:]]

@torch.no_grad()
def predicted(model):
    x = first_images(make_views(make_recipe(dict(arch='resnet18', image_size=16, bn_batch=10, batch_size=20, train_images=100, epochs=2), digits), digits).val, 360)
    return [str(k) for k in model.eval()(x).argmax(1).tolist()]

def test_the_second_fit_of_a_model_records_what_it_holds(tmp_path):
    "Two stops at once before the first checkpoint, one after a step, and the cell that trains run again and again"
    model, tries, stops = [], [], [2, 2, 1]
    def again(new, *args, **kwargs):
        model.append(new)
        return fit(model[0], *args, **kwargs, watch=watch)
    def watch(run):
        if tries and run.metrics() is not None and stops: [signal.raise_signal(signal.SIGINT) for _ in range(stops.pop(0))]
    for _ in range(3):
        tries.append(1)
        with pytest.raises(KeyboardInterrupt): train_run(tmp_path, again, norm='wn', lr=0.01)
    summary, run = train_run(tmp_path, again, norm='wn', lr=0.01)
    assert summary['status'] == 'finished' and predicted(model[0]) == predictions(run) == predicted(trained(run))
    _, whole = train_run(tmp_path/'whole', norm='wn', lr=0.01)
    for name, value in load_file(whole.checkpoints/'final.safetensors').items(): assert value.equal(model[0].state_dict()[name].contiguous()), name

@pytest.mark.parametrize('norm, lr', [('bn', 0.01), ('trelu', 0.01), ('none', 1e4)])
def test_a_run_that_has_ended_gives_its_weights_or_none(norm, lr, tmp_path):
    def fitting(model, *args, **kwargs):
        kept.append(model)
        return fit(model, *args, **kwargs | dict(show=lines.append))
    kept, lines = [], []
    for _ in range(2): summary, run = train_run(tmp_path, fitting, norm=norm, lr=lr)
    assert summary['status'] == ('diverged' if lr > 1 else 'finished')
    for (name, a), b in zip(kept[0].state_dict().items(), kept[1].state_dict().values(), strict=True): assert torch.equal(a, b), name
    (run.checkpoints/'final.safetensors').unlink()
    train_run(tmp_path, fitting, norm=norm, lr=lr)
    assert 'are not here' in lines[-1] and all(p.isnan().all() for p in kept[2].parameters())

def test_an_interrupted_run_gives_the_weights_of_its_checkpoint(tmp_path):
    def stopping(model, *args, **kwargs):
        kept.append(model)
        return fit(model, *args, **kwargs, watch=watch)
    def watch(run):
        if presses and (run.metrics().get('event') == 'train').any(): signal.raise_signal(presses.pop())
    kept, presses = [], [signal.SIGINT]
    with pytest.raises(Interrupted): train_run(tmp_path, stopping, norm='wn', lr=0.01)
    fresh = copy.deepcopy(kept[0])
    with torch.no_grad():
        for p in fresh.parameters(): p.add_(1)
    run = nwrepro.training.runs.Run(next(tmp_path.glob('wn-*')).name, tmp_path, tmp_path/'checkpoints')
    nwrepro.training.command.load_checkpoint_weights(fresh, run)
    for (name, a), b in zip(fresh.state_dict().items(), kept[0].state_dict().values(), strict=True): assert torch.equal(a, b), name

def test_weights_of_before_are_read(tmp_path):
    "The threshold behind a sum had another name; a record lacks the newest fields"
    model, run = after_fit(tmp_path, 'trelu')
    path = run.checkpoints/'final.safetensors'
    nwrepro.training.loop.write_atomic(path, nwrepro.training.loop.save({name.replace('act2.alpha', 'join.alpha') if name.startswith('layer') else name: value for name, value in load_file(path).items()}))
    config = run.path/'config.json'
    config.write_text(config.read_text().replace('"compile"', '"compiled"'))
    for name, value in trained(run).state_dict().items(): assert torch.equal(value, model.state_dict()[name]), name

# other people's tools

@pytest.mark.parametrize('form', ('readable', 'fast'))
@pytest.mark.parametrize('norm', ALL)
def test_autocast_in_whatever_type_moves_every_parameter(norm, form):
    model = small(norm).float()
    network = fast_form(model) if form == 'fast' else model
    optimizer = optimizer_of(network, model)
    before = copy.deepcopy(network.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast('cpu'): loss = F.cross_entropy(network(X.float()), torch.arange(6) % 3)
        loss.backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []

@pytest.mark.parametrize('norm', WN)
def test_a_gradient_scaler_changes_nothing(norm):
    ends = []
    for scale in (None, 2.**12):
        model = small(norm)
        fast = fast_form(model)
        optimizer, scaler = optimizer_of(fast, model), torch.amp.GradScaler('cpu', init_scale=scale or 1., enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(fast(X), torch.arange(6) % 3)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(fast)
    assert same(ends)

def test_a_scaler_skips_a_step_that_overflows():
    model = small('wn')
    fast = fast_form(model)
    optimizer, scaler, before = optimizer_of(fast, model), torch.amp.GradScaler('cpu', init_scale=2.), copy.deepcopy(fast.state_dict())
    scaler.scale(F.cross_entropy(fast(X), torch.arange(6) % 3)*torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in fast.named_parameters()) and scaler.get_scale() == 1

@pytest.mark.parametrize('average', (lambda net: ModelEmaV2(net, decay=0.5), lambda net: ModelEmaV3(net, decay=0.5), AveragedModel), ids=('v2', 'v3', 'torch'))
@pytest.mark.parametrize('norm', WN)
def test_an_average_is_its_own_reload(norm, average):
    model = small(norm)
    fast = fast_form(model)
    optimizer = optimizer_of(fast, model)
    averages = [average(fast), average(model)]
    for _ in range(3):
        step(fast, optimizer)
        write_back(fast, model, optimizer)
        for mean, net in zip(averages, (fast, model), strict=True): mean.update(net) if hasattr(mean, 'update') else mean.update_parameters(net)
    for mean, net in zip(averages, (fast, model), strict=True):
        assert same([mean.module, reloaded(mean.module)]) and not same([mean.module, net])
        assert same([mean.module, fold(mean.module)])

@pytest.mark.parametrize('norm', WN)
def test_edits_count_at_once(norm):
    model = small(norm)
    with torch.no_grad(): before = model.eval()(X).clone()
    model.layer1[0].conv1.v.data[0] *= -1
    assert not near(model(X), before, 1e-6) and same([model, fold(model), fast_form(model)])
    state = {name: value*1.5 if name.endswith('.v') else value for name, value in model.state_dict().items()}
    assert near(torch.func.functional_call(model.eval(), state, (X,)), model.eval()(X))
    state['layer1.0.conv1.v'] = model.layer1[0].conv1.v.flip(0)
    assert not near(torch.func.functional_call(model.eval(), state, (X,)), model.eval()(X), 1e-6)
    before = model(X)
    prune.random_unstructured(model.layer1[0].conv1, 'v', 0.5)
    assert not near(model(X), before, 1e-6)

@pytest.mark.parametrize('norm', WN)
def test_copies_and_files_of_the_optimizer_go_on_alike(norm):
    model = small(norm)
    fast = fast_form(model)
    optimizer = optimizer_of(fast, model)
    for _ in range(2): step(fast, optimizer)
    pairs = [copy.deepcopy((fast, optimizer)), pickle.loads(pickle.dumps((fast, optimizer)))]
    new = fast_form(small(norm))
    new.load_state_dict(fast.state_dict())
    pairs.append((new, optimizer_of(new, small(norm))))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    pairs[-1][1].load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for pair in (*pairs, (fast, optimizer)): step(*pair), step(*pair)
    for network, _ in pairs:
        for (name, p), q in zip(network.named_parameters(), fast.parameters(), strict=True): assert torch.equal(p, q), name

@pytest.mark.parametrize('form', ('readable', 'fast'))
def test_weights_that_are_assigned_are_trained_by_a_new_optimizer(form):
    model = small('wn')
    network = fast_form(model) if form == 'fast' else model
    optimizer = optimizer_of(network, model)
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    step(network, optimizer)  # as with `torch.optim.SGD`: the old parameters are not those of the network any more
    before = copy.deepcopy(network.state_dict())
    step(network, optimizer_of(network, model))
    assert not [name for name, p in network.named_parameters() if torch.equal(p, before[name])]

@pytest.mark.parametrize('norm', ALL)
def test_traced_and_exported(norm):
    model, x = small(norm, bn_batch=2).float(), X.float()[:2]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        features = create_feature_extractor(model.train(), ['layer1', 'layer4'])(x)
        exported = {name: torch.onnx.export(net, (x,), dynamo=True, verbose=False) for name, net in dict(readable=model.eval(), folded=fold(model)).items()}
    assert features['layer1'].shape[1] == 8 and features['layer4'].shape[1] == 16
    for name, program in exported.items():
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert near(torch.tensor(out), model(x), 1e-4), name

# any sequence of operations

def do_step(s): step(s['fast'], s['optimizer'])
def do_copy(s): s['fast'], s['optimizer'] = copy.deepcopy((s['fast'], s['optimizer']))
def do_save_and_load(s):
    new = fast_form(s['model'], keep=wn_layers(s['fast']))
    new.load_state_dict(s['fast'].state_dict())
    optimizer = optimizer_of(new, s['model'])
    optimizer.load_state_dict(copy.deepcopy(s['optimizer'].state_dict()))
    s.update(fast=new, optimizer=optimizer)
def do_layout(s):
    s['last'] = not s['last']
    s['fast'].to(memory_format=torch.channels_last if s['last'] else torch.contiguous_format)
def do_write_back(s):
    write_back(s['fast'], s['model'], s['optimizer'])
    s['fast'] = fast_form(s['model'], keep=wn_layers(s['fast']))
    s['optimizer'] = optimizer_of(s['fast'], s['model'])
def do_freeze(s):
    for group in s['optimizer'].param_groups: group['train_g'] = not group['train_g']
@torch.no_grad()
def do_edit(s): s['fast'].layer1[0].conv1.weight[0].mul_(-1.5)
@torch.no_grad()
def do_zero(s): s['fast'].layer2[0].conv1.weight[1].zero_()
def do_average(s):
    mean = AveragedModel(s['fast'])
    do_step(s)
    mean.update_parameters(s['fast']), mean.update_parameters(s['fast'])
    s['fast'].load_state_dict(mean.module.state_dict())
def do_adamw(s): step(s['fast'], torch.optim.AdamW(s['fast'].parameters(), lr=1e-3))

ANY, FREE = (do_step, do_copy, do_save_and_load, do_layout, do_write_back, do_freeze), (do_edit, do_zero, do_average, do_adamw)

@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(('wn', 'np', 'trelu')).flatmap(lambda norm: st.tuples(st.just(norm), st.lists(st.sampled_from(ANY if norm == 'trelu' else ANY+FREE), min_size=3, max_size=7))))
def test_network_reload_and_fold_agree_whatever_was_done(drawn):
    "A strict filter's norm is 1 again after the next step or write-back, so edits of its norm are left to the other schemes"
    norm, operations = drawn
    model = small(norm)
    fast = fast_form(model)
    s = dict(model=model, fast=fast, optimizer=optimizer_of(fast, model), last=False)
    for operation in operations:
        operation(s)
        network = copy.deepcopy(model)
        write_back(s['fast'], network, s['optimizer'])
        assert same([s['fast'], network, reloaded(network), reloaded(s['fast']), fold(network)]), operation
        assert all(p.isfinite().all() for p in s['fast'].parameters())

def test_a_strict_filter_is_projected():
    model = small('trelu')
    fast = fast_form(model)
    optimizer = optimizer_of(fast, model)
    with torch.no_grad(): fast.layer1[0].conv1.weight.mul_(3)
    network = copy.deepcopy(model)
    write_back(fast, network, optimizer)
    assert same([network, model])
    step(fast, optimizer)
    assert near(nwrepro.methods.fast.filter_norms(fast.layer1[0].conv1.weight), torch.ones(8).double())
    with torch.no_grad(): fast.layer1[0].conv1.weight[2].zero_()
    with pytest.raises(ValueError, match=r'layer1.0.conv1: filters \[2\] are zero, and a strict layer has filters of norm 1'): write_back(fast, network, optimizer)

# kernels

def both_forms(norm, dtype=torch.float32, arch='resnet26'):
    torch.manual_seed(0)
    model = convert(timm.create_model(arch, num_classes=10), norm, init='even' if norm == 'trelu' else None).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.02*torch.randn_like(p))
    return fast_form(model), fast_form(model, kernels=True), model

@pytest.mark.parametrize('norm, dtype', [('np', torch.float64), ('trelu', torch.float64), *(pytest.param(norm, torch.float32, marks=pytest.mark.slow) for norm in ('np', 'trelu'))], ids=str)
def test_fused_kernels_compute_the_same(norm, dtype):
    "Outputs, gradients of the images and of every parameter, and the compiled step"
    plain, fused, model = both_forms(norm, dtype)
    x, y = torch.randn(4, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last), torch.arange(4)
    found, limit = [], {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]
    for network, compile in ((plain, False), (fused, True)):
        images = x.clone().requires_grad_()
        loss = F.cross_entropy(network(images), y)
        loss.backward()
        grads = {name: p.grad for name, p in network.named_parameters()} | dict(images=images.grad)
        optimizer = optimizer_of(network, model, compile=compile)
        optimizer.step()
        found.append((loss.detach(), grads, {name: p.detach().clone() for name, p in network.named_parameters()}))
    (loss, grads, params), (loss2, grads2, params2) = found
    assert type(fused.act1).__name__.startswith('Fused') and near(loss2, loss, limit) and grads.keys() == grads2.keys()
    for name in grads: assert (grads2[name]-grads[name]).norm() <= limit*grads[name].norm(), name
    for name in params: assert near(params2[name], params[name], limit), name

@pytest.mark.parametrize('norm', ('np', 'trelu'))
def test_fused_kernels_lose_no_more_in_half_precision(norm):
    "Gradients under autocast, those of the readable activations and the fused ones, against float64"
    plain, fused, model = both_forms(norm)
    x, found = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last), []
    for network, half in ((fast_form(model).double(), False), (plain, True), (fused, True)):
        with torch.autocast('cpu', torch.bfloat16, enabled=half): loss = F.cross_entropy(network(x.to(torch.float32 if half else torch.float64)).double(), torch.arange(4))
        loss.backward()
        found.append({name: p.grad.double() for name, p in network.named_parameters()})
    exact, errors = found[0], [{name: ((grads[name]-g).norm()/g.norm()).item() for name, g in found[0].items()} for grads in found[1:]]
    for name in exact: assert errors[1][name] <= 0.05+2*errors[0][name], name
    assert sum(errors[1].values()) <= 1.2*sum(errors[0].values())

@pytest.mark.slow
@pytest.mark.parametrize('norm, half', [('wn', False), ('np', False), *((norm, True) for norm in WN)], ids=str)
def test_as_little_is_kept_as_without_normalization(norm, half):
    "In float32 `trelu` keeps the filters that it has multiplied by their weight in the sum"
    x, nets = torch.randn(8, 3, 64, 64), {n: fast_form(convert(timm.create_model('resnet50', num_classes=10), n), kernels=True) for n in ('none', norm)}
    def forward(net):
        with torch.autocast('cpu', torch.bfloat16, enabled=half): net(x)
    kept = {n: kept_bytes(net, lambda: forward(net)) for n, net in nets.items()}
    assert kept[norm] <= 1.01*kept['none']

def test_slots_of_other_schemes_are_left_alone():
    model = small('trelu')
    model.layer1[0].conv2 = nn.Sequential(model.layer1[0].conv2)
    fast = fast_form(model)
    fuse_activations(fast)
    assert [type(block[0]).__name__ for block in (fast.layer1, fast.layer2)] == ['JoinBlock', 'FusedTReLUBlock']

# what a recipe says is what is trained

EXPECTED = {'paper': dict(decays='all', zero=False, warmup=1, shape=lambda t: (1-t)**2), 'modern': dict(decays='v+w', zero=True, warmup=5, shape=lambda t: 0.5*(1+math.cos(math.pi*t)))}

@pytest.mark.parametrize('precision', ('fp32', 'bf16'))
@pytest.mark.parametrize('norm', ALL)
@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_wired_to_all_it_names(name, norm, precision):
    "Learning rate at five steps, which roles decay, what zero_init does to the first output, and that every parameter moves"
    wanted = EXPECTED[name]
    given = dict(recipe=name, norm=norm, precision=precision, arch='resnet18', image_size=32, batch_size=10, bn_batch=10, epochs=200 if name == 'paper' else 100, train_images=100, lr=0.01)
    recipe = make_recipe(given, digits)
    assert (recipe.zero_init, recipe.decay_on, recipe.precision) == (wanted['zero'], wanted['decays'], precision)
    model = make_model(recipe, 10)
    views = nwrepro.training.build.make_views(recipe, digits)
    layers = {name: model.get_submodule(name) for name in wn_layers(model)}
    training = start_training(model, recipe, views, None, keep=[name for name, m in layers.items() if m.g is not None and (m.g == 0).any()])
    engine = training.engine
    batches, warmup = views.batches, wanted['warmup']
    at = [0, warmup*batches, int(0.1*recipe.epochs*batches), recipe.epochs*batches//2, int(0.9*recipe.epochs*batches)]
    seen = []
    for k in at:
        engine.schedule.step_update(k)
        seen.append({group['lr'] for group in engine.optimizer.param_groups})
    assert all(len(lrs) == 1 for lrs in seen)
    lrs = [lrs.pop()/recipe.lr for lrs in seen]
    assert lrs[0] == pytest.approx(1/(warmup*batches)) and lrs[1:] == pytest.approx([wanted['shape'](k/(recipe.epochs*batches)) for k in at[1:]], abs=1e-3)
    roles, decays = parameter_roles(model), {}
    plain = {id(w): layer for w, layer in plain_weights(engine.fast, model).values()}
    names = {id(p): k for k, p in engine.fast.named_parameters()}
    for group in engine.optimizer.param_groups:
        for p in group['params']:
            if id(p) in plain:
                assert group['weight_norm'] == ('strict' if plain[id(p)].g is None else 'affine')
                decays.setdefault('v', set()).add(group['weight_decay_v'])
                if plain[id(p)].g is not None: decays.setdefault('g', set()).add(group['weight_decay_g'])
            else: decays.setdefault(roles[names[id(p)]], set()).add(group['weight_decay'])
    assert decays == {role: {recipe.weight_decay if wanted['decays'] == 'all' or role in ('v', 'w') else 0.} for role in set(roles.values())}
    x = torch.randn(10, 3, 32, 32)
    with torch.no_grad():
        block = model.eval().layer1[0]
        inside = torch.rand(2, 64, 8, 8)
        is_shortcut = near(block(inside), inside, 1e-5)
    assert is_shortcut == (norm == 'trelu' or wanted['zero'] and norm != 'np')
    before = {k: p.detach().clone() for k, p in engine.fast.named_parameters()}
    for k in range(4):
        training.progress.step = warmup*batches+k
        assert train_step(training, x, torch.arange(10)) is None
    assert [k for k, p in engine.fast.named_parameters() if torch.equal(p, before[k])] == []
