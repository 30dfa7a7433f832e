"""What the images cost: images/s of the period and the modern pipeline from JPEG files and from prepared shards, against torchvision's `ImageFolder`,
timm's `create_loader` and webdataset with the same transforms, and where the time goes.

python tools/bench_loader.py FOLDER [--image_size 224] [--workers 0] [--images 400] [--rounds 7] [--pipelines period modern]
FOLDER holds a folder of photographs for each class; shards of them are written to a temporary folder. One thread for each process; the loaders run in turn in one
process, after a round that does not count; medians over rounds, and of the ratios to torchvision in the same round. 'nwrepro' reads the files, 'jpeg' and 'lossless'
are its prepared shards, 'kept' is nwrepro with its prepared images in memory, as from a run's second epoch, which only the main process has.
"""
import argparse, statistics, tempfile, time
from pathlib import Path
import timm, torch, torchvision, webdataset
from timm.data import ImageDataset, create_loader
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, Resize, ToTensor
from nwrepro.training.loader import Views, key, kept_random_state, loader, set_random_state
from nwrepro.training.pipeline import PIPELINES, pipelines
from nwrepro.training.data import Images, Source
from nwrepro.training.layouts import read_split
from nwrepro.training.shards import read_shards, write_shards

def transforms(kind, size):
    "The random part of a pipeline as torchvision has it, up to an image"
    if kind == 'modern': return [RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), RandomHorizontalFlip()]
    side = round(size*256/224)
    return [Resize((side, side)), RandomCrop(size), RandomHorizontalFlip()]

def repeated(samples, n): return (samples*(n//len(samples)+1))[:n]

def to_tensor(kind, source, asked): return Compose([*transforms(kind, asked.image_size), ToTensor(), Normalize(source.mean, source.std)])

def by_torchvision(folder, kind, source, asked):
    data = ImageFolder(folder, to_tensor(kind, source, asked))
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

def by_webdataset(folder, kind, source, asked):
    "The originals as a stream, from one shard for each process that loads"
    shards = [str(path) for path in sorted(folder.glob('train-*.tar'))]*max(1, asked.workers)
    stream = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(100).decode('pil').to_tuple('jpg', 'cls')
    samples = stream.map_tuple(to_tensor(kind, source, asked), int).repeat()
    batches = samples.batched(asked.batch_size, partial=False).with_epoch(asked.images//asked.batch_size//max(1, asked.workers))
    return lambda epoch: webdataset.WebLoader(batches, batch_size=None, num_workers=asked.workers)

def by_nwrepro(views, asked): return lambda epoch: loader(views, epoch, asked.batch_size, workers=asked.workers)

def source_of(folder):
    "All images of a folder to train on, and two of them for the split that shards must have besides"
    images, classes, _ = read_split(folder)
    train, val = (Images(images.items, images.labels[:n], split, images.root) for split, n in (('train', None), ('val', 2)))
    return Source('folder', classes, train, val)

def shards_of(source, folder, **how):
    "A source in shards"
    write_shards(source, folder, **how)
    return read_shards(f'wds/{folder.name}', folder)

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
                              ('augment', views.pipeline.augment, None), ('collate', default_collate, 'all'), ('standardise', views.pipeline.standardise, 'all')):
        begin = time.perf_counter()
        done = part(results) if given == 'all' else [part(item) for item in (results if given is None else given)]
        ms[name] = 1e3*(time.perf_counter()-begin)/len(indices)
        if name != 'random state': results = done
    return ms

def measure(kind, asked, folder, scratch):
    "Print the loaders of one pipeline, and the parts of those of nwrepro"
    source = source_of(folder)
    side = round(asked.image_size*256/224)
    originals, jpeg, lossless = (shards_of(source, scratch/f'{kind}-{name}', **how) for name, how in (
        ('originals', {}), ('jpeg', dict(side=side, pipeline=kind)), ('lossless', dict(side=side, pipeline=kind, quality=None))))
    def views(source, cache_mb=0):
        indices = repeated(list(range(len(source.train))), asked.images)
        return Views(source.train, indices, pipelines(source, asked.image_size, kind), True, cache_mb=cache_mb)
    own = {'nwrepro': views(source), 'jpeg': views(jpeg), 'lossless': views(lossless)}
    others = {'torchvision': by_torchvision(folder, kind, source, asked), 'timm': by_timm(folder, kind, source, asked),
              'webdataset': by_webdataset(scratch/f'{kind}-originals', kind, source, asked)}
    loaders = {name: by_nwrepro(of, asked) for name, of in own.items()} | others
    if not asked.workers: loaders['kept'] = by_nwrepro(views(source, 8192), asked)
    rounds = [{name: rate(batches(epoch)) for name, batches in loaders.items()} for epoch in range(asked.rounds+1)][1:]
    for name in loaders:
        ratios = sorted(r[name]/r['torchvision'] for r in rounds)
        print(f'{kind:6} {name:11} {statistics.median(r[name] for r in rounds):7.1f} images/s  {statistics.median(ratios):.3f} of torchvision ({ratios[0]:.3f} to {ratios[-1]:.3f})')
    for name, of in own.items():
        with kept_random_state(): parts = [stages(of, asked.batch_size) for _ in range(asked.rounds+1)][1:]
        print(f'{kind:6} {name:11} ms per image: ' + ', '.join(f'{part} {statistics.median(p[part] for p in parts):.3f}' for part in parts[0]))

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    for name, default in (('image_size', 224), ('workers', 0), ('images', 400), ('batch_size', 50), ('rounds', 7)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--pipelines', nargs='+', choices=PIPELINES, default=PIPELINES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f'{asked.image_size} px, batch {asked.batch_size}, {asked.workers} workers, {asked.rounds} rounds of {asked.images} images; '
          f'torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, webdataset {webdataset.__version__}')
    with tempfile.TemporaryDirectory() as scratch:
        for kind in asked.pipelines: measure(kind, asked, asked.folder, Path(scratch))

if __name__ == '__main__': main()
