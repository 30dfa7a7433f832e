"Small networks and later methods: every scheme on each, what the names of records and tuned learning rates depend on, and batch statistics under any name"
import csv
import numpy, pytest, torch
import torch.nn.functional as F
from conftest import FIVE, ROOT
from torch import nn
from nwrepro.training.sources import load_source
from nwrepro.training.pipeline import pipelines
from nwrepro.methods.fast import fast_form
from nwrepro.methods.later import MeanOnlyBatchNorm2d, SCHEMES
from nwrepro.methods.layers import GhostBatchNorm2d, filter_norms
from nwrepro.methods.networks import scale_channels, stock_network
from nwrepro.training.distributed import micro_batch_size, running_stats_share, running_stats, layers_with_running_stats
from nwrepro.training.recipe import SETTINGS, make_recipe, scheme_facts
from nwrepro.training.records import records
from nwrepro.training.runs import run_name
from nwrepro.methods.deploy import fold, to_timm
from nwrepro.methods.schemes import Scheme, convert, parameter_roles, uses_batch_statistics
from nwrepro.training.command import main
from nwrepro.training.build import make_model, make_optimizer
from nwrepro.training.lifecycle import recipe_of

LATER = ('gn', 'gn_ws', 'wn_mbn', 'skipinit', 'nf', 'dyt')
ALL = FIVE+LATER
NETWORKS = dict(resnet18=('resnet18', 10, 'cifar', 0.25), cifar10_nv=('cifar10_nv', 10, 'imagenet', 0.5))
digits = load_source('digits')

def network(arch, norm, init=None, **kwargs):
    torch.manual_seed(0)
    return convert(stock_network(*NETWORKS[arch]), norm, init, torch.randn(16, 3, 28, 28), **kwargs)

def switched_on(model):
    "What starts at 0 on purpose, at another value"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(('.u', '.scale', '.gain')): p.fill_(0.7)
    return model

def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()

@pytest.mark.parametrize('norm', ALL)
@pytest.mark.parametrize('arch', NETWORKS)
def test_every_scheme_on_every_small_network(arch, norm):
    model, x = switched_on(network(arch, norm)), torch.randn(8, 3, 28, 28)
    logits = model.train()(x)
    assert logits.shape == (8, 10) and logits.isfinite().all()
    F.cross_entropy(logits, torch.arange(8)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    dead = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert dead == []
    model = model.double().eval()
    x = x.double()
    with torch.no_grad():
        assert error(fast_form(model)(x), model(x)) < 1e-10
        if norm in ('gn', 'gn_ws'):
            with pytest.raises(ValueError, match='^GroupNorm depends on its input'): fold(model)
        else: assert error(fold(model)(x), model(x)) < 1e-10
    with pytest.raises(ValueError, match=r'use fold\(model\)'): to_timm(model)
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}

@pytest.mark.parametrize('norm', ALL)
def test_sites_and_biases_of_the_shallow_network(norm):
    model = network('cifar10_nv', norm)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    biases = [m.bias is not None for m in convs]
    stock = [True, True, False, True, True, False, True, True, True]
    assert biases == {'trelu': [False]*8+[True]}.get(norm, stock if norm in ('bn', 'gn', 'gn_ws', 'wn_mbn', 'dyt') else [True]*9)
    empty = type(model.bn3) is type(model.bn6) is nn.Identity
    assert empty == (norm in ('none', 'wn', 'np', 'trelu', 'skipinit', 'nf'))

def test_width_scales_every_channel():
    for width in (0.1, 0.25, 0.5, 2):
        full, other = (stock_network('resnet50', 7, width=w) for w in (1, width))
        for a, b in zip(full.modules(), other.modules(), strict=True):
            if isinstance(a, nn.Conv2d): assert (b.out_channels, b.in_channels) == (scale_channels(a.out_channels, width), 3 if a.in_channels == 3 else scale_channels(a.in_channels, width)) and b.out_channels % 8 == 0
        assert other(torch.randn(1, 3, 64, 64)).shape == (1, 7)

