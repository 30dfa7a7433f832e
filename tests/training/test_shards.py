"Shards of real images: the same run as from their folder, read by others too, whole or named, memory that stays"
import fcntl, hashlib, io, json, os, re, shutil, struct, subprocess, sys, tarfile, termios
from pathlib import Path
import pytest, timm.data, torch
from PIL import Image

from conftest import ROOT
from nwrepro.training.data import Images
from nwrepro.training.loader import Views, loader
from nwrepro.training.pipeline import pipelines, image_to_bytes, resize
from nwrepro.training.sources import load_source
from nwrepro.training.shards import Prepare, write_shards
from nwrepro.training.command import main

@pytest.fixture(scope='module')
def few(imagenette_few, tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    source = load_source('folder', imagenette_few)
    write_shards(source, folder/'few-wds', shard_mb=0.2)
    return source, folder

@pytest.fixture(scope='module')
def imagenette_few(imagenette, tmp_path_factory):
    "Twelve photographs of each of three classes to train on, four to test on"
    folder = tmp_path_factory.mktemp('few')
    for split, n in (('train', 12), ('val', 4)):
        for kind in sorted((imagenette/split).iterdir())[:3]:
            (folder/split/kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[:n]: shutil.copy(path, folder/split/kind.name)
    return folder

def test_same_images_same_order_same_views(few):
    source, folder = few
    back = load_source('wds/few-wds', folder)
    assert back.classes == source.classes and back.train.labels == source.train.labels and len(list((folder/'few-wds').glob('train-*.tar'))) > 1
    for i in range(len(source.train)):
        with source.train.items[i][0] as f: assert back.train.items[i][0].read() == f.read()
        assert back.train.name(i).split('.')[0] == source.train.name(i).split('.')[0]
    batches = []
    for images in (source, back):
        views = Views(images.train, list(range(36)), pipelines(images, 32, 'modern'), train=True)
        batches.append([b for epoch in range(2) for b in loader(views, epoch, batch_size=8, workers=epoch)])
    assert all(torch.equal(a, b) for one, other in zip(*batches, strict=True) for a, b in zip(one, other, strict=True))

def test_a_stream_meets_the_classes_mixed_and_each_time_in_the_same_order(few, tmp_path):
    source, folder = few
    write_shards(source, tmp_path/'again-wds', shard_mb=0.2)
    sums = [(place/'SHA256SUMS').read_text() for place in (folder/'few-wds', tmp_path/'again-wds')]
    assert sums[0] == sums[1]
    with tarfile.open(folder/'few-wds'/'train-000000.tar') as tar:
        met = [int(tar.extractfile(member).read()) for member in tar if member.name.endswith('.cls')]
    assert len(set(met)) == 3 and met != sorted(met)

def test_checksums_are_those_of_sha256sum(few):
    folder = few[1]/'few-wds'
    done = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(': OK') == len(list(folder.iterdir()))-1

def test_timm_reads_them_as_a_stream(few):
    "The reader of others finds every image under its label"
    source, folder = few
    def digest(image): return hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()
    for split, images in (('train', source.train), ('val', source.val)):
        stream = timm.data.create_dataset('wds/', root=str(folder/'few-wds'), split=split)
        seen = sorted((digest(image), label) for image, label in stream)
        assert seen == sorted((digest(images.load(i)), y) for i, y in enumerate(images.labels))

@pytest.mark.parametrize('side', (None, 37))
def test_a_run_from_shards_is_the_run_from_the_folder(few, imagenette_few, tmp_path, monkeypatch, side):
    "To the bit, also where lossless shards hold what the period pipeline prepares for 32 pixels"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    given = dict(norm='wn', arch='resnet18', image_size=32, epochs=1, warmup_epochs=0, batch_size=12, lr=0.01, compile='off')
    if side: write_shards(few[0], tmp_path/'data/few-wds', side=side, quality=None)
    for data, where in (('folder', imagenette_few), ('wds/few-wds', tmp_path/'data' if side else few[1])):
        assert main([word for k, v in (given | dict(data=data, data_dir=where)).items() for word in (f'--{k}', str(v))]) == 0
    one, other = [json.loads(path.read_text()) for path in sorted(Path('reports/runs').glob('*/summary.json'))]
    assert one['val_loss'] == other['val_loss'] and one['train_loss'] == other['train_loss'] and one['data'] != other['data']

def test_a_shard_that_is_cut_or_missing_is_one_sentence(few, tmp_path, monkeypatch, capsys):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few[1]/'few-wds', tmp_path/'data/few-wds')
    shard = tmp_path/'data/few-wds/train-000001.tar'
    with shard.open('r+b') as f: f.truncate(50_000)
    command = ['--data', 'wds/few-wds', '--data_dir', 'data', '--norm', 'wn', '--arch', 'resnet18', '--image_size', '32', '--batch_size', '12']
    assert main(command) == 2
    assert 'shard data/few-wds/train-000001.tar is cut short' in capsys.readouterr().out.splitlines()[-1]
    shard.unlink()
    assert main(command) == 2
    assert 'shard data/few-wds/train-000001.tar is missing' in capsys.readouterr().out.splitlines()[-1]
    assert main([*command[:1], 'wds/few', *command[2:]]) == 2
    assert 'holds neither train-*.tar nor val-*.tar' in capsys.readouterr().out.splitlines()[-1]
    assert not Path('reports').exists()

def test_the_commands_of_the_page_of_data_write_shards(imagenette_few, tmp_path):
    "As they stand, where the folders of their sources are links to a few photographs"
    commands = re.findall(r'^python -c "(.*write_shards.*)"$', (ROOT/'data/README.md').read_text(), re.M)
    (tmp_path/'settings.ini').touch()
    (tmp_path/'data').mkdir()
    for name in ('imagenette2-160', 'imagenet'): (tmp_path/'data'/name).symlink_to(imagenette_few)
    env = {k: v for k, v in os.environ.items() if k != 'NWREPRO_DATA'} | dict(PYTHONPATH=str(ROOT))
    for command in commands: subprocess.run([sys.executable, '-c', command], cwd=tmp_path, env=env, check=True)
    sources = [load_source(f'wds/{path.name}', tmp_path/'data') for path in sorted((tmp_path/'data').glob('*-wds'))]
    assert [(len(source.train), source.train.load(0).size == (256, 256)) for source in sources] == [(36, True), (36, False)]

def fault(folder):
    with pytest.raises(ValueError) as error: load_source(f'wds/{folder.name}', folder.parent)
    return str(error.value)

def test_a_table_that_is_cut_is_one_sentence(few, tmp_path):
    copied = Path(shutil.copytree(few[1]/'few-wds', tmp_path/'few-wds'))
    lines = (copied/'train.csv').read_text().splitlines(keepends=True)
    (copied/'train.csv').write_text(''.join(lines[:-3]))
    assert f'has {len(lines)-4:,} images of train where {len(lines)-1:,} were written: copy it again' in fault(copied)
    (copied/'train.csv').unlink()
    sorted(copied.glob('train-*.tar'))[-1].unlink()
    assert 'images of train where' in fault(copied)

def bare(folder, **labels):
    "Shards of another maker: a split's labels, each with the same image"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new('RGB', (8, 8)).save(picture, 'PNG')
    for split, found in labels.items():
        with tarfile.open(folder/f'{split}-000000.tar', 'w') as tar:
            for k, label in enumerate(found):
                for suffix, content in (('png', picture.getvalue()), ('cls', label)):
                    if content is None: continue
                    member = tarfile.TarInfo(f'{k}.{suffix}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder

def test_labels_of_other_makers(tmp_path):
    assert len(load_source('wds/good', bare(tmp_path/'good', train=[b'0', b'1'], val=[b'1\n', b'0']).parent).train) == 2
    assert 'label 1.cls in ' in (message := fault(bare(tmp_path/'named', train=[b'0', b'cat'], val=[b'0']))) and "is 'cat': expected the number of a class" in message
    assert "label 0.cls in " in fault(bare(tmp_path/'empty', train=[b'', b'1'], val=[b'0']))
    assert 'has an image of class 5, where there are 2 classes from 0 on' in fault(bare(tmp_path/'beyond', train=[b'0', b'1'], val=[b'5']))

def test_images_without_labels_and_labels_from_one_are_refused(tmp_path):
    assert '1 of 3 images in ' in (said := fault(bare(tmp_path/'half', train=[b'0', None, b'1'], val=[b'0']))) and 'have no label, such as 1.png' in said
    assert 'has labels from 1 to 2, and no image of class 0' in fault(bare(tmp_path/'one', train=[b'1', b'2'], val=[b'2', b'1']))

def test_more_shards_than_may_be_open(few, monkeypatch):
    monkeypatch.setattr('nwrepro.training.shards.OPEN', 1)
    images = load_source('wds/few-wds', few[1]).train
    assert len(images.items.paths) > 1
    views = [images.load(i).tobytes() for i in (0, len(images)-1, 0)]
    assert views[0] == views[2] != views[1] and len(images.items.files) == 1

def test_a_damaged_image_names_its_shard(few, tmp_path):
    shutil.copytree(few[1]/'few-wds', tmp_path/'few-wds')
    images = load_source('wds/few-wds', tmp_path).train
    with (tmp_path/'few-wds/train-000000.tar').open('r+b') as f:
        f.seek(int(images.items.table['offset'][0]))
        f.write(bytes(100))
    with pytest.raises(ValueError, match=r'image \S+ in \S+train-000000.tar cannot be read .*: copy the shard again'): images.load(0)

# images that are prepared

@pytest.mark.parametrize('pipeline, quality, least, most', [('period', None, 0, 0), ('period', 95, 0.3, 4), ('period', 50, 2, 15), ('modern', None, 0, 0)])
def test_prepared_images_are_those_of_the_pipeline(few, tmp_path, pipeline, quality, least, most):
    "Lossless exactly, and as JPEG nearly; in the same order, under the same names and labels, with a card"
    source = few[0]
    info = write_shards(source, tmp_path/'small-wds', side=73, pipeline=pipeline, quality=quality)
    small = load_source('wds/small-wds', tmp_path)
    assert small.prepared == info['source']['prepared'] and (small.prepared['side'], small.prepared['quality']) == (73, quality)
    assert small.train.labels == source.train.labels and small.train.name(5).partition('.')[0] == source.train.name(5).partition('.')[0]
    for i in range(0, len(source.train), 5):
        photo, found = source.train.load(i), image_to_bytes(small.train.load(i))
        factor = 73/min(photo.size)
        size = (73, 73) if pipeline == 'period' else [round(factor*length) for length in photo.size]
        assert least <= (found.float()-resize(photo, *size).float()).abs().mean() <= most
    assert ('73 pixels (both sides)' if pipeline == 'period' else '73 pixels (the shorter side)') in small.note and (str(quality) if quality else 'lossless') in small.note
    batch, _, _ = next(iter(loader(Views(small.train, range(8), pipelines(small, 64, pipeline), train=True), batch_size=8)))
    assert batch.shape == (8, 3, 64, 64) and 0.5 < batch.std() < 1.6

def test_shards_prepared_for_something_else_are_one_sentence(few, tmp_path):
    write_shards(few[0], tmp_path/'small-wds', side=73)
    small = load_source('wds/small-wds', tmp_path)
    for part, size, kind in (('squashed to a square', 64, 'modern'), ('hold images of 73 pixels, and this image_size takes 74', 65, 'period')):
        with pytest.raises(ValueError, match=part): pipelines(small, size, kind)
    with pytest.raises(ValueError, match='side is 8'): write_shards(few[0], tmp_path/'tiny-wds', side=8)
    assert not (tmp_path/'tiny-wds').exists() and not (tmp_path/'.tiny-wds.part').exists()

def test_a_small_image_is_not_enlarged_for_the_modern_pipeline(few):
    image = few[0].train.load(0)
    assert torch.equal(Prepare(1000, 'modern', None).pixels(image), image_to_bytes(image))

def test_a_writing_that_was_interrupted_goes_on(few, tmp_path, monkeypatch):
    "The same bytes as in one go; only whole shards count; another plan is refused"
    source, load = few[0], Images.load
    def write(name, **how): return write_shards(source, tmp_path/name, **dict(dict(shard_mb=0.05, side=73), **how))
    write('once-wds')
    read = []
    def interrupted(self, i):
        read.append(i)
        if len(read) == 25: raise KeyboardInterrupt
        return load(self, i)
    monkeypatch.setattr(Images, 'load', interrupted)
    with pytest.raises(KeyboardInterrupt): write('twice-wds')
    assert not (tmp_path/'twice-wds').exists() and list((tmp_path/'.twice-wds.part').glob('*.tmp'))
    with pytest.raises(ValueError, match='begun from other images or in another way'): write('twice-wds', quality=80)
    write('twice-wds')
    assert 25+5 < len(read) < 25+len(source.train)+len(source.val)
    sums = [(tmp_path/name/'SHA256SUMS').read_text() for name in ('once-wds', 'twice-wds')]
    assert sums[0] == sums[1] and sorted(path.name for path in (tmp_path/'once-wds').iterdir()) == sorted(path.name for path in (tmp_path/'twice-wds').iterdir())
    assert len(load_source('wds/twice-wds', tmp_path).train.items.paths) > 2 and not list(tmp_path.glob('*/*.tmp')) and not (tmp_path/'.twice-wds.part').exists()

WRITE = """
import sys
from nwrepro.training.sources import load_source
from nwrepro.training.shards import write_shards
write_shards(load_source('folder', sys.argv[1]), sys.argv[2])
"""

def test_progress_is_shown_on_a_terminal_only(imagenette_few, tmp_path):
    def said(name, **where):
        done = subprocess.run([sys.executable, '-c', WRITE, str(imagenette_few), str(tmp_path/name)], env=os.environ | dict(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, **where)
        assert done.returncode == 0
        return done.stderr
    assert said('quiet', stderr=subprocess.PIPE) == b''
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    said('shown', stderr=terminal)
    os.close(terminal)
    assert b'48/48' in os.read(screen, 10_000)

@pytest.mark.slow
def test_memory_stays_over_an_epoch(imagenette, tmp_path):
    done = subprocess.run([sys.executable, ROOT/'tools/bench_stream.py', str(imagenette), str(tmp_path), '20000'], env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])['growth'] < 0.05, done.stdout
