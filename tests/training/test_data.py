"Images from disk to batches: bad folders and files, workers, random states, subsets, real photographs where they are"
import io, os, pickle, random, shutil, subprocess, sys, traceback
from collections import Counter
from pathlib import Path

import numpy, pytest, timm.data, torch, torchvision
import nwrepro.training.sources
from hypothesis import given, strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, v2
from torchvision.transforms.functional import pil_to_tensor

from conftest import ROOT
from nwrepro.common import project_root, unknown
from nwrepro.training.data import Images, balanced, data_folder, fingerprint, holdout, read_digits
from nwrepro.training.loader import Batches, Views, key, kept_random_state, loader, order, set_random_state
from nwrepro.training.pipeline import PIPELINES, Pipeline, pipelines, resize
from nwrepro.training.sources import NAMES, auto_source, check_imagenet, load_source, same_classes

KINDS = pytest.mark.parametrize('kind', PIPELINES)
DATA = Path(os.environ.get('NWREPRO_DATA') or ROOT/'data')
SYNSETS = ('n01440764', 'n02102040', 'n02979186')

def noise(rng, width, height): return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=numpy.uint8)).resize((width, height), reducing_gap=2)

def make_folder(root, splits=('train', 'val'), classes=SYNSETS, n=4, ext='JPEG'):
    "Coloured noise of many shapes, `n` images for each class and split"
    rng = numpy.random.default_rng(0)
    for split in splits:
        for name in classes:
            for i in range(n):
                path = root/split/name/f'{name}_{i}.{ext}'
                path.parent.mkdir(parents=True, exist_ok=True)
                noise(rng, 20 + 7*i, 44 - 5*i).save(path)
    return root

@pytest.fixture(autouse=True)
def outside(monkeypatch):
    "As a user would call it: neither under nbdev_test nor with a data folder in the environment"
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('NWREPRO_DATA', raising=False)

@pytest.fixture
def photos(tmp_path): return make_folder(tmp_path/'photos')

@pytest.fixture(scope='module')
def digits(): return read_digits()

def fault(f, *args, **kwargs):
    "The message of the ValueError, which must be one line"
    with pytest.raises(ValueError) as caught: f(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)

def states(): return random.getstate(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2:], torch.get_rng_state().tolist()

def same(a, b): return all(torch.equal(p, q) and p.stride() == q.stride() and p.dtype == q.dtype for p, q in zip(a, b, strict=True))

# names and places

def test_root_is_found_from_below_and_is_the_working_directory_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT/'nbs')
    assert project_root() == ROOT and data_folder() == ROOT/'data' and data_folder('images') == ROOT/'images'
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path.resolve() and data_folder() == tmp_path.resolve()/'data'

def test_a_parameter_goes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('NWREPRO_DATA', str(tmp_path/'b'))
    assert data_folder(tmp_path/'a') == tmp_path/'a'
    assert data_folder() == tmp_path/'b' and data_folder('') == tmp_path/'b' and data_folder('~/c') == Path.home()/'c'

def test_unknown_names_the_nearest():
    assert str(unknown('norm', 'wm', ['bn', 'wn'])) == "unknown norm 'wm': did you mean 'wn'? accepted: bn, wn"
    assert str(unknown('norm', 3, {'bn': 0})) == "unknown norm '3': accepted: bn"

@pytest.mark.parametrize('data', ['digts', 'imagenete', '', 'auto ', 'foo/bar', 'torch', 'torch/', 'hfds', 'Digits', None, 7])
def test_an_unknown_source_is_refused_with_all_that_are_accepted(data):
    message = fault(load_source, data)
    assert message.startswith(f'unknown data {str(data)!r}') and all(name in message for name in NAMES)

@pytest.mark.parametrize('data', ['tfds/cifar10', 'hfids/x/y'])
def test_streams_are_refused(data): assert 'has no index' in fault(load_source, data)

# what `auto` chooses

def test_auto_is_digits_where_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = load_source()
    assert source.name == 'digits' and 'data/imagenet' in source.note and 'Imagenette(' in source.note
    assert not (tmp_path/'data').exists()

def test_auto_is_imagenet_in_place_but_not_under_nbdev_test(tmp_path, monkeypatch):
    make_folder(tmp_path/'imagenet')
    source = load_source(data_dir=tmp_path)
    assert source.name == 'imagenet' and source.classes == sorted(SYNSETS) and 'has 1000' in source.note and 'data=auto' in source.note
    monkeypatch.setenv('IN_TEST', '1')
    source = load_source(data_dir=tmp_path)
    assert source.name == 'digits' and 'IN_TEST' in source.note

def test_auto_takes_a_data_folder_of_a_thousand_classes_for_imagenet(tmp_path):
    for split in ('train', 'val'):
        for k in range(1000): (tmp_path/split/f'n{k:08d}').mkdir(parents=True)
    assert auto_source(tmp_path)[0] == 'imagenet'
    (tmp_path/'train'/'n00000000').rmdir()
    name, why = auto_source(tmp_path)
    assert name == 'digits' and 'data=folder' in why

