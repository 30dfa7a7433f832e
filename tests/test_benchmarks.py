"The benchmarks of `tools/` run from end to end, small, and name what they compare; torch's folding of the stock network leaves no batch normalization"
import importlib.util, json, re
import numpy, pytest, timm, torch
from torch import nn

from conftest import ROOT, run_in
from test_data import make_folder, noise

DEPLOY = '--arch resnet18 --batch_size 2 --image_size 32 --rounds 2'.split()
LOADER = '--image_size 32 --images 24 --batch_size 8 --rounds 2'.split()

def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@torch.no_grad()
def test_torchs_folding_reaches_every_pair():
    bench = script('bench_deploy')
    torch.manual_seed(0)
    stock, x = bench.lived_in(timm.create_model('resnet18')).eval(), torch.randn(2, 3, 32, 32)
    fused = bench.fused(stock)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)] and [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bench.difference(fused, stock, x) < 5e-5

def test_the_loaders_do_the_same_work(tmp_path):
    bench = script('bench_loader')
    photos, rng = tmp_path/'photos', numpy.random.default_rng(0)
    for i in range(12):
        path = photos/f'n{i%3}'/f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(rng, 90+9*i, 120-5*i).save(path)  # no view enlarges them, which timm and torchvision do in other ways
    source = bench.source_of(photos)
    asked = bench.argparse.Namespace(image_size=32, images=96, batch_size=8, workers=0)
    for kind in bench.PIPELINES:
        views = bench.Views(source.train, bench.repeated(list(range(12)), 96), bench.pipelines(source, 32, kind), True)
        bench.shards_of(source, tmp_path/kind)
        loaders = [bench.by_nwrepro(views, asked), bench.by_torchvision(photos, kind, source, asked), bench.by_timm(photos, kind, source, asked),
                   bench.by_webdataset(tmp_path/kind, kind, source, asked)]
        epochs = [torch.cat([x for x, *_ in batches(0)]) for batches in loaders]
        assert {(x.shape, x.dtype) for x in epochs} == {((96, 3, 32, 32), torch.float32)}
        assert all(abs(x.mean()-epochs[0].mean()) < 0.1 and abs(x.std()-epochs[0].std()) < 0.1 for x in epochs)

@pytest.mark.slow
def test_bench_deploy(project):
    done = run_in(project, 'python', 'tools/bench_deploy.py', *DEPLOY)
    assert done.returncode == 0, done.stderr
    assert re.findall(r'^(fp32|bf16) (timm bn|torch fused bn|folded bn|folded wn) ', done.stdout, re.M) == \
        [(precision, name) for precision in ('fp32', 'bf16') for name in ('timm bn', 'torch fused bn', 'folded bn', 'folded wn')]

@pytest.mark.slow
@pytest.mark.parametrize('workers', ('0', '2'))
def test_bench_loader(project, tmp_path, workers):
    done = run_in(project, 'python', 'tools/bench_loader.py', make_folder(tmp_path/'photos')/'train', *LOADER, '--workers', workers)
    assert done.returncode == 0, done.stderr
    names = ('nwrepro', 'jpeg', 'lossless', 'torchvision', 'timm', 'webdataset', 'kept')[:7 if workers == '0' else 6]
    assert re.findall(r'^(period|modern) +(\w+) +[\d.]+ images/s', done.stdout, re.M) == [(kind, name) for kind in ('period', 'modern') for name in names]

@pytest.mark.slow
@pytest.mark.parametrize('bench', ('fit', 'survival'))
def test_the_benchmarks_of_the_loop(project, bench):
    done = run_in(project, 'python', f'tools/bench_{bench}.py', *'--norm none --data digits --arch resnet18 --image_size 16 --batch_size 4'.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('none, resnet18 on digits, 16 px, batch 4')

@pytest.mark.slow
def test_one_process_under_torchrun_against_none(project):
    done = run_in(project, 'python', 'tools/bench_torchrun.py', *'8 --norm none --data digits --arch resnet18 --image_size 16 --batch_size 4 --bn_batch 4'.split())
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r'alone [\d.]+ images/s, torchrun [\d.]+ images/s\ntime under torchrun / alone \d\.\d{4} \(95 %: [\d.]+ to [\d.]+\), quartiles [\d.]+ to [\d.]+, 8 turns of 2 steps\n', done.stdout), done.stdout

@pytest.mark.slow
@pytest.mark.parametrize('norm', ('bn', 'wn'))
def test_scores_taken_four_ways(project, norm):
    trained = run_in(project, 'python', '-m', 'nwrepro.training', *f'--norm {norm} --data digits --arch resnet18 --image_size 16 --train_images 100 --batch_size 20 --bn_batch 10 --epochs 3'.split())
    assert trained.returncode == 0, trained.stderr
    path, = (project/'reports/runs').glob('*/summary.json')
    done = run_in(project, 'python', 'tools/score_modes.py', path.parent.name)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['images'] == 100 and found['top1']['centre crops, eval mode'] == round(json.loads(path.read_text())['train_top1'], 2)
    assert (found['top1']['random crops, eval mode'] == found['top1']['random crops, batch statistics']) == (norm == 'wn')
