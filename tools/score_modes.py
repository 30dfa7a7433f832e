"""Training accuracy of finished runs taken four ways: random or centre crops, in eval mode or with the statistics of batches.

python tools/score_modes.py RUN [RUN ...] > reports/study/modes.jsonl   names of folders in reports/runs, whose weights are still in data/checkpoints
One line of JSON per run, accuracies in percent. The images are one epoch of full batches, the same for all four.
"""
import copy, hashlib, json, sys
import torch
from nwrepro.training.loader import Views, loader
from nwrepro.training.sources import load_source
from nwrepro.training.recipe import make_recipe
from nwrepro.training.runs import Record
from nwrepro.training.provenance import machine
from nwrepro.training.build import make_views
from nwrepro.training.lifecycle import trained

@torch.no_grad()
def top1(model, views, recipe, training):
    model, hits, seen = copy.deepcopy(model).train(training), 0, 0  # batch statistics change the running ones
    for x, y, _ in loader(views, recipe.epochs, recipe.batch_size, drop_last=True):
        hits, seen = hits+(model(x).argmax(1) == y).sum().item(), seen+len(y)
    return round(100*hits/seen, 2), seen

def score(name):
    record = Record(name)
    given, weights = record.config['given'], (record.checkpoints/'final.safetensors').read_bytes()
    source = load_source(given['data'], given.get('data_dir'))
    recipe = make_recipe(given, source)
    model = trained(record)
    crops = make_views(recipe, source).train
    centres = Views(crops.images, crops.indices, crops.pipeline, train=False, seed=crops.seed)
    found = {f'{words}, {mode}': top1(model, views, recipe, mode == 'batch statistics')
             for words, views in (('random crops', crops), ('centre crops', centres)) for mode in ('eval mode', 'batch statistics')}
    (images,) = {seen for _, seen in found.values()}
    return dict(run=name, images=images, top1={k: v for k, (v, _) in found.items()}, weights_sha256=hashlib.sha256(weights).hexdigest(), torch=torch.__version__, cpu=machine()['cpu'])

if __name__ == '__main__':
    for name in sys.argv[1:]: print(json.dumps(score(name)), flush=True)
