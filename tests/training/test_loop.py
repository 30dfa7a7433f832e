"The loop: cut and resumed, run twice, diverging, and what it answers to bad input"
import json, math, os, signal, subprocess, sys
import nbformat, pytest, torch
import nwrepro.training.command
from conftest import FIVE, ROOT
from safetensors.torch import load_file
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from nwrepro.training.sources import load_source
from nwrepro.training.loader import loader
from nwrepro.training.recipe import RULES, check_parameters, make_recipe, notebook_parameters
from nwrepro.training.records import load_runs
from nwrepro.training.runs import read_metrics
from nwrepro.training.checkpoint import LOCKS, Interrupted, StopSignal
from nwrepro.experiments.grid import count_evaluations
from nwrepro.training.build import first_images, make_model, make_views
from nwrepro.training.command import first_error, main
from nwrepro.training.engine import readable_copy, start_training
from nwrepro.training.evaluation import evaluate, probe
from nwrepro.training.lifecycle import begin_run, trained
from nwrepro.training.loop import fit, forward_backward, is_log_step, mixup, seed_step, train_step

SMALL = dict(data='digits', arch='resnet18', train_images=100, epochs=2, warmup_epochs=0, image_size=16, batch_size=20, bn_batch=10, dropout=0.2)
digits = load_source('digits')

def train(folder, fit=fit, **given):
    given = SMALL | given
    recipe = make_recipe(given, digits)
    run = begin_run(recipe, digits, given, folder)
    views = make_views(recipe, digits)
    model = make_model(recipe, 10, first_images(views.train_eval, 64) if recipe.init == 'data' else None)
    return fit(model, views, recipe, run, show=lambda line: None, **{k: given[k] for k in ('checkpoint_steps', 'eval_every') if k in given}), run

def weights(run): return load_file(run.checkpoints/'final.safetensors')

def stripped(run):
    "Metrics without the history of the record"
    return [line for line in read_metrics(run.path/'metrics.jsonl') if line['event'] != 'resume']

class Cut(Exception): pass

def cut_after(steps):
    "A `fit` that dies, as by a full disk, after so many steps"
    def dying(model, views, recipe, run, **kwargs):
        log = run.log
        def tearing(event, step, epoch, **values):
            if event == 'train' and step > steps: raise Cut
            log(event, step, epoch, **values)
        run.log = tearing
        return fit(model, views, recipe, run, **kwargs)
    return dying

