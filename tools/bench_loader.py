"""What the images cost: images/s of the period and the modern pipeline from JPEG files, against torchvision's `ImageFolder` and timm's `create_loader` with the same transforms, and where the time goes.

python tools/bench_loader.py FOLDER [--image_size 224] [--workers 0] [--images 400] [--rounds 7] [--pipelines period modern]
FOLDER holds a folder of photographs for each class. One thread for each process; the loaders run in turn in one process, after a round that does not count; medians over rounds,
and of the ratios of nwrepro to the others in the same round. 'kept' is nwrepro with its prepared images in memory, as from a run's second epoch, which only the main process has.
"""
import argparse, statistics, time
from pathlib import Path
import timm, torch, torchvision
from timm.data import ImageDataset, create_loader
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, Resize, ToTensor
from nwrepro.training.pipeline import PIPELINES, Views, key, kept_random_state, loader, pipelines, set_random_state
from nwrepro.training.data import Source
from nwrepro.training.layouts import read_split

def transforms(kind, size):
    "The random part of a pipeline as torchvision has it, up to an image"
    if kind == 'modern': return [RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), RandomHorizontalFlip()]
    side = round(size*256/224)
    return [Resize((side, side)), RandomCrop(size), RandomHorizontalFlip()]

def repeated(samples, n): return (samples*(n//len(samples)+1))[:n]

def by_torchvision(folder, kind, source, asked):
    data = ImageFolder(folder, Compose([*transforms(kind, asked.image_size), ToTensor(), Normalize(source.mean, source.std)]))
    data.samples = repeated(data.samples, asked.images)
    return lambda epoch: DataLoader(data, asked.batch_size, shuffle=True, num_workers=asked.workers)

def by_timm(folder, kind, source, asked):
    "timm's fastest form: bytes are collated, and the batch is standardised"
    data = ImageDataset(str(folder))
    data.reader.samples = repeated(data.reader.samples, asked.images)
    made = create_loader(data, asked.image_size, asked.batch_size, is_training=True, color_jitter=None, interpolation='bicubic', mean=source.mean, std=source.std,
                         num_workers=asked.workers, device=torch.device('cpu'), persistent_workers=False)
    if kind == 'period': data.transform = Compose([*transforms(kind, asked.image_size), MaybePILToTensor()])
    return lambda epoch: made

def by_nwrepro(views, asked): return lambda epoch: loader(views, epoch, asked.batch_size, workers=asked.workers)

def rate(batches):
    "Images/s of one epoch"
    begin, n = time.perf_counter(), 0
    for x, *_ in batches: n += len(x)
    return n/(time.perf_counter()-begin)

def stages(views, batch_size):
    "Milliseconds per image of each part, one after the other on the same images"
    ms, indices, results = {}, views.indices[:batch_size], views.indices[:batch_size]
    def random_state(i): set_random_state(key(views.seed, 0, i))
    for name, part, given in (('read and decode', views.images.load, indices), ('prepare', views.pipeline.prepare, None), ('random state', random_state, indices),
                              ('augment', views.pipeline.augment, None), ('collate', None, None)):
        begin = time.perf_counter()
        done = [part(item) for item in (results if given is None else given)] if part else default_collate(results)
        ms[name] = 1e3*(time.perf_counter()-begin)/len(indices)
        if name != 'random state': results = done
    return ms

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    for name, default in (('image_size', 224), ('workers', 0), ('images', 400), ('batch_size', 50), ('rounds', 7)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--pipelines', nargs='+', choices=PIPELINES, default=PIPELINES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    images, classes, _ = read_split(asked.folder)
    source = Source('folder', classes, images, images)
    print(f'{len(images)} images, {asked.image_size} px, batch {asked.batch_size}, {asked.workers} workers, {asked.rounds} rounds of {asked.images} images; '
          f'torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}')
    for kind in asked.pipelines:
        def views(cache_mb): return Views(images, repeated(list(range(len(images))), asked.images), pipelines(source, asked.image_size, kind), True, cache_mb=cache_mb)
        loaders = {'nwrepro': by_nwrepro(views(0), asked), 'torchvision': by_torchvision(asked.folder, kind, source, asked), 'timm': by_timm(asked.folder, kind, source, asked)}
        if not asked.workers: loaders['kept'] = by_nwrepro(views(8192), asked)
        rounds = [{name: rate(batches(epoch)) for name, batches in loaders.items()} for epoch in range(asked.rounds+1)][1:]
        for name in loaders:
            ratios = sorted(r['nwrepro']/r[name] for r in rounds)
            print(f'{kind:6} {name:11} {statistics.median(r[name] for r in rounds):7.1f} images/s  nwrepro is {statistics.median(ratios):.3f} of it ({ratios[0]:.3f} to {ratios[-1]:.3f})')
        with kept_random_state(): parts = [stages(views(0), asked.batch_size) for _ in range(asked.rounds+1)][1:]
        print(f'{kind:6} ms per image: ' + ', '.join(f'{name} {statistics.median(p[name] for p in parts):.3f}' for name in parts[0]))

if __name__ == '__main__': main()