def test_auto_says_what_else_lies_there(tmp_path):
    make_folder(tmp_path/'imagenette2-160')
    assert 'data=imagenette uses' in auto_source(tmp_path)[1]

def test_auto_refuses_a_given_folder_that_is_not_there(tmp_path, monkeypatch):
    assert 'nowhere' in fault(load_source, 'auto', tmp_path/'nowhere')
    monkeypatch.setenv('NWREPRO_DATA', str(tmp_path/'nowhere'))
    assert 'NWREPRO_DATA' in fault(load_source)
    assert load_source('digits').name == 'digits'

# folders as they should be

@pytest.mark.parametrize('data,inner,val', [
    ('imagenette', 'imagenette2-160', 'val'), ('imagenette', 'imagenette2-320', 'val'), ('imagenette', 'imagenette2', 'val'),
    ('cifar10-jpeg', 'cifar10-jpeg', 'test'), ('imagenet', 'imagenet', 'val'), ('imagenet', 'imagenet', 'validation'),
    ('folder', '', 'val'), ('folder', '', 'validation'), ('folder', '', 'valid'), ('folder', '', 'test')])
def test_layouts(tmp_path, data, inner, val):
    home = make_folder(tmp_path/inner, ('train', val))
    for data_dir in (tmp_path, home):
        source = load_source(data, data_dir)
        assert source.name == data and source.classes == sorted(SYNSETS)
        assert [len(source.train), len(source.val)] == [12, 12] and source.train.labels == [0]*4 + [1]*4 + [2]*4
        assert source.train.name(0) == 'train/n01440764/n01440764_0.JPEG' and source.val.name(11) == f'{val}/n02979186/n02979186_3.JPEG'
        assert source.train.load(1).size == (27, 39) and source.eval_images == 12 and str(home) in source.note

def test_smaller_pictures_go_first(tmp_path):
    for inner in ('imagenette2', 'imagenette2-320'): make_folder(tmp_path/inner)
    make_folder(tmp_path/'imagenette2-160', ('train',))
    assert 'imagenette2-320' in load_source('imagenette', tmp_path).note

def test_a_link_is_followed(tmp_path):
    make_folder(tmp_path/'elsewhere')
    (tmp_path/'imagenet').symlink_to(tmp_path/'elsewhere')
    source = load_source('imagenet', tmp_path)
    assert len(source.train) == 12 and source.train.name(0).startswith('train/')

def test_two_readers_agree(photos):
    ours, theirs = load_source('folder', photos), load_source('torch/folder', photos)
    assert ours.fingerprint == theirs.fingerprint and ours.classes == theirs.classes and ours.val.labels == theirs.val.labels

@pytest.mark.parametrize('mode,ext', [('L', 'png'), ('P', 'png'), ('RGBA', 'png'), ('I;16', 'png'), ('CMYK', 'jpg'), ('1', 'png')])
def test_any_mode_of_image_becomes_rgb(tmp_path, mode, ext):
    make_folder(tmp_path)
    path = next((tmp_path/'train'/SYNSETS[0]).iterdir())
    image = Image.new(mode, (9, 5)) if mode == 'I;16' else Image.new('RGB', (9, 5), (10, 200, 90)).convert(mode)
    image.save(path.with_suffix(f'.{ext}'))
    path.unlink()
    source = load_source('folder', tmp_path)
    images = [source.train.load(i) for i in range(4)]
    assert {image.mode for image in images} == {'RGB'} and (9, 5) in {image.size for image in images}

# folders as they should not be

@pytest.mark.parametrize('data', ['imagenette', 'cifar10-jpeg', 'imagenet', 'folder'])
def test_a_missing_or_empty_data_folder(tmp_path, data):
    message = fault(load_source, data, tmp_path/'nowhere')
    assert f'data={data}' in message and 'nowhere' in message and 'no such folder' in message and 'NWREPRO_DATA' in message
    message = fault(load_source, data, tmp_path)
    assert f'data={data}' in message and str(tmp_path) in message and 'none holds' in message

@pytest.mark.parametrize('there', ['train', 'val', 'test'])
def test_one_split_only(tmp_path, there):
    make_folder(tmp_path/'imagenette2-160', (there,))
    assert f'holds {there} only' in fault(load_source, 'imagenette', tmp_path)

@pytest.mark.parametrize('inner', ['', 'cat', 'cat/deep'])
def test_splits_without_images(tmp_path, inner):
    for split in ('train', 'val'): (tmp_path/split/inner).mkdir(parents=True)
    (tmp_path/'train'/inner/'notes.txt').write_text('no image')
    message = fault(load_source, 'folder', tmp_path)
    assert str(tmp_path/'train') in message and '.jpeg' in message

def test_one_class(tmp_path):
    make_folder(tmp_path, classes=SYNSETS[:1])
    assert 'fewer than two classes (n01440764)' in fault(load_source, 'folder', tmp_path)

def test_classes_that_differ(photos):
    shutil.move(photos/'val'/SYNSETS[0], photos/'val'/'dog')
    message = fault(load_source, 'folder', photos)
    assert f'{SYNSETS[0]} in training only' in message and 'dog in test only' in message
    shutil.rmtree(photos/'val'/'dog')
    (photos/'val'/SYNSETS[0]).mkdir()
    assert '3 training and 2 test' in fault(load_source, 'folder', photos)
    assert 'differ (in order)' in fault(same_classes, ['a', 'b'], ['b', 'a'], 'x')

