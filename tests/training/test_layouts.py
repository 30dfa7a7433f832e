"Folders as people have them: read as they are, or refused in one sentence"
import os, shutil, unicodedata
import pytest
from PIL import Image
from nwrepro.training.layouts import image_files, read_split
from nwrepro.training.sources import load_source

def put(folder, *names, shade=None):
    for k, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 9), (k % 256, 10*len(name) % 256, 200 if shade is None else shade)).save(folder/name, {'.jfif': 'JPEG'}.get(os.path.splitext(name)[1]))

def plain(folder, split='train', classes=('cat', 'dog'), n=3, suffix='png', shade=None): put(folder/split, *(f'{c}/{i}.{suffix}' for c in classes for i in range(n)), shade=shade)

@pytest.fixture
def pets(tmp_path):
    plain(tmp_path, 'train', shade=1), plain(tmp_path, 'val', shade=2)
    return tmp_path

def fault(folder, data='folder'):
    with pytest.raises(ValueError) as caught: load_source(data, folder)
    assert '\n' not in str(caught.value)
    return str(caught.value)

def test_tiny_imagenet_as_it_comes(tmp_path):
    put(tmp_path, *(f'train/{c}/images/{c}_{i}.JPEG' for c in ('n01', 'n02', 'n03') for i in range(2)), *(f'val/images/val_{i}.JPEG' for i in range(6)), *(f'test/images/test_{i}.JPEG' for i in range(2)))
    for c in ('n01', 'n02', 'n03'): (tmp_path/'train'/c/f'{c}_boxes.txt').write_text('')
    (tmp_path/'val/val_annotations.txt').write_text(''.join(f'val_{i}.JPEG\tn0{3-i//2}\t0\t0\t62\t57\n' for i in range(6)))
    source = load_source('folder', tmp_path)
    assert source.classes == ['n01', 'n02', 'n03'] and source.train.labels == [0, 0, 1, 1, 2, 2] and source.val.labels == [2, 2, 1, 1, 0, 0]
    assert source.val.name(0) == 'val/images/val_0.JPEG' and source.val.load(0).size == (9, 9) and 'left out: 4 .txt' in source.note

def test_kaggles_imagenet(tmp_path):
    home = tmp_path/'imagenet/ILSVRC/Data/CLS-LOC'
    put(home, 'train/n01/n01_1.JPEG', 'train/n02/n02_1.JPEG', 'val/ILSVRC2012_val_00000001.JPEG', 'val/ILSVRC2012_val_00000002.JPEG', 'test/ILSVRC2012_test_00000001.JPEG')
    (tmp_path/'imagenet/LOC_val_solution.csv').write_text('ImageId,PredictionString\nILSVRC2012_val_00000002,n01 1 2 3 4 \nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n')
    source = load_source('imagenet', tmp_path)
    assert source.classes == ['n01', 'n02'] and source.val.labels == [1, 0] and load_source('auto', tmp_path).name == 'imagenet'

@pytest.mark.parametrize('name', ['imagenet_2012_validation_synset_labels.txt', 'synset_labels.txt'])
def test_validation_images_in_one_folder(tmp_path, name):
    put(tmp_path, 'train/n01/1.JPEG', 'train/n02/2.JPEG', *(f'val/ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 13)))
    assert 'val holds 12 images and no folders of classes' in (said := fault(tmp_path)) and 'val_annotations.txt, LOC_val_solution.csv, imagenet_2012_validation_synset_labels.txt' in said
    (tmp_path/name).write_text('n01\nn02\n'*6)
    assert load_source('folder', tmp_path).val.labels == [0, 1]*6
    (tmp_path/name).write_text('n01\nn02\n'*5)
    assert f'{name} has no class for 2 of 12 images' in fault(tmp_path)

def test_valid_comes_before_test(tmp_path):
    for split, n in (('train', 3), ('valid', 2), ('test', 1)): plain(tmp_path, split, n=n, shade=n)
    assert len(load_source('folder', tmp_path).val) == 4

def test_what_programs_leave_behind_is_no_class(pets):
    for split in ('train', 'val'): put(pets/split, '.ipynb_checkpoints/1.png', 'thumbs/1.png', '__MACOSX/1.png', 'cat/.hidden.png')
    source = load_source('folder', pets)
    assert source.classes == ['cat', 'dog'] and len(source.train) == 6
    assert 'left out: ' in source.note and all(f'2 folder {name}' in source.note for name in ('.ipynb_checkpoints', 'thumbs', '__MACOSX'))

def test_images_of_every_kind_are_read(pets):
    put(pets/'train', *(f'cat/{k}.{suffix}' for k, suffix in enumerate(('webp', 'bmp', 'tif', 'jfif', 'tiff', 'JPG'), 10)))
    (pets/'train/cat/scan.pdf').touch()
    source = load_source('folder', pets)
    assert len(source.train) == 12 and 'left out: 1 .pdf' in source.note and all(source.train.load(i).mode == 'RGB' for i in range(12))

def test_a_circle_of_links_is_refused(pets):
    (pets/'train/cat/again').symlink_to(pets/'train')
    assert 'are one folder, by a link' in fault(pets)

def test_one_folder_as_two_classes_is_refused(pets):
    for split in ('train', 'val'): (pets/split/'kitten').symlink_to(pets/split/'cat')
    assert 'are one folder, by a link' in fault(pets)

def test_one_file_in_two_classes_is_refused(pets):
    put(pets, 'both.png')
    for name in ('cat', 'dog'): (pets/'train'/name/'both.png').symlink_to(pets/'both.png')
    assert 'is linked into two classes, cat and dog' in fault(pets)

def test_test_images_that_are_those_of_training_are_refused(pets):
    shutil.rmtree(pets/'val')
    (pets/'val').symlink_to(pets/'train')
    assert 'tests on the images that it trains on' in fault(pets)
    (pets/'val').unlink()
    shutil.copytree(pets/'train', pets/'val')
    assert 'tests on the images that it trains on' in fault(pets)

def test_names_of_one_look_are_one_class(tmp_path):
    for split, form in (('train', 'NFC'), ('val', 'NFD')): plain(tmp_path, split, (unicodedata.normalize(form, 'café'), 'dog'), shade=len(split))
    assert load_source('folder', tmp_path).classes == [unicodedata.normalize('NFC', 'café'), 'dog']

def test_a_name_that_is_no_text_is_refused(pets):
    os.makedirs(os.fsencode(pets/'train')+b'/caf\xe9')
    assert 'has a name that is no UTF-8 text: rename it' in fault(pets)

def test_order_and_labels_are_those_of_timm(tmp_path):
    from timm.data.readers import create_reader
    plain(tmp_path, 'train', ('b10', 'b9', 'a'), n=12)
    images, classes, _ = read_split(tmp_path/'train')
    reader = create_reader('', root=str(tmp_path/'train'))
    assert classes == list(reader.class_to_idx) and [(images.path(i), y) for i, y in enumerate(images.labels)] == reader.samples and len(image_files(tmp_path/'train')[0]) == 36
