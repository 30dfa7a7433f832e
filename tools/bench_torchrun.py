"""What one process under torchrun costs against none: python tools/bench_torchrun.py [ROUNDS] [name=value ...]

Trains the same run in turn as `python -m nwrepro.training` and under `torchrun --nproc-per-node 1`, each in a project of its own, ROUNDS (7) times, and
prints images per second of training of each, and the median and the quartiles of the ratio of their times in the same round. Parameters are those of a
run; the default is 40 steps of ResNet-50 under `bn` on the digits."""
import json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

rounds = int((sys.argv[1:] or ['7'])[0])
given = dict(norm='bn', data='digits', max_steps=40, epochs=1, warmup_epochs=0) | dict(word.split('=', 1) for word in sys.argv[2:])
flags = [word for name, value in given.items() for word in (f'--{name}', str(value))]
ways = dict(alone=[], torchrun=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '1'])
env = os.environ | dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS') or str(len(os.sched_getaffinity(0))))  # torchrun would give each process one thread
ratios = []
for k in range(rounds):
    pace = {}
    for way in list(ways)[::-1 if k % 2 else 1]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, 'settings.ini').touch()
            subprocess.run([sys.executable, *ways[way], '-m', 'nwrepro.training', *flags], cwd=folder, env=env, check=True, capture_output=True)
            summary = json.loads(next(Path(folder).glob('reports/runs/*/summary.json')).read_text())
        pace[way] = summary['img_per_s']
    ratios.append(pace['alone']/pace['torchrun'])
    print({way: round(value, 1) for way, value in pace.items()}, f'time under torchrun / alone {ratios[-1]:.3f}', flush=True)
low, middle, high = statistics.quantiles(ratios, n=4)
print(f'median {middle:.3f}, quartiles {low:.3f} to {high:.3f}, {rounds} rounds')