def test_full_width_draws_the_numbers_of_timm():
    import timm
    torch.manual_seed(3)
    ours = stock_network('resnet18', 10)
    torch.manual_seed(3)
    for a, b in zip(ours.parameters(), timm.create_model('resnet18', num_classes=10).parameters(), strict=True): assert a.equal(b)

@pytest.mark.parametrize('norm', ('none', 'wn'))
def test_norm_preserving_gains_without_residual_blocks(norm):
    model = network('cifar10_nv', norm, 'norm_preserving')
    for k in range(1, 10):
        layer = model.get_submodule(f'conv{k}')
        norms = filter_norms(layer.w if norm == 'wn' else layer.weight)
        wanted = 3**-0.5 if k == 9 else (2*layer.in_channels/layer.out_channels)**0.5
        torch.testing.assert_close(norms, torch.full_like(norms, wanted))

def test_the_shallow_network_sees_crops_of_28_pixels():
    recipe = make_recipe(dict(arch='cifar10_nv', norm='bn'), digits)
    assert (recipe.image_size, recipe.init) == (28, 'keep')
    assert make_recipe(dict(arch='cifar10_nv', norm='wn', image_size=32), digits).image_size == 32
    model = make_model(recipe, 10)
    assert abs(filter_norms(model.conv1.weight).mean()-1) < 0.1 and not model.conv1.bias.any()
    pipeline = pipelines(digits, 28, 'period')
    image = digits.train.load(0).resize((32, 32))
    prepared = pipeline.prepare(image)
    assert tuple(prepared.shape) == (3, 32, 32) and numpy.array_equal(prepared.permute(1, 2, 0), numpy.asarray(image))
    whole = pipelines(digits, 32, 'period').centre(prepared)
    assert pipeline.centre(prepared).equal(whole[:, 2:30, 2:30]) and pipeline.augment(prepared).shape == (3, 28, 28)

# names of records, and what a tuned learning rate holds for

def committed(): return [record for folder in sorted((ROOT/'reports').iterdir()) if folder.is_dir() and folder.name != 'runs' for record in records(folder)]

def test_records_of_before_keep_their_names():
    found = committed()
    known = {field for field in vars(make_recipe({}, digits))}
    assert len(found) > 400
    for record in found:
        recipe, config = recipe_of(record), record.config
        if 'stem' not in config: assert (recipe.stem, recipe.width) == ('imagenet', 1)
        assert run_name(dict(stem='imagenet', width=1.) | {k: v for k, v in config.items() if k in known}) == record.name

def test_another_stem_or_width_is_another_run():
    names = {run_name(vars(make_recipe(given, digits))) for given in ({}, dict(stem='cifar'), dict(width=0.5), dict(width=0.5, stem='cifar'))}
    assert len(names) == 4 and run_name(vars(make_recipe(dict(width=1, stem='imagenet'), digits))) in names

def test_a_tuned_learning_rate_holds_for_stem_width_decay_precision_and_length(tmp_path, monkeypatch):
    (tmp_path/'reports').mkdir()
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    table = tmp_path/'reports/tuned_lr.csv'
    table.write_text('data,arch,image_size,recipe,norm,init,zero_init,batch_size,epochs,lr\ndigits,resnet18,32,paper,bn,torch,False,32,10,0.03\n')
    def rate(**given): return make_recipe(dict(norm='bn', arch='resnet18', lr='tuned', epochs=30) | given, digits).lr
    assert rate() == rate(epochs=10) == rate(weight_decay=1e-4, precision='fp32', width=1, stem='imagenet') == 0.03
    for other in (dict(stem='cifar'), dict(width=0.5), dict(weight_decay=0), dict(precision='bf16'), dict(epochs=20)):
        with pytest.raises(ValueError, match='^lr = tuned finds no row'): rate(**other)
    table.write_text('data,arch,image_size,recipe,norm,init,zero_init,batch_size,stem,width,weight_decay,precision,epochs,lr\ndigits,resnet18,32,paper,bn,torch,False,32,cifar,0.5,0.0,bf16,10,0.07\n')
    assert rate(stem='cifar', width=0.5, weight_decay=0, precision='bf16') == 0.07