@pytest.mark.parametrize('norm, every', [*((norm, 3) for norm in FIVE), ('wn', 5)])  # 5: at an evaluation, which is done once more
def test_a_cut_run_ends_as_one_that_was_not_cut(norm, every, tmp_path):
    summary, whole = train(tmp_path/'whole', norm=norm, lr=0.01)
    assert (summary['status'], summary['steps']) == ('finished', 10)
    with pytest.raises(Cut): train(tmp_path/'cut', cut_after(7), norm=norm, lr=0.01, checkpoint_steps=every)
    again, cut = train(tmp_path/'cut', norm=norm, lr=0.01, checkpoint_steps=every)
    resumed = cut.metrics().query('event == "resume"')['step'].tolist()
    assert resumed == [7//every*every]
    for name, value in weights(whole).items():
        assert value.isfinite().all() and value.equal(weights(cut)[name]), name
    assert str(stripped(cut)) == str(stripped(whole))
    different = ('img_per_s', 'wall_s')
    assert {k: v for k, v in again.items() if k not in different} == {k: v for k, v in summary.items() if k not in different}
    assert not list(cut.checkpoints.glob('step-*'))

def test_a_run_is_watched_after_each_line_of_its_record(tmp_path):
    seen = []
    def watched(*args, **kwargs): return fit(*args, **kwargs, watch=lambda run: seen.append(run.metrics()['step'].iloc[-1]))
    _, run = train(tmp_path, watched, norm='wn', lr=0.01)
    assert seen == run.metrics().query('event in ("train", "eval")')['step'].tolist() and len(seen) > 5

def test_an_interrupt_saves_the_step_and_says_how_to_go_on(tmp_path):
    presses = [signal.SIGINT]
    def watch(run):
        if presses: signal.raise_signal(presses.pop())
    def interrupted(*args, **kwargs): return fit(*args, **kwargs, watch=watch)
    with pytest.raises(KeyboardInterrupt, match='to go on: `papermill'): train(tmp_path, interrupted, norm='wn', lr=0.01)
    assert load_runs(tmp_path)['status'].tolist() == ['interrupted'] and load_runs(tmp_path)['steps'].max() < 10
    summary, run = train(tmp_path, norm='wn', lr=0.01)
    assert summary['status'] == 'finished' and summary['steps'] == 10
    _, whole = train(tmp_path/'whole', norm='wn', lr=0.01)
    for name, value in weights(whole).items(): assert value.equal(weights(run)[name]), name

@pytest.mark.parametrize('numbers, code', [([signal.SIGTERM, signal.SIGTERM], 75), ([signal.SIGINT], 75), ([signal.SIGINT, signal.SIGINT], 130)])
def test_exit_codes_tell_whether_the_step_is_saved(numbers, code, tmp_path, monkeypatch):
    "A scheduler that asks twice is not impatient"
    coming = iter(numbers)
    def watch(run):
        for number in coming: signal.raise_signal(number)
    def interrupted(*args, **kwargs): return fit(*args, **kwargs | dict(watch=watch))
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nwrepro.training.command, 'fit', interrupted)
    assert main([word for k, v in (SMALL | dict(norm='wn', lr=0.01)).items() for word in (f'--{k}', str(v))]) == code
    assert load_runs(tmp_path/'reports/runs')['status'].tolist() == ['interrupted' if code == 75 else 'started']

def test_an_impatient_interrupt_stops_at_once_and_saves_nothing(tmp_path):
    def watch(run):
        for _ in range(2): signal.raise_signal(signal.SIGINT)
    def interrupted(*args, **kwargs): return fit(*args, **kwargs, watch=watch)
    with pytest.raises(KeyboardInterrupt, match='nothing was saved'): train(tmp_path, interrupted, norm='wn', lr=0.01)
    assert load_runs(tmp_path)['status'].tolist() == ['started'] and not LOCKS
    assert train(tmp_path, norm='wn', lr=0.01)[0]['status'] == 'finished'

def test_a_diverged_run_is_a_result_with_a_record(tmp_path):
    summary, run = train(tmp_path, norm='none', lr=1e4)
    assert (summary['status'], run.status) == ('diverged', 'diverged')
    assert summary['diverged_step'] >= 1 and summary['diverged_lr'] > 0 and math.isfinite(summary['last_finite_loss'])
    assert summary['first_nonfinite'] in dict(make_model(make_recipe(SMALL | dict(norm='none'), digits), 10).named_modules()) or summary['first_nonfinite'] is None
    assert str(train(tmp_path, norm='none', lr=1e4)[0]) == str(summary)  # text, since nan is not equal to itself

def test_fresh_starts_over_and_keeps_the_old_run(tmp_path):
    first, run = train(tmp_path, norm='wn', max_steps=2)
    second, _ = train(tmp_path, norm='wn', max_steps=2, fresh=True)
    old = run.path.with_name(run.path.name+'.old-1')
    assert json.loads((old/'summary.json').read_text())['wall_s'] == first['wall_s'] != second['wall_s']

@pytest.mark.parametrize('precision', ('fp32', 'bf16', 'fp64'))
def test_precisions_train(precision, tmp_path):
    # 32 px: in bf16, torch's CPU convolution of stride 2 on a 1x1 map returns uninitialised gradients; few images, since a CPU without bf16 takes minutes for all of val
    summary, run = train(tmp_path, norm='wn', lr=0.01, precision=precision, max_steps=3, image_size=32, train_images=75, holdout=0.2)
    assert summary['status'] == 'finished'
    assert weights(run)['conv1.v'].dtype == (torch.float64 if precision == 'fp64' else torch.float32)

