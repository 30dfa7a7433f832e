"The bar in the terminal: what it says of a run at any time, and where there is none"
import io, os, pty, subprocess, sys

import pytest

from nwrepro.training.progress import ProgressBar, progress, result_line
from nwrepro.training.runs import Run

def begun(tmp_path, *lines, **config):
    run = Run('wn-digits-resnet18-s0-0123abcd', tmp_path)
    run.begin(dict(norm='wn', data='digits', seed=0, epochs=8) | config, {})
    for event, step, epoch, values in lines: run.log(event, step, epoch, **values)
    return run

TRAIN, EVAL = dict(loss=0.5, top1=80.), dict(top1=70., train_top1=90.)

def test_without_a_terminal_nothing_is_read_or_written(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    with ProgressBar() as bar: bar(None)
    assert capfd.readouterr() == ('', '')

CODE = 'from nwrepro.training.progress import terminal; print(terminal())'

@pytest.mark.parametrize('env, found', [({}, '2'), (dict(JPY_SESSION_NAME='nbs/train.ipynb'), 'None')], ids=['terminal', 'JupyterLab'])
def test_the_terminal(env, found):
    master, slave = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k != 'JPY_SESSION_NAME'}
    done = subprocess.run([sys.executable, '-c', CODE], stderr=slave, stdout=subprocess.PIPE, text=True, env=clean | env)
    os.close(slave), os.close(master)
    assert done.stdout.strip() == found

def test_the_bar_goes_through_a_run_and_is_cleared_at_its_end(tmp_path):
    run, file = begun(tmp_path), io.StringIO()
    with ProgressBar(file) as bar:
        bar(run)
        run.log('train', 100, 2., **TRAIN)
        bar(run)
        assert 'wn epoch 2.00 of 8 |' in file.getvalue() and 'loss 0.500, top-1 80.0 % [' in file.getvalue() and bar.bar.n == 2
        run.log('eval', 400, 8., **EVAL)
        bar(run)
        assert 'wn epoch 8.00 of 8 |' in file.getvalue() and 'test top-1 70.0 %' in file.getvalue()
    after = file.getvalue().rpartition('left]')[2]
    assert ' '*20 in after and after.strip('\r\n \x1b[A') == ''

def test_time_left_of_a_resumed_run_counts_from_where_it_resumed(tmp_path):
    run = begun(tmp_path, ('train', 200, 4., TRAIN))
    with ProgressBar(io.StringIO()) as bar:
        bar(run)
        bar.bar.start_t -= 60  # a minute ago
        run.log('train', 300, 6., **TRAIN)
        bar(run)
        assert (bar.bar.initial, bar.bar.n) == (4, 6) and '01:00 left' in str(bar.bar)

@pytest.mark.parametrize('steps, total', [(None, 8), (100, 2.), (9999, 8)])
def test_max_steps_shorten_the_bar(steps, total):
    assert progress(dict(epochs=8, max_steps=steps), [dict(event='train', step=50, epoch=1.) | TRAIN])[1] == total

def test_the_last_line_of_every_end(tmp_path):
    run = begun(tmp_path, holdout=0.1)
    run.finish('finished', top1=96.389, train_top1=100.)
    assert result_line(run) == 'wn on digits, seed 0: finished, hold-out top-1 96.39 %, training top-1 100.00 %'
    other = begun(tmp_path/'other')
    other.finish('diverged', diverged_step=7, diverged_lr=0.25, diverged_reason='loss nan')
    assert result_line(other) == 'wn on digits, seed 0: diverged at step 7, at learning rate 0.25 (loss nan)'
