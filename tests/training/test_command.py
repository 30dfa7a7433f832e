"The command: flags, and a run that is passed on to several processes"
import ast, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT, git_files
from nwrepro.training import command
from nwrepro.training.checkpoint import release_lock
from nwrepro.training.command import main
from nwrepro.training.recipe import USUAL
from nwrepro.training.runs import read_metrics

def test_flags_are_not_abbreviated(capsys):
    "--proc would be another parameter as soon as a second one begins with it"
    with pytest.raises(SystemExit) as stopped: main(['--lr', '0', '--nor', 'wn'])
    assert stopped.value.code == 2 and 'unrecognized arguments: --nor wn' in capsys.readouterr().err

def test_a_wrong_flag_is_answered_in_one_sentence(capsys):
    with pytest.raises(SystemExit): main(['--nrom', 'wn'], 'nwrepro train')
    assert capsys.readouterr().err == 'nwrepro train: unrecognized arguments: --nrom wn (did you mean --norm?); nwrepro train --help lists what is accepted\n'

def test_help_begins_with_the_usual_parameters(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    assert re.findall(r'^  --(\w+)', capsys.readouterr().out, re.M)[:5] == list(USUAL)

def test_no_parser_takes_abbreviations():
    loose = []
    for name in [n for n in git_files() if n.startswith(('nwrepro/', 'tools/')) and n.endswith('.py')]:
        for node in ast.walk(ast.parse((ROOT/name).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'ArgumentParser':
                if not any(k.arg == 'allow_abbrev' and k.value.value is False for k in node.keywords): loose.append(name)
    assert loose == []

OTHER = """
import sys
from nwrepro.training.checkpoint import acquire_lock
from nwrepro.training.runs import Run
acquire_lock(Run(sys.argv[1]))
print('locked', flush=True)
input()
"""

def test_a_run_that_another_process_takes_in_between_is_left_to_it(tmp_path, monkeypatch, capsys):
    "The lock is free from when this process releases it until the first of the started ones has it"
    others = []
    def release_to_another(run):
        release_lock(run)
        others.append(subprocess.Popen([sys.executable, '-c', OTHER, run.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[0].stdout.readline() == 'locked\n'
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setattr(command, 'release_lock', release_to_another)
    given = dict(norm='wn', arch='resnet18', train_images=100, epochs=1, warmup_epochs=0, image_size=16, batch_size=20, max_steps=1, processes=2)
    try: assert main([word for k, v in given.items() for word in (f'--{k}', str(v))]) == 2
    finally: others[0].communicate('')
    assert f'is locked by process {others[0].pid} on ' in capsys.readouterr().out.splitlines()[-1]
    run, = Path('reports/runs').iterdir()
    assert read_metrics(run/'metrics.jsonl') == [] and not (run/'summary.json').exists()
