"Shards of real images: the same run as from their folder, read by others too, whole or named, memory that stays"
import hashlib, io, json, os, shutil, subprocess, sys, tarfile
from pathlib import Path
import pytest, timm.data, torch
from PIL import Image

from conftest import ROOT
from nwrepro.training.pipeline import Views, loader, pipelines
from nwrepro.training.sources import load_source
from nwrepro.training.shards import read_shards, write_shards
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

def test_a_run_from_shards_is_the_run_from_the_folder(few, imagenette_few, tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    given = dict(norm='wn', arch='resnet18', image_size=32, epochs=1, warmup_epochs=0, batch_size=12, lr=0.01, compile='off')
    for data, where in (('folder', imagenette_few), ('wds/few-wds', few[1])):
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

@pytest.mark.slow
def test_memory_stays_over_an_epoch(imagenette, tmp_path):
    done = subprocess.run([sys.executable, ROOT/'tools/bench_stream.py', str(imagenette), str(tmp_path), '20000'], env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])['growth'] < 0.05, done.stdout
