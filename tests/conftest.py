"What several test files use: threads, a copy of the project, its commands, real images where they are"
import os, shutil, signal, subprocess, sysconfig
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: the models here are small, and tests run side by side

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it, and so would the processes that tests interrupt

settings.register_profile('repeatable', deadline=None, derandomize=True)
settings.load_profile('repeatable')

ROOT = Path(__file__).resolve().parent.parent
FIVE = ('bn', 'none', 'wn', 'np', 'trelu')  # not the live table, to which others add

def git_files():
    "Files that are or would be committed, relative to the root; a test that needs them skips outside git"
    if not (ROOT/'.git').exists(): pytest.skip('not a git checkout, so there is no list of the files that belong to the project')
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split('\0')
    return sorted(n for n in names if n and (ROOT/n).is_file())

def snapshot(folder):
    "Every file under `folder` with its bytes, caches left out"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*'))
            if p.is_file() and '__pycache__' not in p.parts}

def run_in(folder, *command, **env):
    "Run one of the environment's commands in a copy of the project; its own copy of `nwrepro` comes first"
    script = Path(sysconfig.get_path('scripts'))/command[0]
    drop = 'IN_TEST', 'NWREPRO_DATA'
    env = {k: v for k, v in os.environ.items() if k not in drop} | {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'} | env
    return subprocess.run([script if script.exists() else command[0], *command[1:]], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)

@pytest.fixture
def project(tmp_path):
    "A copy of the files that belong to the project, free to change"
    for name in git_files():
        (tmp_path/'project'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, tmp_path/'project'/name)
    return tmp_path/'project'

@pytest.fixture(scope='session')
def imagenette():
    "Folder of the real Imagenette photographs, `{train,val}/nXXXXXXXX/*.JPEG`"
    data = Path(os.environ.get('NWREPRO_DATA') or ROOT/'data')
    found = [p for p in (data/'imagenette2-160', data/'imagenette2-320', data/'imagenette2') if (p/'train').is_dir() and (p/'val').is_dir()]
    if not found: pytest.skip(f'no Imagenette in {data}: see data/README.md for how to get it')
    return found[0]

@pytest.fixture(scope='session')
def browser():
    "Chromium of the system; skipped where there is none"
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install -e .[dev]')
    path = next((p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))), None)
    if not path: pytest.skip('no Chromium on this machine: install chromium to look at the page in a browser')
    with sync.sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield found
        found.close()
