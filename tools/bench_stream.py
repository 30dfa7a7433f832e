"""Resident memory while images are streamed from shards: python tools/bench_stream.py FOLDER SCRATCH [IMAGES]

FOLDER holds train/<class>/ and val/<class>/; its shards are written to SCRATCH/wds and kept there. IMAGES (200,000) is how many are
read and cut to 32 px in this process, in as many epochs as it takes. The last line holds the figures as JSON: MiB at the first and at
the last tenth, their ratio less 1, and images per second."""
import json, resource, statistics, sys, time
from pathlib import Path
from nwrepro.training.loader import Views, loader
from nwrepro.training.pipeline import pipelines
from nwrepro.training.sources import load_source
from nwrepro.training.shards import read_shards, write_shards

def resident():
    "Memory of this process, MiB"
    return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/2**20

folder, scratch, images = Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or [200_000])[0])
if not (scratch/'wds').exists(): write_shards(load_source('folder', folder), scratch/'wds', shard_mb=50)
source = read_shards('wds/wds', scratch/'wds')
views = Views(source.train, range(len(source.train)), pipelines(source, 32, 'period'), train=True, cache_mb=0)
seen, epoch, marks, start = 0, 0, [], time.perf_counter()
while seen < images:
    for x, _, _ in loader(views, epoch, batch_size=64):
        seen += len(x)
        marks.append((seen, resident()))
        if seen >= images: break
    epoch += 1
    print(f'{seen:,} images, {epoch} epochs, {resident():.0f} MiB', flush=True)
first, last = (statistics.median(mib for n, mib in marks if low*images < n <= high*images) for low, high in ((0.05, 0.15), (0.9, 1.1)))
print(json.dumps(dict(images=seen, shards=len(list((scratch/'wds').glob('*.tar'))), first=round(first, 1), last=round(last, 1), growth=round(last/first-1, 4),
                      img_per_s=round(seen/(time.perf_counter()-start), 1))))
