"""What one process under torchrun costs against none: python tools/bench_torchrun.py [TURNS] [parameters as python -m nwrepro.training takes them]

The same run stands ready twice, alone and under `torchrun --nproc-per-node 1`. They train in TURNS (200), two steps at a time, while the other waits (torchrun
itself is halted), so that a slow minute of the machine meets both. Printed are the images per second of each and the ratio of their times in the same turn: median,
quartiles, and the interval that holds the median in 95 of 100 such measurements. The default is that of a run."""
import os, signal, statistics, subprocess, sys, tempfile, time
from nwrepro.results.costs import step_ratio
from nwrepro.training.command import parser, prepare
from nwrepro.training.lifecycle import begin_run
from nwrepro.training.build import make_model
from nwrepro.training.engine import start_training
from nwrepro.training.loop import train_epoch

STEPS, WARM = 2, 3

def stand_ready(words):
    "The process that trains: a piece of the run for each line on stdin, and its seconds on stdout"
    given = vars(parser().parse_args(words))
    recipe, source, views, _ = prepare(given)
    with tempfile.TemporaryDirectory() as folder:
        training = start_training(make_model(recipe, len(source.classes)), recipe, views, begin_run(recipe, source, given, folder))
        print(recipe.batch_size*STEPS, flush=True)
        for _ in sys.stdin:
            begin, end = time.perf_counter(), training.progress.step+STEPS
            while training.progress.step < end: train_epoch(training, end, lambda line: None)
            print(time.perf_counter()-begin, flush=True)

def main(turns, words):
    env = os.environ | dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS') or str(len(os.sched_getaffinity(0))))  # torchrun would give each process one thread
    ways = dict(alone=[], torchrun=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '1'])
    command = lambda way: [sys.executable, *ways[way], __file__, 'stand ready', *words]
    started = {way: subprocess.Popen(command(way), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for way in ways}
    images = {way: float(process.stdout.readline()) for way, process in started.items()}

    def turn(way):
        process = started[way]
        process.send_signal(signal.SIGCONT)
        print(file=process.stdin, flush=True)
        seconds = float(process.stdout.readline())
        if way == 'torchrun': process.send_signal(signal.SIGSTOP)
        return seconds
    found = [{way: turn(way) for way in list(ways)[::-1 if k % 2 else 1]} for k in range(WARM+turns)][WARM:]
    for process in started.values():
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        process.wait()
    seconds = {way: [row[way] for row in found] for way in ways}
    ratio = step_ratio(dict(seconds=seconds), 'torchrun', 'alone')
    low, _, high = statistics.quantiles(map(float.__truediv__, seconds['torchrun'], seconds['alone']), n=4)
    print(', '.join(f'{way} {images[way]/statistics.median(seconds[way]):.1f} images/s' for way in ways))
    print(f'time under torchrun / alone {ratio.value:.4f} (95 %: {ratio.low:.4f} to {ratio.high:.4f}), quartiles {low:.3f} to {high:.3f}, {turns} turns of {STEPS} steps')

if __name__ == '__main__':
    first = ''.join(sys.argv[1:2])
    if first == 'stand ready': stand_ready(sys.argv[2:])
    else: main(int(first) if first.isdigit() else 200, sys.argv[1+first.isdigit():])
