"""ImageNet, dry: the first steps of a full-size run on a folder that only looks like ImageNet.

python tools/dry_imagenet.py PHOTOGRAPHS SCRATCH [--norms bn none wn np trelu] [--recipes paper modern] [--steps 2] [--micro_batch 32] [--precision bf16]
PHOTOGRAPHS holds JPEGs in folders. They are hard-linked, in turn, into the thousand class folders of SCRATCH/imagenet, one to train on and one to test on each,
so that nothing is learned; what is tried are the sizes: 1,000 classes, 224 px, global batch 256, 120 (`modern`: 100) epochs scheduled. Each run is killed after its first
step, goes on with the same command, evaluates, and is listed; at the end the report is made of all, in SCRATCH/reports."""
import argparse, itertools, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from timm.data import ImageNetInfo
from nwrepro.training.sources import check_imagenet
from nwrepro.training.runs import read_metrics

ROOT = Path(__file__).resolve().parent.parent

def lay_out(photographs, home):
    "A folder per class of ILSVRC2012, with hard links"
    pictures = itertools.cycle(sorted(p for p in Path(photographs).rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg')))
    for name in ImageNetInfo('imagenet-1k').label_names():
        for split in ('train', 'val'):
            (home/split/name).mkdir(parents=True)
            os.link(next(pictures), home/split/name/f'{name}_{split}.JPEG')

def start(scratch, flags):
    return subprocess.Popen([sys.executable, '-m', 'nwrepro.training', *flags], cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def tried(scratch, given):
    "One run, killed once: what came of it"
    flags, begin = [word for name, value in given.items() for word in (f'--{name}', str(value))], time.perf_counter()
    before = set(Path(scratch, 'reports/runs').glob('*'))
    first = start(scratch, flags)
    while first.poll() is None and not list(Path(scratch).glob('data/checkpoints/*/step-*.pt')): time.sleep(0.2)
    if first.poll() is not None: raise SystemExit(first.communicate()[0])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start(scratch, flags)
    said = second.communicate()[0]
    if second.returncode: raise SystemExit(said)
    folder, = set(Path(scratch, 'reports/runs').glob('*'))-before
    summary, events = json.loads((folder/'summary.json').read_text()), read_metrics(folder/'metrics.jsonl')
    shutil.rmtree(Path(scratch, 'data/checkpoints'))
    losses = [round(e['loss'], 3) for e in events if e['event'] == 'train']
    return dict(status=summary['status'], steps=summary['steps'], resumed_after=[e['step'] for e in events if e['event'] == 'resume'], losses=losses,
                val_loss=round(summary['val_loss'], 3), img_per_s=round(summary['img_per_s'], 1), seconds=round(time.perf_counter()-begin))

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition('\n')[0])
    parser.add_argument('photographs')
    parser.add_argument('scratch', type=Path)
    parser.add_argument('--norms', nargs='+', default=['bn', 'none', 'wn', 'np', 'trelu'])
    parser.add_argument('--recipes', nargs='+', default=['paper', 'modern'])
    parser.add_argument('--steps', type=int, default=2)
    parser.add_argument('--micro_batch', type=int, default=32)
    parser.add_argument('--precision', default='bf16')
    asked = parser.parse_args()
    home = asked.scratch/'imagenet'
    if not home.exists(): lay_out(asked.photographs, home)
    for name in ('nbs', 'reports'): (asked.scratch/name).mkdir(exist_ok=True)
    (asked.scratch/'settings.ini').touch()
    print(*check_imagenet(asked.scratch.resolve()), sep='\n', flush=True)
    for recipe, norm in itertools.product(asked.recipes, asked.norms):
        given = dict(norm=norm, recipe=recipe, data='imagenet', data_dir=asked.scratch.resolve(), max_steps=asked.steps, micro_batch=asked.micro_batch, precision=asked.precision, checkpoint_steps=1)
        print(recipe, norm, tried(asked.scratch, given), flush=True)
    shutil.copy(ROOT/'nbs/report.ipynb', asked.scratch/'nbs')
    subprocess.run([sys.executable, '-m', 'papermill', 'nbs/report.ipynb', 'reports/report.ipynb'], cwd=asked.scratch, check=True, capture_output=True)
    print(asked.scratch/'reports/index.html')

if __name__ == '__main__': main()
