"A sweep through a cluster's queue: a real Slurm of one machine, jobs that are taken away, input that does not fit"
import json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pandas, pytest, yaml
from nwrepro.experiments.slurm import sbatch_options
from nwrepro.training.records import load_runs
from nwrepro.training.runs import read_metrics
from slurm import free_ports, missing, slurm

ROOT = Path(__file__).parents[2]
SMALL = dict(data='digits', arch='resnet18', image_size=16, train_images=256, batch_size=64, epochs=3, eval_every=3, compile='off', checkpoint_minutes=60)

@pytest.fixture
def project(tmp_path):
    for name in ('sweep', 'train'):
        (tmp_path/'nbs').mkdir(exist_ok=True)
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path/'nbs')
    (tmp_path/'reports').mkdir()
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path

@pytest.fixture(scope='module')
def queue(tmp_path_factory):
    if absent := missing(): pytest.skip(f"no {', '.join(absent)} here: install Debian's slurm-wlm and munge")
    if os.getuid() != 0: pytest.skip('starting a Slurm takes root')
    with slurm(tmp_path_factory.mktemp('slurm'), cpus=2) as variables: yield variables

def command(given, **own):
    return [sys.executable, '-m', 'papermill', 'nbs/sweep.ipynb', 'reports/sweep.ipynb', '-y', yaml.safe_dump(SMALL | given | own)]

def environment(variables):
    return {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | variables

def started(project, variables, given, **own):
    return subprocess.Popen(command(given, **own), cwd=project, env=environment(variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)

def swept(project, variables, given, timeout=900, **own):
    process = started(project, variables, given, **own)
    said = process.communicate(timeout=timeout)[0]
    return process.returncode, said

def asked(variables, *words):
    return subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, timeout=60).stdout

def jobs(variables, state): return [line.split() for line in asked(variables, 'squeue', '--noheader', '--states', state, '--format', '%A %j').splitlines()]

def training(project, variables):
    "Jobs that have taken a step, by number, with their runs"
    def steps(name): return [line['step'] for line in read_metrics(project/'reports/runs'/name/'metrics.jsonl') if line['event'] == 'train']
    return [(number, name) for number, name in jobs(variables, 'RUNNING') if steps(name) and not (project/'reports/runs'/name/'predictions.csv').exists()]

def results(project):
    runs = load_runs(project/'reports/runs').set_index('run').sort_index()
    return runs[['status', 'top1', 'train_top1', 'val_loss', 'steps']]

UNDISTURBED = 'import json, sys; from nwrepro.training.command import main; assert [main(words) for words in json.loads(sys.argv[1])] == [0]*3'

@pytest.mark.slow
def test_a_sweep_goes_through_a_queue_that_takes_jobs_away(project, queue):
    given = dict(norm=['bn', 'wn'], seed=[0, 1])
    through = dict(cluster='slurm', hours=0.5, sbatch='--cpus-per-task=1')
    process = started(project, queue, given, **through)
    take = {'cancelled': lambda number: asked(queue, 'scancel', number), 'put back': lambda number: asked(queue, 'scontrol', 'requeue', number),
            'told to make room': lambda number: asked(queue, 'scancel', '--signal', 'USR1', number)}
    disturbed, end = {}, time.monotonic()+600
    for what, act in take.items():
        while not (candidates := [(number, name) for number, name in training(project, queue) if name not in disturbed.values()]):
            assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        number, disturbed[what] = random.choice(candidates)
        act(number)
    os.killpg(process.pid, signal.SIGKILL)  # the notebook is closed; its jobs stay
    process.communicate()
    for number, _ in jobs(queue, 'PENDING'): asked(queue, 'scontrol', 'update', f'JobId={number}', 'StartTime=now')  # Slurm waits two minutes with what it has put back
    code, said = swept(project, queue, given, **through)
    assert code == 0, said
    table = results(project)
    assert len(table) == len(given['norm'])*len(given['seed']) and set(table.status) == {'finished'}
    for what, name in disturbed.items():
        events = [line['event'] for line in read_metrics(project/'reports/runs'/name/'metrics.jsonl')]
        assert (project/'reports/runs'/name/'jobs').is_dir()
        if what == 'told to make room': assert events.count('resume') == 1, (what, events)
    here = project/'here'
    here.mkdir()
    shutil.copy(ROOT/'settings.ini', here)
    configs = [json.loads((project/'reports/runs'/name/'config.json').read_text()) for name in disturbed.values()]
    words = [[word for k, v in (SMALL | dict(norm=c['norm'], seed=c['seed'])).items() for word in (f'--{k}', str(v))] for c in configs]
    done = subprocess.run([sys.executable, '-c', UNDISTURBED, json.dumps(words)], cwd=here, env=environment({}), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout+done.stderr
    pandas.testing.assert_frame_equal(table.loc[sorted(disturbed.values())], results(here), rtol=1e-6)

@pytest.mark.parametrize('word', ['--job-name=x', '--job_name=x', '--job=x', '--open_mode=append', '--time=60', '--tim=60', '--no-requeue', '--no_requeue'])
def test_an_option_that_the_executor_sets_is_refused_however_it_is_spelled(word):
    with pytest.raises(ValueError, match=f'{word.partition("=")[0]} is set by the sweep'): sbatch_options(f'--partition=gpu {word}')

@pytest.mark.parametrize('word, option', [('--time-min=60', {'time_min': '60'}), ('--node_list=a', {'node_list': 'a'}), ('--gpus_per_node=8', {'gpus_per_node': '8'}), ('--exclusive', {'exclusive': True})])
def test_other_options_are_free(word, option): assert sbatch_options(word) == option

REFUSED = """
import json, os, sys
from nwrepro.experiments.slurm import run_in_queue, sbatch_options
from nwrepro.experiments.grid import expand_grid, make_points
for own, variables in json.loads(sys.argv[2]):
    os.environ.update(variables)
    try: run_in_queue(make_points(expand_grid(json.loads(sys.argv[1]) | own.pop('given', {}))), lambda running, failed: None, hours=1, options=sbatch_options(own.get('sbatch')))
    except ValueError as error: print(error)
"""

@pytest.mark.slow
def test_what_the_queue_refuses_is_one_sentence(project, queue):
    gone = project/'slurm.conf'  # of a controller that is not there
    gone.write_text(re.sub('SlurmctldPort=.*', f'SlurmctldPort={free_ports(1)[0]}', Path(queue['SLURM_CONF']).read_text()))
    cases = [(dict(sbatch='--partition=gpus'), {}, 'sbatch refuses the job: invalid partition specified: gpus'), (dict(sbatch='-p gpus'), {}, "'-p' is no option"),
             (dict(given=dict(fresh=True)), {}, 'fresh = True would start'), ({}, dict(SLURM_CONF=str(gone)), 'cluster = slurm gets no answer from squeue')]
    (project/'refused.py').write_text(REFUSED)
    words = json.dumps(SMALL | dict(norm='wn')), json.dumps([(own, variables) for own, variables, _ in cases])
    done = subprocess.run([sys.executable, 'refused.py', *words], cwd=project, env=environment(queue), capture_output=True, text=True, timeout=300)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(cases), done.stdout+done.stderr
    for line, (_, _, sentence) in zip(said, cases, strict=True): assert sentence in line
    assert not (project/'reports/runs').exists()