def test_the_committed_learning_rates_hold_for_what_their_runs_were():
    configs = {record.name: record.config for record in committed()}
    rows = list(csv.DictReader((ROOT/'reports/tuned_lr.csv').open()))
    for row in rows:
        for run in row['runs'].split():
            assert {k: str((dict(stem='imagenet', width=1.) | configs[run])[k]) for k in ('stem', 'width', 'weight_decay', 'precision', 'epochs')}.items() <= row.items()

@pytest.mark.parametrize('norm', LATER)
def test_default_learning_rates_of_later_methods_are_the_best_that_were_tried(norm):
    tried = [(record.summary['top1'], record.config['lr']) for record in committed() if record.config['norm'] == norm and record.config['data'] == 'cifar10-jpeg']
    assert tried and max(tried)[1] == SETTINGS['cifar10']['lr'][norm]

# batch statistics, whatever the scheme is called

class Nameless(GhostBatchNorm2d): pass
OTHERS = dict(bn2=Scheme(source='of a file'), mine=Scheme(norm=lambda bn: Nameless(bn.num_features), source='of a file'), wn_mbn=SCHEMES['wn_mbn'])
SMALL = dict(data='digits', arch='resnet18', train_images=100, epochs=1, warmup_epochs=0, image_size=16, batch_size=20, lr=0.01, max_steps=1)

@pytest.mark.parametrize('norm', OTHERS)
def test_batch_statistics_are_found_under_any_name(norm, monkeypatch):
    monkeypatch.setitem(SCHEMES, norm, OTHERS[norm])
    model = network('resnet18', norm, bn_batch=5)
    assert uses_batch_statistics(model) and {m.bn_batch for m in model.modules() if hasattr(m, 'bn_batch')} == {5}
    with pytest.raises(ValueError, match='batch_size = 20 is not a multiple of bn_batch = 7'): make_recipe(SMALL | dict(norm=norm, bn_batch=7), digits)
    recipe = make_recipe(SMALL | dict(norm=norm, bn_batch=10), digits)
    assert scheme_facts(recipe).batch_statistics
    with pytest.raises(ValueError, match='micro_batch = 5 does not divide the 20 images of a process in groups of bn_batch = 10'): micro_batch_size(recipe, 1, 5, True)
    assert micro_batch_size(recipe, 1, 5, False) == 5
    model.train()
    x = torch.randn(20, 3, 16, 16)
    model(x)
    assert {m.num_batches_tracked.item() for m in layers_with_running_stats(model)} == {4}

def test_a_batch_that_cannot_be_divided_is_refused_for_mean_only_statistics(tmp_path, monkeypatch, capsys):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    words = [word for k, v in (SMALL | dict(norm='wn_mbn', bn_batch=10, micro_batch=5)).items() for word in (f'--{k}', str(v))]
    assert main(words) == 2 and 'in groups of bn_batch = 10 that keep their statistics' in capsys.readouterr().out
    assert not (tmp_path/'reports').exists()

def test_plain_batch_normalization_is_refused_where_the_statistics_batch_counts(monkeypatch):
    monkeypatch.setitem(SCHEMES, 'mine', Scheme(norm=lambda bn: nn.BatchNorm2d(bn.num_features), source='of a file'))
    with pytest.raises(ValueError, match=r'^BatchNorm2d \(bn1\) takes its statistics from the whole batch, whatever bn_batch says: use GhostBatchNorm2d'): make_recipe(SMALL | dict(norm='mine'), digits)

def test_a_redefined_scheme_is_asked_anew(monkeypatch):
    monkeypatch.setitem(SCHEMES, 'mine', Scheme(source='of a file'))
    recipe = make_recipe(SMALL | dict(norm='mine'), digits)
    assert scheme_facts(recipe).batch_statistics
    monkeypatch.setitem(SCHEMES, 'mine', SCHEMES['none'])
    assert not scheme_facts(recipe).batch_statistics

@pytest.mark.parametrize('norm', ('gn_ws', 'nf', 'wn_mbn', 'skipinit'))
def test_kept_weights_are_those_of_the_stock_network(norm):
    stock = stock_network(*NETWORKS['resnet18'])
    model = convert(stock, norm, 'keep')
    for name, conv in stock.named_modules():
        if not isinstance(conv, nn.Conv2d): continue
        layer = model.get_submodule(name)
        assert (layer.v if norm == 'wn_mbn' else layer.weight).equal(conv.weight) and not (layer.bias is not None and layer.bias.any())

