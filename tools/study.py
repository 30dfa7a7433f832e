"""The second study, on CIFAR-10: what is to be run, and the next of it

python tools/study.py list                    what has ended, and what is to come as far as results tell already
python tools/study.py run --minutes 120       train the next runs, two at a time, none that would not end in time
python tools/study.py pack NAME               put what has ended since into reports/cifar10/NAME.zip

Runs are trained in FOLDER (../study, or --folder), a clone at COMMIT with an environment of its own, so that all have the same code.
"""
import argparse, itertools, math, os, signal, subprocess, sys, time
from pathlib import Path
from nwrepro.training.recipe import DEFAULTS, check_parameters
from nwrepro.training.records import pack, records
from nwrepro.training.runs import RESULTS, canonical
from nwrepro.experiments.tuning import LR_BOUNDS, PROBE_STEPS, largest_lr, learns

ROOT = Path(__file__).parents[1]
REPORT = ROOT/'reports'/'cifar10'
COMMIT = '99e86c2'
JOBS = 2

COMMON = dict(data='cifar10-jpeg', arch='resnet18', stem='cifar', width=0.25, precision='bf16', batch_size=128, bn_batch=32, decay_on='v+w+g+b+gamma+beta+u', augment='mirror', eval_images=10_000)

# -- what has been tried for a regime, in order; chosen by training accuracy alone
SUBSET = dict(train_images=25_000, holdout=0.1, epochs=60)  # half of the images: 22,500 to train on, 2,500 held out
PILOT = [COMMON | dict(eval_every=5) | one for one in (
    dict(norm='bn', lr=0.2, weight_decay=2e-3, epochs=20, holdout=0.1),
    dict(norm='wn', lr=0.1, weight_decay=2e-3, epochs=20, holdout=0.1),
    SUBSET | dict(norm='wn', lr=0.1, weight_decay=3.3e-3),
    SUBSET | dict(norm='wn', lr=0.1, weight_decay=1.5e-3),
    SUBSET | dict(norm='wn', lr=0.4, weight_decay=8e-4),
    dict(norm='wn', lr=0.4, weight_decay=8e-4, epochs=30, holdout=0.1),
    dict(norm='bn', lr=0.4, weight_decay=8e-4, epochs=30, holdout=0.1),
    dict(norm='wn', lr=0.8, weight_decay=5e-4, epochs=30, holdout=0.1),
    dict(norm='wn', lr=0.8, weight_decay=8e-4, epochs=30, holdout=0.1),
    dict(norm='wn', lr=0.4, weight_decay=7e-4, epochs=36, holdout=0.1),
    dict(norm='bn', lr=0.4, weight_decay=7e-4, epochs=36, holdout=0.1),
)]

# -- what all later parts share; None until the pilot has ended
REGIME = None

ARMS = dict(bn=dict(norm='bn'), bn_zero=dict(norm='bn', zero_init=True), none=dict(norm='none', init='norm_preserving'), wn=dict(norm='wn', init='norm_preserving'),
            wn_torch=dict(norm='wn', init='torch'), wn_data=dict(norm='wn', init='data'), np=dict(norm='np'), trelu=dict(norm='trelu', init='even'))
CANDIDATES, BEYOND = (0.025, 0.05, 0.1, 0.2, 0.4), 3  # learning rates of every arm, and how often a list may be lengthened
TUNING, FINAL, LADDER = (0, 1), range(10, 15), range(20, 25)  # seeds

def key(given):
    "What a record holds of the parameters of its command"
    return canonical({name: value for name, value in check_parameters(given).items() if value != DEFAULTS.get(name)})

def tuned(arm, score):
    "Runs that choose the learning rate of an arm, and the choice; `score` of a run is None where it has not ended. The choice is None until all have"
    def run(lr, seed): return COMMON | REGIME | ARMS[arm] | dict(holdout=0.1, eval_every=5, lr=lr, seed=seed)
    tried = list(CANDIDATES)
    for _ in range(BEYOND+1):
        runs, scores = [run(lr, TUNING[0]) for lr in tried], [score(run(lr, TUNING[0])) for lr in tried]
        if None in scores: return runs, None
        best = tried[scores.index(max(scores))]
        more = [best/2]*(best == min(tried)) + [best*2]*(best == max(tried))
        if not more or len(tried) == len(CANDIDATES)+BEYOND: break
        tried += more
    first_two = sorted(tried, key=lambda lr: -score(run(lr, TUNING[0])))[:2]
    again = [run(lr, TUNING[1]) for lr in first_two]
    means = [None if score(second) is None else score(run(lr, TUNING[0]))+score(second) for lr, second in zip(first_two, again, strict=True)]
    return runs+again, None if None in means else first_two[means.index(max(means))]

def rungs(arm, warmup, seed, ended):
    "Probes of 200 steps at full learning rate, from 16 down until two in a row learn"
    batches = (REGIME.get('train_images') or 50_000)//COMMON['batch_size']
    steps, tried, lr = round(warmup*batches)+PROBE_STEPS, {}, LR_BOUNDS[1]
    while lr >= LR_BOUNDS[0] and not largest_lr(tried).learns:
        given = COMMON | REGIME | ARMS[arm] | dict(lr=lr, seed=seed, warmup_epochs=warmup, max_steps=steps, epochs=math.ceil(20*steps/batches), eval_every=1000)
        yield given
        if key(given) not in ended: return
        tried[lr] = learns(ended[key(given)])
        lr /= 2

