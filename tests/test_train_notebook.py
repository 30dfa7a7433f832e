"train.ipynb as papermill runs it: a parameter reaches the run, and a misspelt one stops it"
import ast, fcntl, json, os, pty, re, struct, subprocess, sysconfig, termios
from pathlib import Path

import nbformat, papermill, pytest

from conftest import ROOT, run_in
from nwrepro.training.recipe import USUAL

SMALL = '-p data digits -p arch resnet18 -p max_steps 2'.split()

def runs(project): return [p for p in (project/'reports/runs').glob('*') if p.is_dir()]

def recorded(project, name):
    "One file of the only run that the project holds"
    run, = runs(project)
    return json.loads((run/name).read_text())

def test_norm_survives_cleaning_and_reaches_the_run(project):
    assert run_in(project, 'nbdev_clean').returncode == 0
    done = run_in(project, 'papermill', 'nbs/train.ipynb', 'reports/wn.ipynb', '-p', 'norm', 'wn', *SMALL)
    assert done.returncode == 0, done.stderr
    assert recorded(project, 'config.json')['norm'] == 'wn'
    summary = recorded(project, 'summary.json')
    assert (summary['norm'], summary['status'], summary['arch']) == ('wn', 'finished', 'resnet18')
    assert ' left]' not in done.stderr  # a progress bar is for a terminal
    last, = nbformat.read(project/'reports/wn.ipynb', 4).cells[-1].outputs
    assert last['data']['text/markdown'] == f"**wn on digits, seed 0: finished, test top-1 {summary['top1']:.2f} %, training top-1 {summary['train_top1']:.2f} %**"

def through_a_terminal(command, **kwargs):
    "What a command writes to the terminal that its stderr is"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 140, 0, 0))  # lines and columns: on no columns tqdm draws nothing
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, **kwargs):
        os.close(slave)
        parts = []
        while True:
            try: parts.append(os.read(master, 4096))
            except OSError: break  # the last process that had it is gone
    os.close(master)
    return b''.join(parts).decode()

def test_a_terminal_shows_how_far_the_training_is(project):
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA', 'PYTEST_CURRENT_TEST', 'JPY_SESSION_NAME')} | {'PYTHONPATH': str(project)}
    command = [Path(sysconfig.get_path('scripts'))/'papermill', 'nbs/train.ipynb', 'reports/wn.ipynb', '-p', 'norm', 'wn', *SMALL, '-p', 'max_steps', '6']
    shown = through_a_terminal(command, cwd=project, env=env)
    assert recorded(project, 'summary.json')['status'] == 'finished', shown
    metrics = [json.loads(line) for line in (project/'reports/runs'/runs(project)[0].name/'metrics.jsonl').read_text().splitlines()]
    train = [line for line in metrics if line['event'] == 'train'][-1]
    assert re.search(rf"wn epoch 0\.14 of 0\.136\d* \|.*\| loss {train['loss']:.3f}, top-1 {train['top1']:.1f} %, test top-1 [\d.]+ % \[[\d:]+, [\d:?]+ left\]", shown), shown
    assert ' left]' not in (project/'reports/wn.ipynb').read_text()

@pytest.mark.parametrize('name', ['train', 'sweep'])
def test_the_usual_parameters_come_first(name):
    cell, = [c for c in nbformat.read(ROOT/f'nbs/{name}.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])]
    first = cell.source.partition('\n\n')[0]
    assert [line.partition(':')[0] for line in first.splitlines()] == list(USUAL) and len(USUAL) == 5

def test_misspelt_parameter_stops_and_names_the_nearest(project):
    done = run_in(project, 'papermill', 'nbs/train.ipynb', 'reports/wn.ipynb', '-p', 'nrom', 'wn', *SMALL)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"\bnrom\b.*\bnorm\b", last), done.stderr
    assert runs(project) == []

@pytest.mark.slow
def test_run_is_recorded_without_an_output_path(project):
    out = project/'out.ipynb'
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'NWREPRO_DATA')} | {'PYTHONPATH': str(project)}
    with out.open('w') as f:
        done = subprocess.run([Path(sysconfig.get_path('scripts'))/'papermill', 'nbs/train.ipynb', '-p', 'norm', 'wn', *SMALL], cwd=project,
                              env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert recorded(project, 'summary.json')['norm'] == 'wn'
    assert any('injected-parameters' in c.metadata.get('tags', []) for c in nbformat.read(out, 4).cells)

def test_help_explains_every_parameter(project):
    cell, = [c for c in nbformat.read(project/'nbs/train.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])]
    assigned = [n.target.id if isinstance(n, ast.AnnAssign) else n.targets[0].id for n in ast.parse(cell.source).body]
    parameters = papermill.inspect_notebook(str(project/'nbs/train.ipynb'))
    assert list(parameters) == assigned  # papermill leaves out a line with a second `=`, be it in the comment, or a `|` in its type
    assert [name for name, p in parameters.items() if not p['help'].strip()] == []
    assert [name for name, p in parameters.items() if p['inferred_type_name'] == 'None'] == []
    done = run_in(project, 'papermill', '--help-notebook', 'nbs/train.ipynb')
    assert done.returncode == 0, done.stderr
    assert [p['help'] for p in parameters.values() if ' '.join(p['help'].split()) not in ' '.join(done.stdout.split())] == []
