"A run that is cut, by real signals in real processes, and started again by the same command ends as one that was not cut"
import os, random, re, shlex, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from conftest import run_in
from nwrepro.training.runs import Record, Run, read_metrics
from nwrepro.training.checkpoint import LOCKS, acquire_lock, read_checkpoint, lock_files, release_lock, write_checkpoint, checkpoint_files
from nwrepro.training.command import main

SMALL = dict(data='digits', arch='resnet18', train_images=200, epochs=5, warmup_epochs=0, image_size=16, batch_size=20, bn_batch=10, dropout=0.2, lr=0.01,
             checkpoint_steps=5)
STEPS, PER_EPOCH = 50, 10
KEEPING = '''from nwrepro.training import command, loop
loop.delete_checkpoints = lambda run: None  # so that the last state can be compared
raise SystemExit(command.main())'''

def words(**given): return [word for k, v in (SMALL | given).items() for word in (f'--{k}', str(v))]

class Project:
    "A folder that holds runs, and processes that train in it"
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder/'settings.ini').touch()
    def start(self, *code, **given):
        env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
        return subprocess.Popen([sys.executable, *(code or ('-m', 'nwrepro.training')), *words(**given)], cwd=self.folder, env=env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    def run(self, *code, **given):
        process = self.start(*code, **given)
        out, _ = process.communicate(timeout=300)
        return process.returncode, out
    @property
    def record(self):
        paths = [p for p in (self.folder/'reports/runs').glob('*') if '.old-' not in p.name]
        return Record(paths[0].name, paths[0].parent, self.folder/'data/checkpoints') if paths else None
    def lines(self): return read_metrics(self.record.path/'metrics.jsonl') if self.record else []
    def steps(self): return [int(p.name[5:14]) for p in checkpoint_files(self.record)] if self.record else []

def wait_for(happened, process, seconds=120):
    "Look every two milliseconds whether something has happened"
    end = time.monotonic()+seconds
    while not (found := happened()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(0.002)
    return found

def contents(project):
    "All that a run comes to, without clock times"
    record, clocks = project.record, ('img_per_s', 'wall_s')
    state, torn = read_checkpoint(record)
    assert torn == []
    lines = [line for line in project.lines() if line['event'] != 'resume']
    summary = {k: v for k, v in record.summary.items() if k not in clocks}
    return load_file(record.checkpoints/'final.safetensors'), state, lines, summary, (record.path/'predictions.csv').read_text()

def assert_same(a, b, where=''):
    "Equal to the bit, tensor by tensor"
    if torch.is_tensor(a): assert a.equal(b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a: assert_same(a[k], b[k], f'{where}/{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)): assert_same(*pair, f'{where}/{i}')
    else: assert a == b or a != a and b != b, where

def assert_cut_ends_like(cut, whole):
    (weights, state, lines, summary, predictions), (w, s, l, m, p) = contents(cut), contents(whole)
    assert summary['status'] == 'finished' and state['step'] == STEPS
    for value in weights.values(): assert value.isfinite().all()
    for part in ('fast', 'optimizer', 'rule', 'sums', 'step'): assert_same(state[part], s[part], part)
    assert_same(weights, w, 'weights')
    assert_same(lines, l, 'metrics')
    assert summary == m and predictions == p
    steps = [line['step'] for line in lines if line['event'] == 'train']
    assert steps == sorted(set(steps))

# moments at which a process is killed: when to look up, and whether the blow fell where it was meant to

def training(project, floor):
    return [line for line in project.lines() if line['event'] == 'train' and line['step'] > floor and line['step'] % PER_EPOCH]

def evaluation(project, floor):
    lines = project.lines()
    return lines and lines[-1]['event'] in ('train', 'eval') and lines[-1]['step'] > floor and lines[-1]['step'] % PER_EPOCH == 0

def writing(project, floor): return project.steps() and max(project.steps()) > floor and list(project.record.checkpoints.glob('.*.part'))

def kill(project, moment, dice, **given):
    "Kill the run at such a moment, past its last checkpoint; the step it can go on from"
    for _ in range(4):
        floor = max(project.steps() or [0])
        process = project.start('-c', KEEPING, **given)
        wait_for(lambda: project.steps() and max(project.steps()) > floor and moment(project, floor), process)
        time.sleep(dice.uniform(0, {training: 0.2, evaluation: 0.05, writing: 0.02}[moment]))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        if moment is training or moment(project, floor): return max(project.steps())
    raise AssertionError(f'four blows missed the {moment.__name__}')

@pytest.mark.slow
@pytest.mark.parametrize('norm, workers', [('bn', 0), ('np', 2)])  # of wn, the tests below
def test_a_run_killed_four_times_ends_as_one_that_was_not(norm, workers, tmp_path):
    dice, cut, whole = random.Random(norm), Project(tmp_path/'cut'), Project(tmp_path/'whole')
    code, out = whole.run('-c', KEEPING, norm=norm)
    assert code == 0, out
    moments = [training, writing, evaluation, training]
    steps = [kill(cut, moment, dice, norm=norm, workers=workers) for moment in moments]
    code, out = cut.run('-c', KEEPING, norm=norm, workers=workers)
    assert code == 0, out
    resumed = [line['step'] for line in cut.lines() if line['event'] == 'resume']
    assert len(resumed) >= 4 and set(steps) <= set(resumed) and min(resumed) > 0
    assert_cut_ends_like(cut, whole)
    assert not list(cut.record.checkpoints.glob('.*.part'))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uncut run of weight normalization"
    project = Project(tmp_path_factory.mktemp('whole'))
    code, out = project.run('-c', KEEPING, norm='wn')
    assert code == 0, out
    return project

@pytest.mark.slow
@pytest.mark.parametrize('number, workers', [(signal.SIGTERM, 0), (signal.SIGUSR1, 2)])
def test_a_signal_saves_the_step_and_names_the_command_that_goes_on(number, workers, tmp_path, whole):
    project = Project(tmp_path/'cut')
    process = project.start('-c', KEEPING, norm='wn', workers=workers, checkpoint_steps=1000)
    wait_for(lambda: training(project, 0), process)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    summary, (state, _) = project.record.summary, read_checkpoint(project.record)
    assert (process.returncode, summary['status']) == (75, 'interrupted') and state['step'] == summary['steps'] > 0
    last = out.strip().splitlines()[-1]
    assert last.startswith(f'{number.name} stopped the run after step {summary["steps"]}, which is saved')
    notebook, plain = (shlex.split(command) for command in re.findall('`(.*?)`', last))
    assert notebook[:3] == ['papermill', 'nbs/train.ipynb', f'reports/{project.record.name}.ipynb'] and plain[:3] == ['python', '-m', 'nwrepro.training']
    assert {k: v for k, v in zip(plain[3::2], plain[4::2], strict=True)} == {f'--{k}': v for k, v in zip(notebook[4::3], notebook[5::3], strict=True)}
    done = subprocess.run([sys.executable, '-c', KEEPING, *plain[3:], '--checkpoint_steps', '5'], cwd=project.folder, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout+done.stderr
    assert_cut_ends_like(project, whole)

@pytest.mark.slow
def test_a_signal_to_the_loader_too_costs_no_more_than_to_the_last_checkpoint(tmp_path, whole):
    project = Project(tmp_path/'cut')
    process = project.start('-c', KEEPING, norm='wn', workers=2)
    wait_for(lambda: project.steps() and max(project.steps()) >= 14, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and project.record.summary['status'] == 'interrupted', out
    assert project.run('-c', KEEPING, norm='wn')[0] == 0
    assert_cut_ends_like(project, whole)

@pytest.mark.slow
def test_a_torn_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, whole):
    project = Project(tmp_path/'cut')
    process = project.start('-c', KEEPING, norm='wn')
    wait_for(lambda: len(project.steps()) == 2 and training(project, project.steps()[1]), process)
    process.kill()
    process.communicate()
    newest, before = checkpoint_files(project.record)[::-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    code, out = project.run('-c', KEEPING, norm='wn')
    assert code == 0 and f'checkpoint {newest.name} is corrupt and was renamed to *.torn' in out
    resume, = [line for line in project.lines() if line['event'] == 'resume']
    assert resume['torn'] == [newest.name] and before.name.startswith(f'step-{resume["step"]:09d}') and 0 < resume['step']
    assert_cut_ends_like(project, whole)

@pytest.mark.slow
def test_a_second_command_is_told_who_trains_and_changes_nothing(tmp_path, whole):
    project = Project(tmp_path/'cut')
    first = project.start('-c', KEEPING, norm='wn', workers=2)
    wait_for(lambda: training(project, PER_EPOCH), first)  # the loader's processes of an epoch have ended, and have not taken the lock with them
    os.kill(first.pid, signal.SIGSTOP)
    before = {p: p.read_bytes() for p in project.record.path.iterdir()}
    code, out = project.run(norm='wn')
    assert code == 2 and re.search(rf'is locked by process {first.pid} on \S+ since .*: wait for its end, or stop it', out.strip().splitlines()[-1])
    code, out = project.run(norm='wn', fresh=True)
    assert code == 2 and f'process {first.pid}' in out
    assert {p: p.read_bytes() for p in project.record.path.iterdir()} == before
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(120) == 0
    first.stdout.close()
    assert_cut_ends_like(project, whole)

@pytest.mark.slow
def test_papermill_interrupted_goes_on(project):
    values = [word for k, v in (SMALL | dict(norm='wn', epochs=8, checkpoint_steps=1000)).items() for word in ('-p', k, str(v))]
    command = ['papermill', 'nbs/train.ipynb', 'reports/wn.ipynb', *values]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'PYTHONPATH': str(project), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([Path(sys.executable).parent/command[0], *command[1:]], cwd=project, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = Project(project)
    wait_for(lambda: training(runs, 0), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and runs.record.status == 'interrupted', out
    assert 'which is saved; to go on' in (project/'reports/wn.ipynb').read_text()
    step = runs.record.summary['steps']
    again = run_in(project, *command, OMP_NUM_THREADS='1')
    assert again.returncode == 0, again.stderr
    assert runs.record.status == 'finished' and runs.record.summary['steps'] == 80
    assert [line['step'] for line in runs.lines() if line['event'] == 'resume'] == [step]

@pytest.mark.slow
def test_a_run_whose_code_changed_goes_on_only_when_told_to(project):
    def train(**given): return run_in(project, sys.executable, '-m', 'nwrepro.training', *words(norm='wn', **given), OMP_NUM_THREADS='1')
    runs = Project(project)
    env = os.environ | {'PYTHONPATH': str(project), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', 'nwrepro.training', *words(norm='wn')], cwd=project, env=env, stdout=subprocess.DEVNULL)
    wait_for(lambda: training(runs, 0) and runs.steps(), process)
    process.kill()
    process.wait()
    before = (runs.record.path/'metrics.jsonl').read_bytes()
    with (project/'nwrepro/methods/layers.py').open('a') as f: f.write('# edited\n')
    refused = train()
    last = refused.stdout.strip().splitlines()[-1]
    assert refused.returncode == 2 and re.search(r'was begun with code \w{8}, now \w{8}: .*accept_changes=True', last), last
    assert (runs.record.path/'metrics.jsonl').read_bytes() == before
    told = train(accept_changes=True)
    assert told.returncode == 0 and runs.record.status == 'finished', told.stdout
    resume, = [line for line in runs.lines() if line['event'] == 'resume']
    assert list(resume['changed']) == ['code'] and resume['step'] > 0

# disks: a small file system of its own, where this user may mount one

@pytest.fixture
def disk(tmp_path):
    "Mounts and remounts a file system in memory at a folder"
    mounted = []
    def mount(folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        again = ['-o', f'remount,{options}'] if folder in mounted else ['-t', 'tmpfs', '-o', options, 'tmpfs']
        done = subprocess.run(['mount', *again, str(folder)], capture_output=True, text=True)
        if done.returncode and folder not in mounted: pytest.skip(f'this user may not mount: {done.stderr.strip()}')
        assert done.returncode == 0, done.stderr
        mounted.append(folder)
    yield mount
    for folder in dict.fromkeys(mounted): subprocess.run(['umount', str(folder)], check=True)

@pytest.mark.slow
@pytest.mark.parametrize('where, small, large', [('data/checkpoints', '140m', '600m'), ('reports', '24k', '10m')])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_space(where, small, large, tmp_path, disk, whole):
    project = Project(tmp_path/'cut')
    disk(project.folder/where, f'size={small}')
    code, out = project.run('-c', KEEPING, norm='wn')
    last = out.strip().splitlines()[-1]
    assert code == 2 and last.startswith(f'there is no space left for {project.folder/where}') and last.endswith('resumes from the last state of the run'), out
    assert project.record.status == 'started'
    state, torn = read_checkpoint(project.record)
    assert state['step'] > 0 and torn == []
    disk(project.folder/where, f'size={large}')
    code, out = project.run('-c', KEEPING, norm='wn')
    assert code == 0 and f'resumed after step {state["step"]}' in out, out
    assert_cut_ends_like(project, whole)

def test_a_read_only_folder_is_one_sentence(tmp_path, disk, monkeypatch, capsys):
    project = Project(tmp_path/'project')
    disk(project.folder/'reports', 'size=1m,ro')
    monkeypatch.chdir(project.folder)
    assert main(words(norm='wn')) == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r'reports/runs\S* cannot be written \(Read-only file system\): make that folder writable', last), last
    assert list((project.folder/'reports').iterdir()) == []

# parts

@pytest.fixture
def run(tmp_path):
    run = Run('x', tmp_path/'runs', tmp_path/'checkpoints')
    yield run
    release_lock(run)

def test_states_are_kept_by_twos_and_a_flipped_bit_is_seen(run):
    for step in (1, 20, 300): newest = write_checkpoint(run, step, dict(w=torch.arange(10.), step=step))
    assert [int(p.name[5:14]) for p in checkpoint_files(run)] == [20, 300]
    for position in (0, 100, newest.stat().st_size//2, -1):
        content = bytearray(newest.read_bytes())
        content[position] ^= 1
        newest.write_bytes(content)
        state, torn = read_checkpoint(run)
        assert state['step'] == 20 and torn == [newest.name] and newest.with_suffix('.torn').exists()
        content[position] ^= 1
        newest.with_suffix('.torn').unlink()
        newest.write_bytes(content)
    assert read_checkpoint(run)[0]['step'] == 300
    for path in checkpoint_files(run): path.write_bytes(b'')
    state, torn = read_checkpoint(run)
    assert state is None and [name[5:14] for name in torn] == ['000000300', '000000020']

class Code:
    def __reduce__(self): return print, ('code ran',)

def test_a_state_that_carries_code_is_not_run(run, capsys):
    write_checkpoint(run, 1, dict(code=Code()))
    with pytest.raises(Exception, match='(?i)weights.only'): read_checkpoint(run)
    assert 'code ran' not in capsys.readouterr().out

def test_one_process_may_ask_twice_and_gives_back_once(run):
    acquire_lock(run)
    acquire_lock(run, wait=0)
    _, holder = lock_files(run)
    assert f'process {os.getpid()} on ' in holder.read_text()
    release_lock(run)
    assert not LOCKS and not holder.exists()
    release_lock(run)

def test_begin_clears_away_what_a_killed_process_left_half_written(run):
    run.begin(dict(norm='wn'), {})
    run.checkpoints.mkdir(parents=True)
    for folder in (run.path, run.checkpoints): (folder/'.summary.json.0123abcd.part').write_text('{"sta')
    run.begin(dict(norm='wn'), {})
    assert {p.name for p in (*run.path.iterdir(), *run.checkpoints.iterdir())} == {'config.json', 'metrics.jsonl'}
