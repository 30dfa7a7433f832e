"Whole runs: real photographs, a folder of one's own, and a broken file among the images"
import numpy, pytest
from PIL import Image
from nwrepro.training.sources import load_source
from nwrepro.training.records import load_runs
from nwrepro.training.command import main, train

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A project of its own, so that runs and checkpoints stay out of this one"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    return tmp_path

def photographs(folder, n=8):
    "Two classes of noise as JPEG files"
    noise = numpy.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('a', 'b'):
            (folder/split/kind).mkdir(parents=True)
            for i in range(n): Image.fromarray(noise.integers(0, 255, (24, 20, 3), dtype='uint8')).save(folder/split/kind/f'{i}.jpg')

SMALL = '--data folder --arch resnet18 --image_size 16 --epochs 1 --batch_size 4 --bn_batch 4 --warmup_epochs 0 --lr 0.01'.split()

@pytest.mark.parametrize('workers', ('0', '2'))
def test_a_broken_image_ends_the_run_in_one_sentence(elsewhere, capsys, workers):
    photographs(elsewhere/'images')
    broken = elsewhere/'images/train/b/3.jpg'
    broken.write_bytes(broken.read_bytes()[:200])
    assert main([*SMALL, '--data_dir', str(elsewhere/'images'), '--workers', workers]) == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert '3.jpg' in last and 'cannot be read' in last
    assert load_runs()['status'].tolist() == ['started']
    Image.new('RGB', (20, 24)).save(broken)
    assert main([*SMALL, '--data_dir', str(elsewhere/'images'), '--workers', workers]) == 0
    assert sorted(load_runs()['status']) == ['finished', 'started']  # other images are another run

def test_a_user_s_own_folder_trains(elsewhere, capsys):
    photographs(elsewhere/'images')
    assert main([*SMALL, '--data_dir', str(elsewhere/'images')]) == 0
    row, = load_runs().to_dict('records')
    assert (row['status'], row['data'], row['top5']) == ('finished', 'folder', 100.)

@pytest.mark.slow
@pytest.mark.parametrize('norm', ('bn', 'np'))
def test_real_photographs_train(norm, elsewhere, imagenette):
    summary = train(dict(norm=norm, data='imagenette', data_dir=str(imagenette.parent), arch='resnet18', train_images=500, image_size=64, epochs=1,
                         batch_size=32, max_steps=10), show=lambda line: None)
    assert summary['status'] in ('finished', 'diverged')
    if summary['status'] == 'finished':
        lines = (elsewhere/'reports/runs'/load_runs()['run'][0]/'predictions.csv').read_text().splitlines()
        images = load_source('imagenette', str(imagenette.parent)).val
        assert len(lines) == 3926
        for line in lines[1::500]:
            place, label, _ = map(int, line.split(','))
            assert images.labels[place] == label and images.name(place).endswith('.JPEG')