def test_folders_that_are_no_classes(photos):
    for split in ('train', 'val'):
        (photos/split/'eel').mkdir()
        (photos/split/'eel'/'1.gif').touch()
        (photos/split/'.cache').mkdir()
    assert 'has folders that hold no image themselves (eel): put the images' in fault(load_source, 'folder', photos)

def test_folders_within_classes(photos):
    for split in ('train', 'val'):
        for name in SYNSETS[:3]:
            shutil.copytree(photos/split/name, photos/split/'animals'/name)
            shutil.rmtree(photos/split/name)
    assert f'{photos}/train has folders that hold no' in (message := fault(load_source, 'folder', photos)) and '(animals)' in message

def test_images_directly_in_a_split(photos):
    shutil.copy(next((photos/'val'/SYNSETS[0]).iterdir()), photos/'val'/'ILSVRC2012_val_00000001.JPEG')
    assert 'ILSVRC2012_val_00000001.JPEG lies directly in val' in fault(load_source, 'folder', photos)

# files as they should not be

BROKEN = {'truncated': lambda path: path.write_bytes(path.read_bytes()[:-200]), 'a few bytes': lambda path: path.write_bytes(path.read_bytes()[:4]),
          'empty': lambda path: path.write_bytes(b''), 'text': lambda path: path.write_text('<html>404 Not Found</html>'),
          'gone': lambda path: path.unlink(), 'png cut': lambda path: path.write_bytes(png()[:-30])}

def png():
    file = io.BytesIO()
    noise(numpy.random.default_rng(0), 30, 30).save(file, 'PNG')
    return file.getvalue()

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('how', BROKEN)
def test_a_broken_file_is_named_and_not_replaced_by_its_neighbour(photos, how, workers):
    source = load_source('folder', photos)
    path = photos/'train'/SYNSETS[1]/f'{SYNSETS[1]}_2.JPEG'
    BROKEN[how](path)
    views = Views(source.train, range(12), pipelines(source, 32, 'period'), train=True)
    if workers:
        with pytest.raises(ValueError) as caught: list(loader(views, batch_size=4, workers=workers))
        traceback.clear_frames(caught.tb)  # they hold the loader's workers, which would end ten seconds later
        last = str(caught.value).strip().splitlines()[-1].removeprefix('ValueError: ')
    else: last = fault(list, loader(views, batch_size=4))
    assert last.startswith(f'image {path} cannot be read (') and last.endswith('or delete it')

def test_a_link_to_nowhere_is_named_at_once(photos):
    (photos/'train'/SYNSETS[0]/'a.jpg').symlink_to(photos/'gone.jpg')
    assert 'a.jpg cannot be read' in fault(load_source, 'folder', photos)

# sources that timm opens

def test_what_is_not_on_disk_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr('socket.getaddrinfo', lambda *args, **kwargs: pytest.fail('asked for the network'))
    for data in ('cifar10', 'torch/cifar100', 'torch/mnist', 'torch/imagenet', 'torch/nosuch', 'hfds/nosuch/name'):
        message = fault(load_source, data, tmp_path)
        assert 'cannot be opened' in message and 'nothing is downloaded here' in message and 'python -c "' in message
    assert list(tmp_path.rglob('*.gz')) == []

def test_a_data_set_of_hugging_face(tmp_path):
    pytest.importorskip('datasets', reason='the package datasets is not installed')
    import datasets
    path = make_folder(tmp_path/'set', ('train', 'test'), ext='png')
    source = load_source(f'hfds/{path}', tmp_path/'cache')
    assert source.classes == sorted(SYNSETS) and len(source.train) == len(source.val) == 12
    assert sorted(source.train.labels) == [0]*4 + [1]*4 + [2]*4 and source.train.load(0).mode == 'RGB' and source.val.name(3) == 'val/00003'
    views = Views(source.train, range(12), pipelines(source, 32, 'modern'), train=True)
    for a, b in zip(loader(views), loader(views, workers=2), strict=True): assert same(a, b)

