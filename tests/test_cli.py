"The command `nwrepro`: what it starts, what it says to wrong words, and the wheel that brings it"
import json, os, subprocess, sys, sysconfig, venv
from pathlib import Path

import pytest

from conftest import ROOT, run_in
from nwrepro import __version__, cli

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    return tmp_path

SMALL = '--data digits --arch resnet18 --stem cifar --width 0.25 --image_size 16 --train_images 100 --batch_size 20 --bn_batch 10 --epochs 1 --warmup_epochs 0 --max_steps 2'.split()

def test_train_report_and_export(elsewhere, capsys):
    pytest.importorskip('onnxruntime')
    assert cli.main(['train', '--norm', 'wn', *SMALL]) == 0
    assert cli.main(['report']) == 0 and capsys.readouterr().out.splitlines()[-1] == 'reports/index.html'
    assert 'wn-digits-resnet18-s0' in (elsewhere/'reports/index.html').read_text()
    assert cli.main(['export', 'run.onnx']) == 0 and (elsewhere/'run.onnx').stat().st_size > 2e6
    assert cli.main(['export', 'weights/wn', '--dtype', 'bf16']) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('weights/wn holds README.md, config.json, model.safetensors')

def test_version_and_help_are_there_at_once(elsewhere):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nwrepro.cli import main; print(main(['--version']), main(['--help'])); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'nwrepro {__version__}\n') and all(f'\n{name} ' in done.stdout for name in cli.COMMANDS)

BAD = [(['tain'], 2, "unknown command 'tain': did you mean 'train'? accepted: train, report, export"), (['train', '--lr', '0'], 2, 'lr = 0 is not accepted'), (['train', '--norm', 'vn'], 2, "unknown norm 'vn'"),
       (['report', '--runs', 'nowhere'], 2, 'nowhere: no such folder of runs'), (['export', 'x.onnx'], 2, 'no finished run has its weights here'),
       (['train', '--nrom', 'wn'], None, 'nwrepro train: unrecognized arguments: --nrom wn (did you mean --norm?)'), (['export'], None, 'nwrepro export: the following arguments are required: output'),
       (['report', '--rnus', 'x'], None, 'nwrepro report: unrecognized arguments: --rnus x (did you mean --runs?)')]

@pytest.mark.parametrize('words, code, sentence', BAD, ids=[' '.join(words) for words, _, _ in BAD])
def test_wrong_words_are_answered_in_one_sentence(words, code, sentence, elsewhere, capsys):
    if code: assert cli.main(words) == code
    else:
        with pytest.raises(SystemExit) as stopped: cli.main(words)
        assert stopped.value.code == 2
    printed = capsys.readouterr()
    answer = printed.out+printed.err
    assert answer.startswith(sentence) and answer.count('\n') == 1 and list(elsewhere.iterdir()) == []

@pytest.mark.slow
def test_the_wheel_installs_and_trains_without_the_repository(project, tmp_path):
    pytest.importorskip('setuptools', minversion='70.1', reason='builds wheels itself from 70.1 on')
    built = run_in(project, sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), str(project))
    assert built.returncode == 0, built.stderr
    home, away = tmp_path/'venv', tmp_path/'away'
    away.mkdir()
    venv.create(home, with_pip=True)
    site, = home.glob('lib/python*/site-packages')
    (site/'packages.pth').write_text(sysconfig.get_path('purelib')+'\n')  # torch and the others, which come after what is installed here
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'IN_TEST', 'NWREPRO_DATA')}
    def run(*words): return subprocess.run([str(home/'bin'/words[0]), *words[1:]], cwd=away, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheel, = tmp_path.glob('nwrepro-*.whl')
    installed = run('python', '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', str(wheel))
    assert installed.returncode == 0, installed.stderr
    assert Path(run('python', '-c', 'import nwrepro; print(nwrepro.__file__)').stdout.strip()).is_relative_to(site)
    assert run('nwrepro', '--version').stdout == f'nwrepro {__version__}\n'
    trained = run('nwrepro', 'train', '--norm', 'wn', *SMALL)
    assert trained.returncode == 0, trained.stdout+trained.stderr
    record, = (away/'reports/runs').iterdir()
    assert json.loads((record/'summary.json').read_text())['status'] == 'finished'
    for words in (['report'], ['export', 'weights']):
        done = run('nwrepro', *words)
        assert done.returncode == 0, done.stdout+done.stderr
    loaded = run('python', '-c', "from nwrepro import load_model; print(sum(p.numel() for p in load_model('weights').parameters()))")
    assert int(loaded.stdout) > 500_000, loaded.stderr
