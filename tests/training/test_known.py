"A network of known accuracy through the pipeline of a run: the command gives what the run has recorded"
import json, re
from pathlib import Path
import pytest, timm, torch
from safetensors.torch import load_file, save_file
from nwrepro import known
from nwrepro.training.data import load_source
from nwrepro.training.recipe import make_recipe
from nwrepro.methods.schemes import to_timm
from nwrepro.training.command import main as train
from nwrepro.training.build import make_model

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
        assert known.main(['--weights', file, '--arch', 'resnet18', '--data', 'digits', '--image_size', '16', '--pipeline', 'period']) == 0
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
        assert known.main(['--weights', weights, '--arch', arch, '--data', 'digits']) == 2
        assert sentence in capsys.readouterr().out.splitlines()[-1]
    assert known.main(['--weights', 'ten.pth', '--data', 'digts']) == 2 and "did you mean 'digits'" in capsys.readouterr().out

def test_a_network_that_does_not_fit_the_images_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='vit_tiny_patch16_224 takes images of 224 px alone'):
        known.score(timm.create_model('vit_tiny_patch16_224', num_classes=10).eval(), load_source('digits'), 32, 'period')
    make = timm.create_model
    monkeypatch.setattr(known.timm, 'create_model', lambda name, pretrained: make(name))  # its weights are not to be had offline
    with pytest.raises(ValueError, match='resnet18 tells 1000 classes apart, and the data has 10'): known.stock('resnet18', 'resnet50', 10)