def wanted(ended):
    "Runs in order, as far as the records in `ended` tell which"
    yield from PILOT
    if not REGIME: return
    def score(given): return (ended[key(given)].summary.get('top1') or 0.) if key(given) in ended else None
    plans = {arm: tuned(arm, score) for arm in ARMS}
    for runs, _ in plans.values(): yield from runs
    for seed, (arm, (_, lr)) in itertools.product(FINAL, plans.items()):
        if lr: yield COMMON | REGIME | ARMS[arm] | dict(eval_every=2, lr=lr, seed=seed)
    for seed, (arm, warmup) in itertools.product(LADDER, [*((arm, 1.) for arm in ARMS), ('bn', 0.), ('wn', 0.)]): yield from rungs(arm, warmup, seed, ended)

def found(folder):
    "Records of runs that have ended, here and in the clone, by `key`"
    own = [r for home in (REPORT, folder/'reports'/'runs') for r in records(home)]
    return {canonical(r.config['given']): r for r in reversed(own) if r.status in RESULTS and 'given' in r.config}

def prepared(folder):
    "Python of the clone, which is made where it is not there"
    python = folder/'.venv'/'bin'/'python'
    def say(*command): subprocess.run(command, check=True, cwd=folder.parent)
    if not folder.exists():
        say('git', 'clone', '-q', ROOT, folder)
        say('git', '-C', folder, 'checkout', '-q', '--detach', COMMIT)
    if not python.exists():
        say(sys.executable, '-m', 'venv', folder/'.venv')
        say(python, '-m', 'pip', 'install', '-q', '-c', folder/'requirements-tested.txt', 'torch', 'torchvision')
        say(python, '-m', 'pip', 'install', '-q', '-c', folder/'requirements-tested.txt', '-e', folder)
    return python

def minutes(given, ended):
    "How long a run takes on a quiet core, by the fastest that has ended with the same network"
    def steps(g): return g.get('max_steps') or g['epochs']*(g.get('train_images') or 50_000)*(1-g.get('holdout', 0))/g['batch_size']
    known = [r.summary['wall_s']/r.summary['steps'] for r in ended.values() if r.status == 'finished' and r.config['arch'] == given['arch'] and r.config['width'] == given['width']]
    return 1+steps(given)*1.25*min(known, default=0.3)/60

def run(folder, limit):
    "Train what comes next until `limit` minutes are over; a signal stops all runs with their steps saved"
    python, start, running, failed = prepared(folder), time.monotonic(), {}, set()
    env = os.environ | dict(OMP_NUM_THREADS='1', NWREPRO_DATA=os.environ.get('NWREPRO_DATA', str(ROOT/'data')))
    def stop(*_):
        for process in running.values(): process.send_signal(signal.SIGINT)
        raise SystemExit(75)
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
    while True:
        for name, process in list(running.items()):
            if process.poll() is None: continue
            del running[name]
            if process.returncode: failed.add(name)
            print(f'{(time.monotonic()-start)/60:.0f} min  ended with {process.returncode}: {name}', flush=True)
        ended = found(folder)
        left = limit-(time.monotonic()-start)/60
        new = (given for given in wanted(ended) if not {key(given)} & {*ended, *running, *failed} and minutes(given, ended) < left)
        for given in itertools.islice(new, JOBS-len(running)):
            words = [word for name, value in given.items() for word in (f'--{name}', str(value))]
            running[key(given)] = subprocess.Popen(['nice', '-n', '19', python, '-m', 'nwrepro.training', *words], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(f'{(time.monotonic()-start)/60:.0f} min  started: {key(given)}', flush=True)
        if not running: break
        time.sleep(5)

def show(folder):
    "A line for each run that is wanted, with its result"
    ended = found(folder)
    for given in wanted(ended):
        record = ended.get(key(given))
        result = f"{record.status} {record.summary.get('top1') or 0:.2f} {record.summary.get('train_top1') or 0:.2f}" if record else 'to come'
        print(result, {name: value for name, value in given.items() if COMMON.get(name) != value})

def pack_ended(folder, name):
    "What has ended in the clone and is not here yet, in one pack"
    here = {r.name for r in records(REPORT)}
    asked = {key(given) for given in wanted(found(folder))}
    new = [r for r in records(folder/'reports'/'runs') if r.status in RESULTS and r.name not in here and canonical(r.config['given']) in asked]
    print(pack(new, REPORT/f'{name}.zip'), f'holds {len(new)} runs')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['list', 'run', 'pack'])
    parser.add_argument('name', nargs='?', help='of a pack')
    parser.add_argument('--minutes', type=float, default=120)
    parser.add_argument('--folder', type=Path, default=ROOT.parent/'study')
    asked = parser.parse_args()
    if asked.what == 'list': show(asked.folder)
    elif asked.what == 'run': run(asked.folder, asked.minutes)
    else: pack_ended(asked.folder, asked.name)
