"One run on several processes: torchrun, real processes, gloo"
import json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import numpy, pytest, torch
from conftest import FIVE
from safetensors.torch import load_file
from nwrepro.training.runs import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = dict(data='digits', arch='resnet18', image_size=16, train_images=640, batch_size=64, warmup_epochs=1, lr=0.01, compile='off')

@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path

def environment():
    "Without what a process started by torchrun has"
    return {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NWREPRO_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}

def flags(given): return [word for k, v in given.items() for word in (f'--{k}', str(v))]

def start(folder, processes, *words, options=(), **variables):
    torchrun = [] if processes is None else ['-m', 'torch.distributed.run', *(options or ('--standalone',)), '--nproc-per-node', str(processes)]
    return subprocess.Popen([sys.executable, *torchrun, *words], cwd=folder, env=environment() | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)

def ran(folder, processes, *words):
    process = start(folder, processes, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

def trained(folder, processes, **given):
    code, out, err = ran(folder, processes, '-m', 'nwrepro.training', *flags(SMALL | given))
    assert code == 0, out+err
    return next((folder/'reports/runs').iterdir()).name, out

STEPS = """
import json, sys, torch
from nwrepro.training.sources import load_source
from nwrepro.training.distributed import init_distributed
from nwrepro.training.recipe import make_recipe
from nwrepro.training.build import make_model, make_views
from nwrepro.training.engine import local_loader, start_training
from nwrepro.training.loop import train_step
for given, micro, steps, out in json.loads(sys.argv[1]):
    source = load_source('digits')
    recipe = make_recipe(given, source)
    views = make_views(recipe, source)
    training = start_training(make_model(recipe, 10), recipe, views, None, micro)
    engine = training.engine
    batches = iter(local_loader(engine, views.train, 0, recipe.batch_size, shuffle=True, drop_last=True))
    for step in range(steps):
        x, y, _ = next(batches)
        train_step(training, x, y)
        if step == 0: first = {k: p.grad for k, p in engine.fast.named_parameters() if p.grad is not None}
    if init_distributed().is_main_process: torch.save(dict(weights=engine.fast.state_dict(), first=first, losses=training.progress.monitor.losses), out)
"""

def steps(folder, processes, jobs):
    "What is left after some steps of each job (parameters, micro_batch, steps, file), all in the same processes"
    (folder/'steps.py').write_text(STEPS)
    code, out, err = ran(folder, processes, 'steps.py', json.dumps(jobs))
    assert code == 0, out+err
    return [torch.load(folder/file) for *_, file in jobs]

def furthest(one, other):
    "Largest difference relative to the largest number of the same tensor"
    assert one.keys() == other.keys() and len(one) > 20
    return max(((one[k]-other[k]).abs().max()/one[k].abs().max().clamp(min=1e-300)).item() for k in one)

def compared(project, schemes, count, processes, micro=False, **given):
    points = [SMALL | dict(norm=norm, precision='fp64') | given for norm in schemes]
    alone = steps(project, None, [(p, None, count, f'one-{p["norm"]}') for p in points])
    divided = [steps(project, processes, [(p, None, count, f'shared-{p["norm"]}') for p in points])]
    if micro: divided += [steps(project, None, [(p, p['batch_size']//2, count, f'micro-{p["norm"]}') for p in points])]
    for norm, one, *others in zip(schemes, alone, *divided, strict=True):
        for other in others:
            assert furthest(one['weights'], other['weights']) < 1e-10, norm
            assert numpy.allclose(one['losses'], other['losses'], rtol=1e-10), norm

def test_processes_and_micro_batches_make_the_same_steps(project):
    compared(project, ('bn', 'trelu'), 4, 2, micro=True, batch_size=32, bn_batch=8)

@pytest.mark.slow
def test_steps_of_every_scheme(project):
    compared(project, FIVE, 4, 2)
    compared(project, ('bn', 'wn'), 2, 4, bn_batch=16)

def test_first_gradients_in_single_precision(project):
    jobs = [(SMALL | dict(norm=norm), None, 1, norm) for norm in ('bn', 'wn', 'np')]
    one = steps(project, None, jobs)
    for job, a, b in zip(jobs, one, steps(project, 2, jobs), strict=True): assert furthest(a['first'], b['first']) < 1e-5, job

OWN_LOOP = """
import sys, timm, torch
import torch.distributed as dist
from nwrepro.methods.fast import WNSGD, copy_norms, fast_form, plain_weights
from nwrepro.methods.schemes import convert
torch.manual_seed(0)
dist.init_process_group('gloo')
model = convert(timm.create_model('resnet18', num_classes=3), sys.argv[1], init='even' if sys.argv[1] == 'trelu' else None).double()
fast = fast_form(model)
network = torch.nn.parallel.DistributedDataParallel(fast, find_unused_parameters=True)
weights = plain_weights(fast, model).values()
plain = [w for w, _ in weights]
groups = [dict(params=[w for w, layer in weights if (layer.g is None) == strict], weight_norm=kind) for strict, kind in ((True, 'strict'), (False, 'affine'))]
optimizer = WNSGD([*(g for g in groups if g['params']), dict(params=[p for p in network.parameters() if not any(p is w for w in plain)])], lr=0.01, momentum=0.9, weight_decay=1e-3)
copy_norms(optimizer, fast, model)
x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 3
share = slice(dist.get_rank(), None, dist.get_world_size())
for _ in range(3):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(x[share]), y[share]).backward()
    optimizer.step()
torch.save(fast.state_dict(), f'{sys.argv[1]}-{dist.get_world_size()}-{dist.get_rank()}')
dist.destroy_process_group()
"""

@pytest.mark.slow
@pytest.mark.parametrize('norm', ('wn', 'trelu'))
def test_a_loop_of_ones_own_wraps_the_network_before_it_makes_the_optimizer(norm, project):
    "Replicas stay the same, and take the steps of one process"
    (project/'own_loop.py').write_text(OWN_LOOP)
    for processes in (1, 2):
        code, out, err = ran(project, processes, 'own_loop.py', norm)
        assert code == 0, out+err
    one, first, second = (torch.load(project/f'{norm}-{name}') for name in ('1-0', '2-0', '2-1'))
    assert furthest(first, second) == 0 and furthest(one, first) < 1e-10

def test_two_processes_are_the_same_run(project):
    folders = {processes: project/str(processes) for processes in (None, 2)}
    for processes, folder in folders.items():
        folder.mkdir()
        shutil.copy(ROOT/'settings.ini', folder)
        name, out = trained(folder, processes, norm='bn', epochs=2, train_images=128, precision='fp64')
    records = [folder/'reports/runs'/name for folder in folders.values()]
    assert (records[0]/'predictions.csv').read_text() == (records[1]/'predictions.csv').read_text()
    one, two = [json.loads((r/'summary.json').read_text()) for r in records]
    assert (one.pop('processes'), two.pop('processes')) == (1, 2)
    assert {k: v for k, v in one.items() if isinstance(v, str)} == {k: v for k, v in two.items() if isinstance(v, str)}
    for k in ('steps', 'top1', 'top5', 'train_top1'): assert one[k] == two[k]
    for k in ('val_loss', 'train_loss'): assert one[k] == pytest.approx(two[k], rel=1e-9)
    first, second = [[(line['event'], line['step'], line.get('images')) for line in read_metrics(r/'metrics.jsonl')] for r in records]
    assert first == second and ('train', 2, 64) in first

LONGER = SMALL | dict(norm='wn', precision='fp64', epochs=2, train_images=256, eval_every=2)

def until(process, words):
    "Read lines until one holds these words; a process that takes longer than four minutes is ended, as by a scheduler"
    late, lines = threading.Timer(240, process.terminate), []
    late.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if words in line: return lines
    finally: late.cancel()
    raise AssertionError(''.join(lines)+process.stderr.read())

def run_of(folder): return next((folder/'reports/runs').iterdir())

def test_cut_on_two_processes_goes_on_with_one_and_with_four(project):
    folders = {name: project/name for name in ('whole', 'cut', 'four')}
    for name in ('whole', 'cut'):
        folders[name].mkdir()
        shutil.copy(ROOT/'settings.ini', folders[name])
    trained(folders['whole'], None, **LONGER)
    process = start(folders['cut'], 2, '-m', 'nwrepro.training', *flags(LONGER))
    until(process, 'step 1 ')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out.count('stopped the run after step') == 1 and 'SIGTERM' in out, out+err
    run = run_of(folders['cut'])
    step = json.loads((run/'summary.json').read_text())['steps']
    assert 1 <= step < 8 and json.loads((run/'summary.json').read_text())['status'] == 'interrupted'
    shutil.copytree(folders['cut'], folders['four'])
    trained(folders['cut'], None, **LONGER)
    trained(folders['four'], 4, **LONGER)
    final = {name: load_file(next(folder.glob('data/checkpoints/*/final.safetensors'))) for name, folder in folders.items()}
    events = {name: read_metrics(run_of(folder)/'metrics.jsonl') for name, folder in folders.items()}
    for name, processes in dict(cut=1, four=4).items():
        assert furthest(final['whole'], final[name]) < 1e-9
        resumed, = [line for line in events[name] if line['event'] == 'resume']
        assert (resumed['step'], resumed['processes']) == (step, processes)
        lines = [[(line['step'], line['images'], round(line['loss'], 3)) for line in record if line['event'] == 'train'] for record in (events['whole'], events[name])]
        assert lines[0] == lines[1]

def test_a_flag_starts_processes_and_the_stop_button_reaches_them_once(project):
    for number, said in ((signal.SIGINT, 'step 1 '), (signal.SIGTERM, 'resumed after step')):  # a queue sends the second
        process = start(project, None, '-m', 'nwrepro.training', *flags(LONGER | dict(processes=2)))
        until(process, said)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75 and 'SIGINT stopped the run after step' in out.splitlines()[-1] and '--processes 2' in out, out+err
    assert json.loads((run_of(project)/'summary.json').read_text())['status'] == 'interrupted'
    code, out, err = ran(project, None, '-m', 'nwrepro.training', *flags(LONGER | dict(processes=2)))
    summary = json.loads((run_of(project)/'summary.json').read_text())
    assert code == 0 and 'resumed after step' in out and (summary['status'], summary['processes']) == ('finished', 2), out+err
    assert out.count("'finished'") == 1
    code, out, err = ran(project, None, '-m', 'nwrepro.training', *flags(LONGER | dict(processes=2)))
    assert code == 0 and 'resumed' not in out and "'finished'" in out

EVALUATION = """
import os, signal
from nwrepro.training import build, engine, evaluation
from nwrepro.training.checkpoint import Interrupted, StopSignal
from nwrepro.training.recipe import make_recipe
from nwrepro.training.sources import load_source
digits = load_source('digits')
recipe = make_recipe(dict(norm='wn', arch='resnet18', image_size=16, batch_size=110), digits)  # 3 batches of 110 and one of 30, of which the second process has none
trained = engine.start_training(build.make_model(recipe, 10), recipe, build.make_views(recipe, digits), None).engine
network, rank, views = engine.readable_copy(trained), trained.dist.process_index, trained.views.val
result, rows = evaluation.evaluate(trained, network, views, StopSignal())
asked, batches, forward = StopSignal(), [], evaluation.logits_of
def counted(*args):
    batches.append(1)
    if rank == 1: asked(signal.SIGTERM, None)
    return forward(*args)
evaluation.logits_of = counted
try: evaluation.evaluate(trained, network, views, asked)
except Interrupted as stopped: os.write(1, f"{rank} {stopped} after {len(batches)}, {len(rows)} images\\n".encode())
"""

def test_a_stop_in_an_evaluation_stops_all_processes_at_the_next_batch(project):
    (project/'evaluation.py').write_text(EVALUATION)
    code, out, err = ran(project, 2, 'evaluation.py')
    assert code == 0 and sorted(out.splitlines()) == [f'{rank} SIGTERM after 1, 360 images' for rank in (0, 1)], out+err

def sentence(out): return [line for line in out.splitlines() if line.strip() and not line.startswith(('digits:', 'run '))]

MANY = """
import json, sys
from nwrepro.training.command import main
codes = [main(words) for words in json.loads(sys.argv[1])]
assert codes == [2]*len(codes)
"""
UNFIT = [
    (dict(norm='wn', batch_size=34), 'batch_size = 34 cannot be shared out to 4 processes: give a number of processes that divides 34'),
    (dict(norm='bn'), 'in groups of bn_batch = 32 that keep their statistics: give a number of processes that divides 2'),
    (dict(norm='wn', micro_batch=12), 'micro_batch = 12 does not divide the 16 images of a process'),
    (dict(norm='bn', bn_batch=16, micro_batch=8), 'micro_batch = 8 does not divide the 16 images of a process in groups of bn_batch = 16'),
    (dict(norm='wn', data='imagenette', data_dir='nowhere'), 'no images for data=imagenette'),
]

def test_bad_input_is_one_sentence_from_one_process(project):
    (project/'many.py').write_text(MANY)
    code, out, err = ran(project, 4, 'many.py', json.dumps([flags(SMALL | given) for given, _ in UNFIT]))
    assert code == 0 and len(sentence(out)) == len(UNFIT), out+err
    for line, (_, words) in zip(sentence(out), UNFIT, strict=True): assert words in line
    assert not (project/'reports/runs').exists()

DIFFERENT = """
import os, sys
from nwrepro.training import command
origin = command.provenance()
command.provenance = lambda: origin | dict(code=f"{os.environ['RANK']}{origin['code']}")
raise SystemExit(command.main(sys.argv[1:]))
"""

def test_processes_with_different_code_are_refused(project):
    (project/'different.py').write_text(DIFFERENT)
    code, out, err = ran(project, 2, 'different.py', *flags(LONGER))
    assert code != 0 and len(sentence(out)) == 1 and 'the processes do not have the same code (0' in out, out+err
    assert not (project/'reports/runs').exists()

def test_no_host_to_meet_at(project):
    env = environment() | dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='nowhere.invalid', MASTER_PORT='29511', NWREPRO_WAIT='0.05')
    done = subprocess.run([sys.executable, '-m', 'nwrepro.training', *flags(LONGER)], cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and 'no connection to nowhere.invalid:29511' in done.stdout, done.stdout+done.stderr

def children(pid): return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(project):
    given = LONGER | dict(checkpoint_steps=1, epochs=3)
    process = start(project, 2, '-m', 'nwrepro.training', *flags(given))
    until(process, 'step 1 ')
    rank = {pid: Path(f'/proc/{pid}/environ').read_bytes() for pid in children(process.pid)}
    os.kill(next(pid for pid, env in rank.items() if b'RANK=1' in env.split(bytes(1))), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and len([line for line in out.splitlines() if 'has died' in line]) <= 1, out+err
    name, out = trained(project, 2, **given)
    assert re.search(r'resumed after step [1-9]', out), out

def agents(folder, port, given):
    "One torchrun, as a host of two would start it"
    options = ['--nnodes', '2', '--rdzv-backend', 'c10d', '--rdzv-id', 'run', '--rdzv-endpoint', f'localhost:{port}', '--max-restarts', '9']
    return start(folder, 1, '-m', 'nwrepro.training', *flags(given), options=options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')

def kill_host(agent):
    "As if its power had gone"
    for pid in [agent.pid, *children(agent.pid)]: os.killpg(pid, signal.SIGKILL)
    agent.communicate(timeout=60)

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def listening(port):
    with socket.socket() as s: return s.connect_ex(('localhost', port)) == 0

@pytest.mark.slow
def test_a_host_that_dies_is_replaced_twice(project):
    given, port = SMALL | dict(norm='bn', precision='fp64', epochs=3, train_images=256, eval_every=3, checkpoint_steps=1), free_port()
    (project/'alone').mkdir()
    shutil.copy(ROOT/'settings.ini', project/'alone')
    trained(project/'alone', None, **given)
    first = agents(project, port, given)
    up = time.monotonic()+120
    while not listening(port):
        assert first.poll() is None and time.monotonic() < up, 'the first host does not listen'
        time.sleep(0.1)  # it keeps the list of hosts, and must not be the one that dies
    steps = lambda: [int(path.name.split('-')[1]) for path in project.glob('data/checkpoints/*/step-*.pt')]
    reached, deadline = 0, time.monotonic()+500
    for _ in range(2):
        second = agents(project, port, given)
        while max(steps(), default=0) < reached+2:
            assert time.monotonic() < deadline and first.poll() is None, '\n'.join([*first.communicate(), *second.communicate()])
            time.sleep(0.05)
        kill_host(second)
        reached = max(steps())
    second = agents(project, port, given)
    out, err = first.communicate(timeout=200)
    second.communicate(timeout=60)
    assert first.returncode == 0 and second.returncode == 0, out+err
    name = run_of(project).name
    resumed = [line['step'] for line in read_metrics(project/'reports/runs'/name/'metrics.jsonl') if line['event'] == 'resume']
    assert len(resumed) == 2 and sorted(set(resumed)) == resumed
    final, alone = (load_file(folder/'data/checkpoints'/name/'final.safetensors') for folder in (project, project/'alone'))
    assert furthest(alone, final) < 1e-9

@pytest.mark.slow
def test_the_notebook_starts_processes(project):
    (project/'nbs').mkdir()
    shutil.copy(ROOT/'nbs'/'train.ipynb', project/'nbs')
    given = [word for k, v in (LONGER | dict(processes=2, max_steps=2)).items() for word in ('-p', k, str(v))]
    done = subprocess.run([sys.executable, '-m', 'papermill', 'nbs/train.ipynb', 'out.ipynb', '--cwd', '.', *given], cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_of(project)/'summary.json').read_text())['processes'] == 2
    executed = (project/'out.ipynb').read_text()
    assert 'val top1' in executed and f'run reports/runs/{run_of(project).name}' in executed
