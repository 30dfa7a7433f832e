"""What the loop costs: images/s of `fit`'s steps against a bare loop over the same model and optimizer, batches already in memory.

python tools/bench_fit.py [parameters as python -m nwrepro.training takes them]   e.g. --norm wn --data imagenette --image_size 64
Prepared images are in the cache, as from a run's second epoch. Both run in turn in one process, after a warm-up round; medians over rounds are printed, and of their ratio also the quartiles.
"""
import statistics, tempfile, time
import torch
import torch.nn.functional as F
from nwrepro.training.sources import load_source
from nwrepro.training.loader import loader
from nwrepro.training.recipe import check_parameters, make_recipe
from nwrepro.training.command import parser
from nwrepro.training.lifecycle import begin_run
from nwrepro.training.build import make_model, make_views
from nwrepro.training.engine import start_training
from nwrepro.training.loop import train_epoch

STEPS, ROUNDS = 6, 24

def fit_steps(training):
    "The product's own steps: images from disk or memory, augmentation, checks, record"
    begin = time.perf_counter()
    end = training.progress.step+STEPS
    while training.progress.step < end: train_epoch(training, end, lambda line: None)
    return time.perf_counter()-begin

def bare_steps(engine, batches):
    "The least that trains"
    begin = time.perf_counter()
    for x, y in batches:
        loss = F.cross_entropy(engine.fast(x), y)
        engine.optimizer.zero_grad()
        loss.backward()
        engine.optimizer.step()
    return time.perf_counter()-begin

def main():
    given = vars(parser().parse_args())
    values = check_parameters(given)
    source = load_source(values['data'], values['data_dir'])
    recipe = make_recipe(given, source)
    views = make_views(recipe, source)
    with tempfile.TemporaryDirectory() as folder:
        training = start_training(make_model(recipe, len(source.classes)), recipe, views, begin_run(recipe, source, given, folder), workers=values['workers'])
        for i in views.train.indices[:20_000]: views.train[0, i]
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        ready = [(x.contiguous(memory_format=layout), y) for (x, y, _), _ in zip(loader(views.train, 0, recipe.batch_size), range(STEPS))]
        seconds = [(fit_steps(training), bare_steps(training.engine, ready)) for _ in range(ROUNDS+1)][1:]
    images = STEPS*recipe.batch_size
    fit, bare = (images/statistics.median(column) for column in zip(*seconds, strict=True))
    low, ratio, high = statistics.quantiles([b/f for f, b in seconds])
    print(f'{recipe.norm}, {recipe.arch} on {recipe.data}, {recipe.image_size} px, batch {recipe.batch_size}, {torch.get_num_threads()} threads, '
          f'{ROUNDS} rounds of {STEPS} steps: fit {fit:.1f} images/s, bare {bare:.1f} images/s, ratio {ratio:.3f} '
          f'(quartiles {low:.3f} to {high:.3f}), torch {torch.__version__}')

if __name__ == '__main__': main()