def test_predictions_give_the_reported_accuracy(tmp_path):
    summary, run = train(tmp_path, norm='bn', lr=0.05)
    lines = (run.path/'predictions.csv').read_text().splitlines()
    assert lines[0] == 'image,label,prediction' and [int(line.split(',')[0]) for line in lines[1:]] == list(range(360))
    assert [int(line.split(',')[1]) for line in lines[1:]] == list(digits.val.labels)
    right = sum(line.split(',')[1] == line.split(',')[2] for line in lines[1:])
    assert 100*right/360 == pytest.approx(summary['top1'])

@pytest.mark.parametrize('given', [dict(norm='wn'), dict(norm='wn', init='data', precision='fp64'), dict(norm='bn', zero_init=True, strides='v1.5'), dict(norm='trelu', init='even')], ids=str)
def test_a_trained_network_says_what_its_run_recorded(given, tmp_path):
    _, run = train(tmp_path, max_steps=3, **given)
    network, recipe = trained(run), make_recipe(SMALL | given, digits)
    x = first_images(make_views(recipe, digits).val, 360).to(next(network.parameters()).dtype)
    said = [int(line.split(',')[2]) for line in (run.path/'predictions.csv').read_text().splitlines()[1:]]
    with torch.no_grad(): assert network(x).argmax(1).tolist() == said
    (run.checkpoints/'final.safetensors').unlink()
    with pytest.raises(ValueError, match=f'^run {run.name} has no weights here: they are expected at .*final.safetensors; copy them'): trained(run)

@pytest.mark.parametrize('every, epochs', [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 1, 2, 3, 6, 7]), (9, [0, 1, 2, 3, 4, 5, 6, 7])])
def test_epochs_that_are_evaluated(every, epochs, tmp_path):
    _, run = train(tmp_path, epochs=7, train_images=20, max_steps=None, eval_every=every)
    events = run.metrics()
    for event in ('eval', 'probe'): assert events[events['event'] == event]['epoch'].tolist() == epochs
    assert count_evaluations(7, 1, every) == len(epochs)

@pytest.mark.parametrize('batches, epochs, lines', [(31, 60, 8), (31, 1, 20), (5, 8, 5), (5005, 120, 4), (1, 9, 1), (40, 9999, 1)])
def test_a_run_is_recorded_now_and_then_and_at_the_end_of_each_epoch(batches, epochs, lines):
    for epoch in (0, 1):
        places = [place for place in range(1, batches+1) if is_log_step(epoch*batches+place, batches, epochs)]
        assert len(places) == lines and places[-1] == batches

def test_evaluation_agrees_with_a_plain_loop(tmp_path):
    recipe = make_recipe(SMALL, digits)
    views = make_views(recipe, digits)
    engine = start_training(make_model(recipe, 10), recipe, views, None).engine
    result, rows = evaluate(engine, readable_copy(engine), views.val, StopSignal())
    x = first_images(views.val, 360)
    with torch.no_grad(): logits = engine.model.eval()(x)
    y = torch.tensor(digits.val.labels)
    assert result['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-4)
    top5 = (logits.topk(5).indices == y[:,None]).any(1).float().mean().item()
    assert (result['top1'], result['top5']) == pytest.approx((100*(logits.argmax(1) == y).float().mean().item(), 100*top5))
    assert [p for _, _, p in rows] == logits.argmax(1).tolist()

def test_a_probe_gives_the_angle_of_a_step():
    recipe = make_recipe(SMALL | dict(norm='wn', lr=0.01), digits)
    engine = start_training(make_model(recipe, 10), recipe, make_views(recipe, digits), None).engine
    norm = engine.model.conv1.v.flatten(1).norm(dim=1).mean().item()
    assert probe(engine, readable_copy(engine))['angular_lr'][0] == pytest.approx(engine.optimizer.param_groups[0]['lr']/norm**2, rel=1e-3)

def test_dropout_and_label_smoothing_reach_the_loss():
    recipe = make_recipe(SMALL | dict(norm='wn', recipe='modern', precision='fp32', dropout=0.), digits)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    engine = start_training(make_model(recipe, 10), recipe, make_views(recipe, digits), None).engine
    loss, *_ = forward_backward(engine, 0, x, y)
    with torch.no_grad(): logits = engine.fast.train()(x)
    assert recipe.label_smoothing == 0.1 and loss == pytest.approx(4*torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1).item(), rel=1e-5)
    dropping = make_model(make_recipe(SMALL | dict(norm='wn', dropout=0.5), digits), 10).train()
    assert engine.model(x).equal(engine.model(x)) and not dropping(x).equal(dropping(x))