def test_cifar10(tmp_path, monkeypatch):
    home, rng = tmp_path/'cifar-10-batches-py', numpy.random.default_rng(0)
    home.mkdir()
    def write(name, content): (home/name).write_bytes(pickle.dumps(content))
    names = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
    pixels = rng.integers(0, 256, (6, 20, 3072), dtype=numpy.uint8)
    for name, x in zip(names, pixels, strict=True): write(name, {'data': x, 'labels': [k % 10 for k in range(20)]})
    write('batches.meta', {'label_names': list('abcdefghij')})
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *args: True)
    source = load_source('cifar10', tmp_path)
    assert source.classes == list('abcdefghij') and [len(source.train), len(source.val)] == [100, 20]
    assert source.mean == (0.4914, 0.4822, 0.4465) and source.mirror and source.eval_images == 100 and source.train.name(21) == 'train/00021'
    assert numpy.array_equal(numpy.array(source.train.load(21)), pixels[1, 1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert load_source('torch/cifar10', tmp_path).fingerprint == source.fingerprint
    pixels[5, 3] += 1
    write('test_batch', {'data': pixels[5], 'labels': [k % 10 for k in range(20)]})
    assert load_source('cifar10', tmp_path).fingerprint != source.fingerprint

def test_digits_of_torchvision_are_not_mirrored_either(tmp_path, monkeypatch):
    class Written(torchvision.datasets.VisionDataset):
        classes = ['0', '1']
        def __init__(self, root, train, download): self.targets = torch.tensor([0, 1, 0, 1])
        def __getitem__(self, i): return Image.new('L', (28, 28), int(40*i)), int(self.targets[i])
    monkeypatch.setitem(timm.data.dataset_factory._TORCH_BASIC_DS, 'mnist', Written)
    source = load_source('torch/mnist', tmp_path)
    assert not source.mirror and source.crop_area == 0.5 and source.train.labels == [0, 1, 0, 1]

# digits

def test_digits_are_the_files_order_in_full_range(digits):
    from sklearn.datasets import load_digits
    raw = load_digits()
    assert digits.train.labels + digits.val.labels == raw.target.tolist() and not digits.mirror and digits.eval_images == 360
    for images, offset in ((digits.train, 0), (digits.val, 1437)):
        for i in (0, 17, len(images)-1):
            x = numpy.array(images.load(i))
            assert x.shape == (8, 8, 3) and numpy.abs(x - raw.images[offset + i][..., None]*255/16).max() <= 0.5
    assert {images.load(i).getextrema()[0] for images in (digits.train,) for i in range(5)} <= {(0, m) for m in range(230, 256)}
    assert digits.mean == pytest.approx((0.3054,)*3, abs=1e-3) and digits.std == pytest.approx((0.3753,)*3, abs=1e-3)

def test_no_view_of_a_digit_is_mirrored(digits):
    pipeline = pipelines(digits, 32, 'period')
    views = Views(digits.train, range(10), pipeline, train=True)
    whole = pipeline.prepare(digits.train.load(2))
    crops = [whole[:, t:t+32, l:l+32] for t in range(6) for l in range(6)]
    seen = {next(k for k, crop in enumerate(crops) if torch.equal(crop, views[epoch, 2][0])) for epoch in range(200)}
    assert len(seen) == 36

# fixed subsets

labelled = st.integers(1, 6).flatmap(lambda k: st.lists(st.integers(0, k-1), min_size=1, max_size=60))

@given(labelled, st.integers(0, 40), st.integers(0, 5))
def test_balanced_is_balanced_sorted_and_nested(labels, n, seed):
    counts = Counter(labels)
    k = len(counts)
    share, extra = divmod(n, k)
    if n < k or any(counts[y] < share + (j < extra) for j, y in enumerate(sorted(counts))):
        with pytest.raises(ValueError): balanced(labels, n, seed)
        return
    chosen = balanced(labels, n, seed)
    assert chosen == sorted(set(chosen)) and len(chosen) == n and chosen == balanced(labels, n, seed)
    got = Counter(labels[i] for i in chosen)
    assert [got[y] for y in sorted(counts)] == [share+1]*extra + [share]*(k-extra)
    if n > k: assert set(balanced(labels, n-1, seed)) < set(chosen)

@given(labelled, st.floats(0, 1, exclude_max=True), st.integers(0, 5))
def test_holdout_splits_each_class(labels, share, seed):
    counts = Counter(labels)
    if share and min(counts.values()) < 2:
        with pytest.raises(ValueError): holdout(labels, share, seed)
        return
    kept, held = holdout(labels, share, seed)
    assert kept == sorted(kept) and held == sorted(held) and sorted(kept + held) == list(range(len(labels)))
    for y, n in counts.items():
        of_y = sum(labels[i] == y for i in held)
        assert (of_y == 0) == (share == 0) and of_y < n and abs(of_y - share*n) <= 1
    assert (kept, held) == holdout(labels, share, seed)

@pytest.mark.parametrize('share', [-0.1, 1, 1.5, float('nan')])
def test_a_share_that_is_none(share): assert str(share) in fault(holdout, [0, 0, 1, 1], share)

def test_subsets_depend_on_the_seed(digits):
    assert balanced(digits.train.labels, 100, 0) != balanced(digits.train.labels, 100, 1)
    assert holdout(digits.train.labels, 0.1, 0) != holdout(digits.train.labels, 0.1, 1)

def test_messages_of_subsets():
    assert 'at least 3' in fault(balanced, [0, 1, 2, 2], 2)
    assert 'needs 3 of class 1, which has 2: ask for at most 4' in fault(balanced, [0, 0, 0, 1, 1], 6)
    assert 'class 1 has one image' in fault(holdout, [0, 0, 1], 0.5)

# fingerprints

def test_a_fingerprint_is_of_the_content_and_not_of_the_place(photos, tmp_path):
    before = load_source('folder', photos).fingerprint
    moved = shutil.copytree(photos, tmp_path/'other'/'place')
    assert len(before) == 64 and load_source('folder', moved).fingerprint == before
    changes = {'name': lambda f: f.rename(f.with_name('new.JPEG')), 'size': lambda f: f.write_bytes(f.read_bytes() + b'0'), 'gone': lambda f: f.unlink(),
               'class': lambda f: f.rename(f.parent.parent/SYNSETS[2]/f.name), 'added': lambda f: shutil.copy(f, f.with_name('more.JPEG'))}
    prints = []
    for name, change in changes.items():
        for split in ('train', 'val'):
            copied = shutil.copytree(photos, tmp_path/name/split)
            change(copied/split/SYNSETS[0]/f'{SYNSETS[0]}_1.JPEG')
            prints.append(load_source('folder', copied).fingerprint)
    assert len({before, *prints}) == 11

def test_a_fingerprint_opens_few_files(monkeypatch):
    asked = []
    monkeypatch.setattr('nwrepro.training.data.mark', lambda images, i: asked.append(i) or 0)
    for n in (1, 999, 1000, 1001, 5000):
        asked.clear()
        fingerprint(Images([], [0]*n), Images([], [0]))
        assert min(n, 500) < len(asked) <= 1001 or n == 1
        assert asked[0] == 0 and len(set(numpy.diff(asked[:-1]).tolist())) <= 1

# pipelines

def photo(width=90, height=60): return noise(numpy.random.default_rng(1), width, height)

def one(image): return Images([(image,)], [0])

@pytest.fixture
def coloured(photos): return load_source('folder', photos)

@pytest.mark.parametrize('width,height', [(90, 60), (60, 90), (500, 40), (200, 200)])
def test_period_is_torchvisions_squash_and_crop(coloured, width, height):
    image, pipeline = photo(width, height), pipelines(coloured, 32, 'period')
    view = pipeline.centre(pipeline.prepare(image))
    reference = Compose([v2.Resize((37, 37)), CenterCrop(32), lambda pixels: pixels/255, Normalize(coloured.mean, coloured.std)])
    torch.testing.assert_close(pipeline.standardise(view), reference(pil_to_tensor(image)), atol=2e-6, rtol=1e-5)
    by_pillow = pil_to_tensor(Compose([Resize((37, 37), InterpolationMode.BILINEAR), CenterCrop(32)])(image))
    assert (view.int()-by_pillow.int()).abs().max() <= 1

@pytest.mark.parametrize('size', [16, 32, 48, 63, 64, 224])
@KINDS
def test_shapes(coloured, digits, kind, size):
    for source in (coloured, digits):
        pipeline = pipelines(source, size, kind)
        for image in (source.train.load(0), photo(300, 500), photo(17, 400), Image.new('RGB', (1, 1))):
            prepared = pipeline.prepare(image)
            assert numpy.asarray(prepared).dtype == numpy.uint8
            for x in (pipeline.augment(prepared), pipeline.centre(prepared)):
                assert x.shape == (3, size, size) and x.dtype == torch.uint8
                x = pipeline.standardise(torch.stack([x, x]))
                assert x.shape == (2, 3, size, size) and x.dtype == torch.float32 and x.is_contiguous() and x.isfinite().all()

def test_period_resizes_to_eight_sevenths(coloured):
    assert [pipelines(coloured, size, 'period').prepare(photo()).shape[1] for size in (224, 64, 32)] == [256, 73, 37]

def test_imagenet_is_counted_where_no_class_is_short(tmp_path, monkeypatch):
    "A thousand classes, of which the least counts are scaled down"
    for name, n in dict(LEAST=1, EACH=1, TRAIN_IMAGES=1001).items(): monkeypatch.setattr(nwrepro.training.sources, name, n)
    for split, name in ((split, name) for split in ('train', 'val') for name in timm.data.ImageNetInfo('imagenet-1k').label_names()):
        (tmp_path/split/name).mkdir(parents=True)
        (tmp_path/split/name/'0.JPEG').touch()
    assert check_imagenet(tmp_path) == [f"{tmp_path/'train'} has 1,000 images, not 1,001"]
    (tmp_path/'train'/name/'1.JPEG').touch()
    assert check_imagenet(tmp_path) == []
    (tmp_path/'val'/name/'1.JPEG').touch()
    assert check_imagenet(tmp_path) == [f"{tmp_path/'val'} has other than 1 images of 1 classes: {name} (2)"]

def test_resizing_is_bicubic_where_it_enlarges_and_bilinear_where_it_shrinks():
    image = photo()
    assert torch.equal(resize(image, 180, 180), pil_to_tensor(torchvision.transforms.functional.resize(image, [180, 180], InterpolationMode.BICUBIC)))
    assert torch.equal(resize(image, 30, 30), v2.functional.resize(pil_to_tensor(image), [30, 30], InterpolationMode.BILINEAR))
    assert torch.equal(resize(image, *image.size), pil_to_tensor(image))

def test_modern_is_timms(coloured):
    "The same views; resized on bytes, as torchvision does with tensors, which is near to what timm has from Pillow"
    image, pipeline = Image.fromarray(load_sample_image('china.jpg')).crop((200, 100, 400, 250)), pipelines(coloured, 64, 'modern')
    common = dict(interpolation='bicubic', mean=coloured.mean, std=coloured.std)
    def check(seen, by_torchvision, by_timm):
        assert torch.equal(seen, by_torchvision)
        wrong = (pipeline.standardise(seen)-by_timm).abs()*255*torch.tensor(coloured.std)[:, None, None]
        assert wrong.mean() < 0.3 and wrong.quantile(0.999) < 2.01
    scored = timm.data.create_transform(64, crop_pct=0.95, **common)
    resized = v2.functional.resize(pil_to_tensor(image), [67], InterpolationMode.BICUBIC)
    check(pipeline.centre(pipeline.prepare(image)), v2.functional.center_crop(resized, [64]), scored(image))
    reference = timm.data.create_transform(64, is_training=True, color_jitter=None, **common)
    crop, mirror = reference.transforms[:2]
    for seed in range(5):
        with kept_random_state():
            set_random_state(seed)
            box = crop.get_params(image, crop.scale, crop.ratio)
            expected = mirror(v2.functional.resized_crop(pil_to_tensor(image), *box, [64, 64], InterpolationMode.BICUBIC))
            set_random_state(seed)
            by_timm = reference(image)
            set_random_state(seed)
            check(pipeline.augment(pipeline.prepare(image)), expected, by_timm)

@KINDS
def test_half_of_the_views_are_mirrored(coloured, kind):
    ramp = Image.fromarray(numpy.tile(numpy.arange(0, 240, dtype=numpy.uint8)[None, :, None], (240, 1, 3)))
    views = Views(one(ramp), [0], pipelines(coloured, 32, kind), train=True)
    backwards = sum((views[epoch, 0][0][0, 16, 0] > views[epoch, 0][0][0, 16, -1]).item() for epoch in range(200))
    assert 70 < backwards < 130

def test_a_modern_crop_of_a_digit_keeps_half_of_it(digits):
    transform = pipelines(digits, 32, 'modern').augment.keywords['transform'].transforms
    assert transform[0].scale == (0.5, 1.) and 'Flip' not in str(transform)

@pytest.mark.parametrize('augment, views', [('mirror', 2), ('off', 1)])
def test_without_a_crop_a_view_is_the_whole_image(coloured, digits, augment, views):
    image, pipeline = photo(90, 60), pipelines(coloured, 32, 'period', augment)
    reference = Compose([v2.Resize((32, 32)), lambda pixels: pixels/255, Normalize(coloured.mean, coloured.std)])(pil_to_tensor(image))
    torch.testing.assert_close(pipeline.standardise(pipeline.centre(pipeline.prepare(image))), reference, atol=2e-6, rtol=1e-5)
    seen = [pipeline.standardise(view) for view, _, _ in (Views(one(image), [0], pipeline, train=True)[epoch, 0] for epoch in range(20))]
    assert all(any(torch.allclose(view, kind, atol=1e-5) for kind in (reference, reference.flip(-1))[:views]) for view in seen)
    assert len({view.numpy().tobytes() for view in seen}) == views
    upright = pipelines(digits, 32, 'period', augment)
    assert len({upright.augment(upright.prepare(digits.train.load(0))).numpy().tobytes() for _ in range(20)}) == 1  # a mirrored digit is another digit

def test_bad_pipelines(digits):
    assert "did you mean 'mirror'" in fault(pipelines, digits, 32, 'period', 'miror')
    assert 'augment = mirror is for recipe paper' in fault(pipelines, digits, 32, 'modern', 'mirror')
    assert "did you mean 'period'" in fault(pipelines, digits, 32, 'peroid')
    assert 'image_size 15' in fault(pipelines, digits, 15, 'period')

# views

@KINDS
@pytest.mark.parametrize('name', ['digits', 'coloured'])
def test_a_view_depends_on_seed_epoch_and_image_alone(name, kind, request):
    source = request.getfixturevalue(name)
    pipeline = pipelines(source, 32, kind)
    def views(**kwargs): return Views(source.train, range(12), pipeline, train=True, **kwargs)
    keys = [(epoch, i) for epoch in range(3) for i in range(12)]
    expected = {k: x for k, (x, *_) in zip(keys, views().__getitems__(keys), strict=True)}
    others = views(cache_mb=0), pickle.loads(pickle.dumps(views())), Views(source.train, [5], pipeline, train=True)
    for n, other in enumerate(others):
        for epoch, i in sorted(keys, key=lambda k: key(n, *k)):
            random.seed(n), numpy.random.seed(n), torch.manual_seed(n)
            assert torch.equal(other[epoch, i][0], expected[epoch, i])
    assert all(other[0, 7][1:] == (source.train.labels[7], 7) for other in others)
    for changed in (views(seed=1)[0, 7][0], *(expected[epoch, 7] for epoch in (1, 2))):
        assert not torch.equal(changed, expected[0, 7]) or kind == 'period'
    assert len({tuple(views(seed=seed)[0, 7][0].flatten().tolist()) for seed in range(10)}) > 3

@KINDS
def test_a_scored_view_is_always_the_same(coloured, kind):
    views = Views(coloured.val, range(12), pipelines(coloured, 32, kind), train=False)
    assert torch.equal(views[0, 3][0], views[9, 3][0]) and torch.equal(views[0, 3][0], Views(coloured.val, [3], views.pipeline, False, seed=5)[1, 3][0])

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('train', [True, False])
@KINDS
def test_the_callers_random_states_are_untouched(coloured, kind, train, workers, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('reseeded the GPUs'))
    views = Views(coloured.train, range(12), pipelines(coloured, 32, kind), train=train)
    numpy.random.seed(3)
    numpy.random.randn()
    before = states()
    for _ in range(2):
        for _ in loader(views, batch_size=5, workers=workers): assert states() == before
    views[1, 4]
    assert states() == before

def test_the_callers_random_states_survive_an_error(coloured):
    def fail(pixels): raise RuntimeError(random.random())
    pipeline = pipelines(coloured, 32, 'period')
    pipeline.augment = fail
    before = states()
    with pytest.raises(RuntimeError): Views(coloured.train, range(12), pipeline, train=True)[0, 0]
    assert states() == before

def test_each_of_the_three_generators_is_started(coloured):
    pipeline = pipelines(coloured, 32, 'period')
    pipeline.augment = lambda pixels: torch.tensor([random.random(), numpy.random.rand(), torch.rand(()).item()])
    views = Views(coloured.train, range(12), pipeline, train=True)
    draws = torch.stack([views[epoch, i][0] for epoch in range(3) for i in range(3)])
    assert torch.equal(views[0, 0][0], draws[0]) and all(len(set(column.tolist())) == 9 for column in draws.T)

@pytest.mark.parametrize('cache_mb', [0, 0.01, 0.02, 1])
@KINDS
def test_the_cache_keeps_to_its_limit(coloured, kind, cache_mb):
    views = Views(coloured.train, range(12), pipelines(coloured, 32, kind), train=True, cache_mb=cache_mb)
    for _ in range(2): list(loader(views))
    size = sum(image.nbytes for image in views.cache.values())
    assert size == views.cached <= cache_mb*2**20 and (len(views.cache) == 12) == (cache_mb == 1) and bool(views.cache) == (cache_mb > 0)
    assert pickle.loads(pickle.dumps(views)).cache == {}

def test_a_worker_keeps_no_images(coloured, monkeypatch):
    views = Views(coloured.train, range(12), pipelines(coloured, 32, 'period'), train=True)
    list(loader(views, workers=2))
    assert views.cache == {}
    monkeypatch.setattr('nwrepro.training.loader.get_worker_info', lambda: 'a worker')
    views[0, 0]
    assert views.cache == {}

def test_a_pipeline_may_prepare_an_image_of_pil(coloured):
    pipeline = pipelines(coloured, 32, 'period')
    pipeline.prepare, pipeline.augment = lambda image: image, lambda image: torch.tensor(image.size)
    views = Views(coloured.train, range(12), pipeline, train=True, cache_mb=3*20*44/2**20)
    for _ in range(2):
        assert views[0, 0][0].tolist() == [20, 44] and views.cached == 3*20*44 and views[0, 1][0].tolist() == [27, 39] and list(views.cache) == [0]

@KINDS
def test_a_kept_image_gives_the_same_views(coloured, kind):
    for train in (True, False):
        a, b = (Views(coloured.train, range(12), pipelines(coloured, 32, kind), train, cache_mb=cache_mb) for cache_mb in (1, 0))
        for epoch in range(3): assert all(torch.equal(a[epoch, i][0], b[epoch, i][0]) for i in range(12))
        assert len(a.cache) == 12 and not b.cache

def test_an_image_that_is_as_it_should_be_is_not_copied():
    image = photo(20, 10)
    assert one(image).load(0) is image and one(image.convert('L')).load(0).mode == 'RGB'
    image.getexif()[0x0112] = 6
    assert one(image).load(0).size == (10, 20) and image.size == (20, 10)

# batches

@pytest.mark.parametrize('size', [32, 64])
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', ['digits', 'coloured'])
@KINDS
def test_workers_change_nothing(name, kind, train, size, request):
    source = request.getfixturevalue(name)
    views = Views(source.train, balanced(source.train.labels, 12), pipelines(source, size, kind), train, seed=3)
    runs = [list(loader(views, epoch=2, batch_size=5, workers=workers)) for workers in (0, 2)]
    assert len(runs[0]) == 3
    for a, b in zip(*runs, strict=True): assert same(a, b)
    x, y, i = runs[0][0]
    assert x.shape == (5, 3, size, size) and x.dtype == torch.float32 and x.is_contiguous() and y.dtype == i.dtype == torch.int64
    assert y.tolist() == [source.train.labels[k] for k in i]
    assert sorted(k for _, _, i in runs[0] for k in i.tolist()) == sorted(views.indices)

@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_order_is_a_permutation(n, seed, epoch):
    assert sorted(order(n, seed, epoch)) == list(range(n)) and order(n, seed, epoch) == order(n, seed, epoch)
    if n > 50: assert len({tuple(order(n, *se)) for se in ((seed, epoch), (seed+1, epoch), (seed, epoch+1), (epoch, seed+2000))}) == 4

@given(st.integers(1, 40), st.integers(1, 45), st.booleans(), st.booleans(), st.integers(0, 12), st.integers(0, 3))
def test_resuming_is_leaving_out_the_first_batches(n, batch_size, shuffle, drop_last, start, epoch):
    blank = Views(Images([(Image.new('RGB', (1, 1)),)]*n, list(range(n))), list(range(n))[::-1], Pipeline(None, None, None), True)
    blank.__class__ = type('Blank', (Views,), {'view': lambda self, epoch, i: (torch.zeros(1), i, i)})
    def seen(**kwargs): return [i.tolist() for _, _, i in loader(blank, epoch, batch_size, shuffle, drop_last, **kwargs)]
    if drop_last and batch_size > n:
        with pytest.raises(ValueError, match=f'batch_size {batch_size} does not fit {n}'): seen()
        return
    whole = seen()
    assert len(whole) == len(loader(blank, epoch, batch_size, shuffle, drop_last)) == (n//batch_size if drop_last else -(-n//batch_size))
    assert seen(start=start) == whole[start:] and {len(batch) for batch in whole[:-1]} <= {batch_size}
    if not shuffle: assert sum(whole, []) == blank.indices[:len(sum(whole, []))]
    elif not drop_last: assert sorted(sum(whole, [])) == list(range(n))

def test_orders_of_epochs_and_seeds_differ(digits):
    def first(**kwargs): return next(iter(loader(Views(digits.train, range(1437), pipelines(digits, 32, 'period'), False, seed=kwargs.pop('seed', 0)), **kwargs)))[2].tolist()
    assert first() == first() and first() != first(epoch=1) and first() != first(seed=1)

@pytest.mark.parametrize('kwargs,part', [(dict(batch_size=0), 'batch_size 0'), (dict(batch_size=-3), 'batch_size -3'),
    (dict(batch_size=13, drop_last=True), 'batch_size 13 does not fit 12 images'), (dict(workers=-1), 'workers is -1')])
def test_bad_batches(coloured, kwargs, part):
    assert part in fault(loader, Views(coloured.train, range(12), pipelines(coloured, 32, 'period'), True), **kwargs)

SMALL_SHM = ('unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', 'sh')

def test_too_little_shared_memory_is_one_sentence(tmp_path):
    "What a container of Docker gives to workers"
    if not shutil.which('unshare') or subprocess.run([*SMALL_SHM, 'true'], capture_output=True).returncode: pytest.skip('no /dev/shm of 64 MB can be mounted here: unshare is not allowed')
    given = '--data digits --norm none --arch resnet18 --image_size 320 --batch_size 360 --epochs 1 --compile off'.split()
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([*SMALL_SHM, sys.executable, '-m', 'nwrepro.training', *given, '--workers', '1'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert "out of shared memory (/dev/shm has 64 MiB; Docker's default is 64 MiB): give --workers 0, or" in done.stdout.splitlines()[-1]

def test_a_worker_that_died_of_too_little_shared_memory_is_one_sentence():
    def batches(message):
        yield torch.zeros(1, 3, 2, 2), 0, 0
        raise RuntimeError(message)
    bus_error = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
    assert '--shm-size' in fault(list, Batches(batches(bus_error), torch.clone))
    with pytest.raises(RuntimeError, match='exited unexpectedly'): list(Batches(batches('DataLoader worker (pid(s) 7) exited unexpectedly'), torch.clone))

# real photographs

def test_real_imagenette(imagenette):
    source = load_source('imagenette', imagenette.parent)
    assert [len(source.train), len(source.val), len(source.classes)] == [9469, 3925, 10] and source.eval_images == 1000 and source.mirror
    assert source.classes == ['n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079', 'n03394916', 'n03417042', 'n03425413', 'n03445777', 'n03888257']
    assert source.note.endswith(imagenette.name) and source.train.name(0).startswith('train/n01440764/') and source.val.name(0).endswith('.JPEG')
    assert all(Path(source.val.name(i)).parts[1] == source.classes[y] for i, y in enumerate(source.val.labels))
    assert load_source('imagenette', imagenette).fingerprint == source.fingerprint

@KINDS
def test_real_photographs_in_workers(imagenette, kind):
    source = load_source('imagenette', imagenette.parent)
    views = Views(source.train, balanced(source.train.labels, 60), pipelines(source, 64, kind), True)
    runs = [list(loader(views, batch_size=25, workers=workers)) for workers in (0, 2)]
    for a, b in zip(*runs, strict=True): assert same(a, b)
    x = torch.cat([x for x, *_ in runs[0]])
    assert x.mean().abs() < 0.35 and 0.7 < x.std() < 1.3

def test_real_cifar10_as_jpeg():
    home = DATA
    if not (home/'cifar10-jpeg'/'train').is_dir(): pytest.skip(f'no cifar10-jpeg in {home}: see data/README.md')
    source = load_source('cifar10-jpeg', home)
    assert [len(source.train), len(source.val), len(source.classes)] == [50_000, 10_000, 10] and source.train.load(0).size == (32, 32)
