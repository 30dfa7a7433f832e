"""What surviving costs: a checkpoint, as a share of the default period, and the check of each step's gradient, as a share of the step.

python tools/bench_survival.py [parameters as python -m nwrepro.training takes them]   e.g. --norm wn --data imagenette --image_size 64
Steps with and without the check run in turn in one process on one batch, after a warm-up round; medians over rounds are printed.
"""
import statistics, tempfile, time
import torch
from nwrepro.training import build, command, engine, lifecycle, loop
from nwrepro.training.sources import load_source
from nwrepro.training.loader import loader
from nwrepro.training.recipe import DEFAULTS, check_parameters, make_recipe
from nwrepro.training.checkpoint import checkpoint_files, release_lock

STEPS, ROUNDS = 6, 15

def seconds(f, *args):
    begin = time.perf_counter()
    f(*args)
    return time.perf_counter()-begin

def main():
    given = vars(command.parser().parse_args())
    values = check_parameters(given)
    source = load_source(values['data'], values['data_dir'])
    recipe = make_recipe(given, source)
    views = build.make_views(recipe, source)
    x, y, _ = next(iter(loader(views.train, 0, recipe.batch_size)))
    check, free = loop.grad_norm, torch.tensor(1.)
    def steps(checked):
        loop.grad_norm = check if checked else lambda params: free
        for _ in range(STEPS): loop.train_step(training, x, y)
    with tempfile.TemporaryDirectory() as folder:
        run = lifecycle.begin_run(recipe, source, given, folder)
        training = engine.start_training(build.make_model(recipe, len(source.classes)), recipe, views, run)
        rounds = [(seconds(steps, True), seconds(steps, False)) for _ in range(ROUNDS+1)][1:]
        writes = [seconds(loop.save_checkpoint, training) for _ in range(7)]
        size = checkpoint_files(run)[-1].stat().st_size
        release_lock(run)
    checked, unchecked = (statistics.median(column)/STEPS for column in zip(*rounds, strict=True))
    write, period = statistics.median(writes), 60*DEFAULTS['checkpoint_minutes']
    print(f'{recipe.norm}, {recipe.arch} on {recipe.data}, {recipe.image_size} px, batch {recipe.batch_size}, {torch.get_num_threads()} threads, {ROUNDS} rounds of {STEPS} steps: '
          f'step {1e3*checked:.1f} ms, unchecked {1e3*unchecked:.1f} ms, check {100*(checked/unchecked-1):.2f} % of a step; '
          f'checkpoint of {size/2**20:.0f} MiB {write:.2f} s, {100*write/period:.2f} % of {period:.0f} s; torch {torch.__version__}')

if __name__ == '__main__': main()