def test_frozen_statistics_stay_and_are_trained_with(tmp_path):
    given = SMALL | dict(norm='bn', lr=0.01, freeze_statistics=0.4, dropout=0.)  # 2 of 5 steps of an epoch
    recipe = make_recipe(given, digits)
    views, model = make_views(recipe, digits), make_model(recipe, 10)
    training = start_training(model, recipe, views, begin_run(recipe, digits, given, tmp_path))
    fast, progress = training.engine.fast, training.progress
    statistics = lambda: torch.cat([t.clone() for name, t in fast.named_buffers() if 'running' in name])
    seen, losses = [statistics()], []
    for x, y, _ in loader(views.train, 0, 20, drop_last=True):
        fast.eval()
        with torch.no_grad(): losses.append(torch.nn.functional.cross_entropy(fast(x), y).item())
        before = progress.sums[0].item()
        train_step(training, x, y)
        seen.append(statistics())
        losses[-1] = (losses[-1], (progress.sums[0].item()-before)/20)
    moved = [not a.equal(b) for a, b in zip(seen, seen[1:])]
    assert moved == [True, True, False, False, False]
    agree = [frozen == pytest.approx(trained, rel=1e-5) for frozen, trained in losses]
    assert agree == [False, False, True, True, True]

@pytest.mark.parametrize('norm, more', [('bn', dict(freeze_statistics=1.)), ('wn', dict(mixup=0.4))])
def test_a_cut_run_with_frozen_statistics_or_mixup_ends_the_same(norm, more, tmp_path):
    _, whole = train(tmp_path/'whole', norm=norm, lr=0.01, **more)
    with pytest.raises(Cut): train(tmp_path/'cut', cut_after(7), norm=norm, lr=0.01, checkpoint_steps=3, **more)
    _, cut = train(tmp_path/'cut', norm=norm, lr=0.01, checkpoint_steps=3, **more)
    for name, value in weights(whole).items(): assert value.equal(weights(cut)[name]), name

def test_mixup_is_timms(tmp_path):
    "The loss of mixed images is that of timm's soft labels"
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    mixed, targets = mixup(x, y, 0.4)
    share, layer = targets[0][0], torch.nn.Linear(48, 5)
    torch.testing.assert_close(mixed, share*x+(1-share)*x.flip(0))
    logits = layer(mixed.flatten(1))
    soft = mixup_target(y, 5, share, smoothing=0.1)
    ours = sum(part*torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1) for part, labels in targets)
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits, soft))
    same, [(one, labels)] = mixup(x, y, 0.)
    assert same is x and one == 1 and labels is y

def test_the_images_that_are_evaluated_can_be_told():
    def images(**given): return len(make_views(make_recipe(SMALL | given, digits), digits).train_eval)
    assert [images(), images(eval_images=50), images(eval_images=1000, train_images='none')] == [100, 50, 1000]

def test_parts_of_a_batch_drop_other_units_and_a_step_done_again_the_same():
    recipe = make_recipe(SMALL | dict(norm='wn'), digits)
    engine = start_training(make_model(recipe, 10), recipe, make_views(recipe, digits), None).engine
    def drawn(part, step=0):
        seed_step(engine, step, part)
        return torch.rand(5)
    first, second = drawn(0), drawn(1)
    assert first.equal(drawn(0)) and not first.equal(second)
    assert not first.equal(drawn(0, step=1))

