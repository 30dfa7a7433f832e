"A finished run as files for others: what is written, what the card says, and what comes back"
import csv, json, re

import pytest, torch
from huggingface_hub import ModelCard

from conftest import FIVE
from nwrepro import SCHEMES, fold, load_model
from nwrepro.cli import main
from nwrepro.results.weights import data_card, find_run, model_card, write_model
from nwrepro.training.command import train
from nwrepro.training.lifecycle import trained
from nwrepro.training.runs import Record

SMALL = dict(data='digits', arch='resnet18', stem='cifar', width=0.25, image_size=16, train_images=100, batch_size=20, bn_batch=10, epochs=1, warmup_epochs=0, max_steps=2)
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    return tmp_path

def finished(**given):
    train(SMALL | given, show=lambda line: None)
    return find_run(None)

@torch.no_grad()
def error(a, b): return ((a(X)-b(X)).abs().max()/b(X).abs().max()).item()

@pytest.mark.parametrize('norm', FIVE)
def test_what_is_written_comes_back_and_is_served_as_onnx(norm, elsewhere, capsys):
    pytest.importorskip('onnxruntime')
    run = finished(norm=norm, precision='bf16')
    exact, rounded = (load_model(write_model(run, dtype, dtype)) for dtype in ('fp32', 'bf16'))
    assert error(exact, trained(run)) == 0 and 0 < error(rounded, exact) < 0.05
    assert {p.dtype for p in rounded.parameters()} == {torch.float32} and not rounded.training
    assert error(fold(rounded), rounded) < 1e-4
    sizes = [(elsewhere/dtype/'model.safetensors').stat().st_size for dtype in ('fp32', 'bf16')]
    assert sizes[1] < 1.5e6 and 0.49 < sizes[1]/sizes[0] < 0.52
    assert main(['export', 'run.onnx']) == 0
    name, difference = re.match(r'(\S+): run.onnx differs from torch by (\S+) of the largest logit$', capsys.readouterr().out).groups()
    assert name == run.name and float(difference) <= 1e-5

def test_a_scheme_of_ones_own_travels_with_its_weights(elsewhere, monkeypatch):
    (elsewhere/'my_schemes.py').write_text("from torch import nn\nfrom nwrepro import SCHEMES, Scheme\nSCHEMES['mine'] = Scheme(norm=lambda bn: nn.GroupNorm(2, bn.num_features))\n")
    run = finished(norm='mine', schemes='my_schemes.py', lr=0.01)
    expected, folder = trained(run), write_model(run, 'given')
    (elsewhere/'my_schemes.py').unlink()
    SCHEMES.pop('mine')
    assert error(load_model(folder), expected) == 0 and 'a scheme of its own, scheme file `scheme.py`' in (folder/'README.md').read_text()

def test_the_card_is_what_the_hub_takes_and_what_the_record_says(elsewhere):
    run = finished(norm='wn', holdout=0.2, data_dir=str(elsewhere))
    text = (write_model(run, 'given', 'bf16')/'README.md').read_text()
    card = ModelCard(text)
    result, = card.data.eval_results
    right, images = round(run.summary['top1']*20/100), 20
    assert (result.metric_type, result.metric_value, result.dataset_split) == ('accuracy', round(100*right/images, 2), 'holdout')
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ('apache-2.0', 'image-classification', run.name)
    z, p = 1.959964, right/images  # Wilson's interval by hand
    middle, half = (p+z*z/2/images)/(1+z*z/images), z/(1+z*z/images)*(p*(1-p)/images+z*z/4/images**2)**0.5
    for expected in (f'Top-1 on 20 images of a hold-out split: **{100*p:.2f} %** (95 % interval over images {100*(middle-half):.2f} to {100*(middle+half):.2f}; n = 1 run, seed 0)',
                     f"On training images, in evaluation mode: {run.summary['train_top1']:.2f} %", '`wn` (weight normalization)', '| lr | 0.05 |', 'CC BY 4.0', 'stored in bfloat16',
                     '100 training images, of which a share of 0.2 was held out', '# resnet18 with weight normalization, trained on scikit-learn digits\n', run.name, run.provenance['code']): assert expected in text
    assert str(elsewhere) not in text+(elsewhere/'given/config.json').read_text()

@pytest.mark.parametrize('data, metadata, words', [
    ('imagenet', dict(license='other', license_name='imagenet-terms-of-access', license_link='https://image-net.org/download'), 'non-commercial research'),
    ('imagenette', dict(license='other', datasets=['frgfm/imagenette']), 'non-commercial research'), ('cifar10-jpeg', dict(license='apache-2.0', datasets=['uoft-cs/cifar10']), 'none stated'),
    ('folder', dict(license='unknown'), 'ask whoever made the data')])
def test_licences_of_the_data(data, metadata, words, elsewhere):
    run = finished(norm='bn')
    config = json.loads((run.path/'config.json').read_text()) | dict(data=data)
    (run.path/'config.json').write_text(json.dumps(config))
    card = ModelCard(model_card(run, torch.float32))
    assert {k: card.data.to_dict().get(k) for k in metadata} == metadata and words in card.text and data_card(data).name in card.text

def test_statistics_are_those_that_the_run_used(elsewhere):
    from nwrepro.training.sources import load_source
    digits = load_source('digits')
    assert (data_card('digits').mean, data_card('digits').std) == (digits.mean, digits.std)

BAD = [(['out', '--run', 'nobody'], "no run 'nobody' among the 1 of reports/runs"), (['out', '--dtype', 'fp16'], "unknown dtype 'fp16': did you mean"), (['out', '--runs', 'nowhere'], 'no finished run has its weights here')]

@pytest.mark.parametrize('words, sentence', BAD, ids=[' '.join(words) for words, _ in BAD])
def test_a_wrong_word_is_answered_in_one_sentence(words, sentence, elsewhere, capsys):
    finished(norm='bn')
    assert main(['export', *words]) == 2
    answer = capsys.readouterr()
    assert answer.out == '' and answer.err.startswith(sentence) and answer.err.count('\n') == 1 and not (elsewhere/'out').exists()

def test_what_is_not_there_is_named(elsewhere):
    with pytest.raises(ValueError, match='nowhere holds no config.json and no model.safetensors: give a folder as `nwrepro export` writes it'): load_model('nowhere')
    run = finished(norm='bn')
    run.checkpoints.joinpath('final.safetensors').unlink()
    with pytest.raises(ValueError, match='has no weights here'): write_model(run, 'out')
    assert not (elsewhere/'out').exists()

def test_only_a_finished_run_is_given_away(elsewhere):
    train(SMALL | dict(norm='none', lr=1e6, max_steps=5), show=lambda line: None)
    run, = [Record(path.name) for path in (elsewhere/'reports/runs').iterdir()]
    with pytest.raises(ValueError, match='is diverged: only a finished run can be exported'): write_model(run, 'out')

def test_the_run_that_ended_last_is_taken_unless_another_is_named(elsewhere):
    first = finished(norm='bn')
    assert finished(norm='wn').config['norm'] == 'wn' and find_run(first.name).config['norm'] == 'bn'
    with (first.path/'predictions.csv').open() as file: assert len(list(csv.reader(file))) == 361