def test_mean_only_statistics_in_evaluation():
    layer, x = MeanOnlyBatchNorm2d(2), torch.randn(4, 2, 3, 3)
    layer.running_mean.copy_(torch.tensor([1., -2.]))
    with torch.no_grad(): layer.bias.copy_(torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(layer.eval()(x), x+torch.tensor([-0.5, 2.25])[:,None,None])

def test_running_means_of_processes_are_those_of_one():
    torch.manual_seed(0)
    x = torch.randn(32, 3, 4, 4, dtype=torch.float64)+1
    def layer_after(images):
        layers = [MeanOnlyBatchNorm2d(3, bn_batch=8).double(), GhostBatchNorm2d(3, bn_batch=8, momentum=0.3).double()]
        layers[0].running_mean.fill_(0.5)
        before = torch.cat(running_stats(layers))
        for layer in layers: layer(images)
        return before, torch.cat(running_stats(layers))
    before, alone = layer_after(x)
    keep = torch.tensor([0.9]*3+[0.7]*6, dtype=torch.float64)**2
    summed = sum(running_stats_share(before, layer_after(half)[1], keep, p, 2) for p, half in enumerate(x.chunk(2)))
    torch.testing.assert_close(summed, alone, rtol=1e-12, atol=1e-12)

# roles and bad values

@pytest.mark.parametrize('norm, role', [('wn', 'g'), ('nf', 'gain'), ('skipinit', 'scale'), ('dyt', 'gamma'), ('gn', 'gamma'), ('wn_mbn', 'g')])
def test_decay_on_one_role_changes_that_role_alone(norm, role):
    recipe = make_recipe(dict(norm=norm, arch='resnet18', width=0.25, lr=0.1, weight_decay=0.1, decay_on=role), digits)
    model = switched_on(network('resnet18', norm))
    fast = fast_form(model)
    optimizer = make_optimizer(fast, model, recipe)
    for p in fast.parameters(): p.grad = torch.zeros_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.step()
    from nwrepro.methods.fast import write_back
    write_back(fast, model, optimizer)
    roles = parameter_roles(model)
    moved = {roles[k] for k, v in model.state_dict().items() if k in roles and not torch.allclose(v, before[k], rtol=1e-5, atol=0)}
    assert moved == {role}

@pytest.mark.parametrize('given, sentence', [
    (dict(width=0), 'width = 0 is not accepted: expected factor on all channels'), (dict(width=-1), 'width = -1'), (dict(width='wide'), 'width = wide'), (dict(stem='foo'), 'stem = foo is not accepted: expected first layers of a ResNet: imagenet'),
    (dict(arch='cifar10_nv', stem='cifar'), 'stem = cifar is for ResNets'), (dict(norm='gn'), "norm 'gn' has no default learning rate on digits: give lr"), (dict(arch='cifar10'), "unknown arch 'cifar10': did you mean 'cifar10_nv'"),
    (dict(norm='nf', lr=0.1, decay_on='gian'), "unknown decay_on 'gian': did you mean 'gain'"), (dict(norm='dyt', lr=0.1, init='data'), "unknown init for norm 'dyt' 'data': accepted: torch, keep")], ids=str)
def test_bad_values_are_one_sentence(given, sentence):
    with pytest.raises(ValueError) as wrong: make_recipe(given, digits)
    assert sentence in str(wrong.value) and '\n' not in str(wrong.value)

def test_a_network_without_slots_or_with_unknown_layers_is_refused_by_name():
    with pytest.raises(ValueError, match=r'^surgery does not know the layer Tanh \(1\) of Sequential: it knows Conv2d, '): convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), 'wn')
    with pytest.raises(ValueError, match="has no nn.BatchNorm2d, so that norm 'gn' has no slot"): convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 'gn')
    with pytest.raises(ValueError, match='nothing to convert'): convert(nn.Sequential(nn.ReLU()), 'wn')
    with pytest.raises(ValueError, match=r'GhostBatchNorm2d \(2\) does not directly follow a convolution'):
        fold(convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), 'bn'))