def test_steps_are_those_of_plain_sgd():
    "Two steps of the loop against a few lines of torch"
    recipe = make_recipe(SMALL | dict(norm='none', lr=0.1, dropout=0., grad_clip=0.5, weight_decay=0.01), digits)
    views = make_views(recipe, digits)
    training, model = start_training(make_model(recipe, 10), recipe, views, None), make_model(recipe, 10).train()
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for k, (x, y, _) in zip(range(2), loader(views.train, batch_size=20)):
        train_step(training, x, y)
        lr = 0.1*(1-k/10)**2
        loss = torch.nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last) if recipe.channels_last else x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(g.pow(2).sum() for g in gradients))
        with torch.no_grad():
            for p, g, m in zip(model.parameters(), gradients, momenta, strict=True): p -= lr*m.mul_(0.9).add_(g*min(1, 0.5/norm) + 0.01*p)
        for p, trained in zip(model.parameters(), training.engine.fast.parameters(), strict=True): torch.testing.assert_close(trained, p, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('recipe, eps', [('paper', 1e-4), ('modern', 1e-5)])
def test_the_floor_of_the_variance_is_that_of_the_recipe(recipe, eps):
    model = make_model(make_recipe(SMALL | dict(norm='bn', recipe=recipe), digits), 10)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {eps}

@pytest.mark.slow
@pytest.mark.parametrize('norm', ('bn', 'trelu'))
def test_a_network_compiled_as_a_whole_trains_alike(norm, tmp_path):
    plain, _ = train(tmp_path/'plain', norm=norm, lr=0.01, max_steps=3, dropout=0)
    whole, run = train(tmp_path/'whole', norm=norm, lr=0.01, max_steps=3, dropout=0, compile='network')
    assert whole['status'] == 'finished' and whole['val_loss'] == pytest.approx(plain['val_loss'], rel=1e-3)
    probed = run.metrics().query('event == "probe"')['outputs'].iloc[-1]
    assert len(probed['layer']) > 20 and all(rms > 0 for rms in probed['rms'])

def test_notebook_names_and_rules_are_the_same():
    cell, = [c for c in nbformat.read(ROOT/'nbs/train.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])]
    namespace = {}
    exec(cell.source, namespace)
    assert list(notebook_parameters(namespace)) == list(RULES)
    assert check_parameters(notebook_parameters(namespace)) == check_parameters({})

def test_command_line_is_the_same_run(tmp_path):
    (tmp_path/'settings.ini').touch()
    words = [w for k, v in (SMALL | dict(norm='trelu', max_steps=2)).items() for w in (f'--{k}', str(v))]
    done = subprocess.run([sys.executable, '-m', 'nwrepro.training', *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run, = (tmp_path/'reports/runs').iterdir()
    assert json.loads((run/'summary.json').read_text())['norm'] == 'trelu'
    assert {p.name for p in run.iterdir()} == {'config.json', 'metrics.jsonl', 'summary.json', 'predictions.csv'}

# several processes, seen from the one that started them

def test_what_broke_is_the_first_error_of_a_process():
    log = """W1128 torch/distributed/run.py: Setting OMP_NUM_THREADS
[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 1, in <module>
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
nwrepro.training.loop FAILED"""
    assert first_error(log) == 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB'
    assert first_error('torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\nmain FAILED') is None

def test_a_loader_that_dies_while_the_last_step_is_saved_is_an_interruption(tmp_path, monkeypatch):
    given = SMALL | dict(norm='wn', precision='fp32')
    recipe = make_recipe(given, digits)
    run = begin_run(recipe, digits, given, tmp_path)
    def die(training): raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated. ')
    monkeypatch.setattr('nwrepro.training.loop.save_checkpoint', die)
    with pytest.raises(Interrupted, match='in the middle of a step'):
        fit(make_model(recipe, 10), make_views(recipe, digits), recipe, run, show=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert run.status == 'interrupted'
