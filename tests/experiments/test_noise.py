"Noise of batch statistics: measured on bn, and put on wn"
import importlib.util
import pytest, torch
from conftest import ROOT
from nwrepro.methods.custom import load_schemes, recorded_schemes
from nwrepro.training.sources import load_source
from nwrepro.training.loader import loader
from nwrepro.methods.layers import GhostBatchNorm2d
from nwrepro.training.recipe import make_recipe
from nwrepro.methods.deploy import fold
from nwrepro.methods.schemes import SCHEMES
from nwrepro.training.build import make_model, make_views

FILE = ROOT/'reports/cifar10/wn_noise.py'

def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    return made

@pytest.fixture
def noise(monkeypatch):
    monkeypatch.delitem(SCHEMES, 'wn_noise', raising=False)
    yield module(FILE)
    SCHEMES.pop('wn_noise', None)

def test_the_noise_has_the_size_asked_for_and_one_draw_per_group(noise):
    torch.manual_seed(0)
    layer, y = noise.BatchNoise(500, 0.1, 0.2), 3*torch.randn(8, 500, 6, 6)+5
    layer.bn_batch = 4
    out = layer(y)
    for group, changed in zip(y.split(4), out.split(4), strict=True):
        std, mean = torch.std_mean(group, (0, 2, 3), correction=0)
        after, moved = torch.std_mean(changed, (0, 2, 3), correction=0)
        assert (after/std-1).std().item() == pytest.approx(0.1, rel=0.15) and ((moved-mean)/std).std().item() == pytest.approx(0.2, rel=0.15)
    assert not torch.allclose(out[0], layer(y)[0]) and layer.eval()(y) is y
    torch.testing.assert_close((out[:4]-out[:4].mean((0, 2, 3), keepdim=True))/out[:4].std((0, 2, 3), keepdim=True), (y[:4]-y[:4].mean((0, 2, 3), keepdim=True))/y[:4].std((0, 2, 3), keepdim=True), atol=1e-4, rtol=1e-3)

def test_independent_normal_inputs_have_the_noise_that_theory_gives():
    bench, layer = module(ROOT/'tools/batch_noise.py'), GhostBatchNorm2d(64)
    batches = [(torch.randn(8, 64, 5, 5), None, None) for _ in range(200)]
    recipe = make_recipe(dict(data='digits'), load_source('digits'))
    (scale, shift), = bench.measure(torch.nn.Sequential(layer), batches, recipe).values()
    n = 8*5*5  # values behind each statistic
    assert scale == pytest.approx((2*n)**-0.5, rel=0.05) and shift == pytest.approx(n**-0.5, rel=0.05)
    assert layer.running_mean.eq(0).all()

def test_measured_on_bn_the_noise_trains_wn(noise, tmp_path, monkeypatch):
    given = dict(data='digits', arch='resnet18', train_images=100, epochs=1, image_size=16, batch_size=20, bn_batch=10)
    source = load_source('digits')
    recipe = make_recipe(given | dict(norm='bn'), source)
    views = make_views(recipe, source)
    sizes = module(ROOT/'tools/batch_noise.py').measure(make_model(recipe, 10), loader(views.train, 0, 10, drop_last=True), recipe)
    text = FILE.read_text()
    assert text.count('SIZES = {}') == 1
    (tmp_path/'wn_noise.py').write_text(text.replace('SIZES = {}', f'SIZES = {sizes}'))
    SCHEMES.pop('wn_noise')
    with recorded_schemes(tmp_path/'wn_noise.py'):
        recipe = make_recipe(given | dict(norm='wn_noise', lr=0.01), source)
        model = make_model(recipe, 10)
        assert all(m.bn_batch == 10 and m.scale > 0 for m in model.modules() if type(m).__name__ == 'BatchNoise')
        x = torch.randn(4, 3, 16, 16)
        torch.testing.assert_close(fold(model)(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert 'wn_noise' not in SCHEMES

def test_without_a_measurement_it_is_refused():
    with pytest.raises(ValueError, match="scheme 'wn_noise' cannot take an image: ValueError: wn_noise knows no noise for bn1: measure it"): load_schemes(str(FILE))
