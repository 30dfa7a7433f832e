"Folding and the way back to timm, for every scheme and for schemes of one's own"
import sys
import pytest, timm, torch
from conftest import FIVE
from safetensors.torch import load, save
from torch import nn
from nwrepro.methods.layers import WNConv2d, weight_normalize
from nwrepro.methods.deploy import fold, onnx_error, to_timm, write_onnx
from nwrepro.methods.networks import stock_network
from nwrepro.methods.schemes import convert, no_norm, strict_weight_normalize
from test_schemes import mine

def network(arch, norm, dtype=torch.float32, output_stride=32, **kwargs):
    "A converted network with every parameter and statistic moved off its initialization"
    torch.manual_seed(0)
    model = convert(timm.create_model(arch, num_classes=10, output_stride=output_stride), norm, **kwargs).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1+0.2*torch.rand_like(p)).add_(0.05*torch.randn_like(p)*p.abs().mean())
    model.train()(torch.randn(8, 3, 64, 64, dtype=dtype))
    return model.eval()

def error(a, b): return ((a-b).abs().max()/b.abs().max()).item()

LIMITS = {torch.float64: 1e-9, torch.float32: 5e-5}

@torch.no_grad()
@pytest.mark.parametrize('dtype', LIMITS, ids=str)
@pytest.mark.parametrize('norm', FIVE)
@pytest.mark.parametrize('arch', ('resnet18', 'resnet50'))
def test_fold_keeps_the_logits(arch, norm, dtype):
    model, x = network(arch, norm, dtype), torch.randn(4, 3, 64, 64, dtype=dtype)
    folded = fold(model)
    folded.load_state_dict(folded.state_dict())
    assert error(folded(x), model(x)) <= LIMITS[dtype]
    assert not [m for m in folded.modules() if isinstance(m, (nn.BatchNorm2d, WNConv2d))]
    assert all(m.bias is not None for m in folded.modules() if isinstance(m, nn.Conv2d)) == (norm != 'trelu')

@torch.no_grad()
@pytest.mark.parametrize('norm', FIVE)
def test_fold_keeps_dilated_filters(norm):
    "A network for segmentation, which keeps its maps large"
    model, x = network('resnet26', norm, torch.float64, output_stride=8), torch.randn(2, 3, 64, 64).double()
    assert model.layer4[-1].conv2.dilation == (4, 4)
    assert error(fold(model)(x), model(x)) <= LIMITS[torch.float64]

@pytest.mark.parametrize('layout', (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize('norm', FIVE)
def test_fold_keeps_the_memory_format(norm, layout):
    folded = fold(network('resnet18', norm).to(memory_format=layout))
    assert all(m.weight.is_contiguous(memory_format=layout) for m in folded.modules() if isinstance(m, nn.Conv2d))

@torch.no_grad()
@pytest.mark.parametrize('norm', ('bn', 'none', 'wn'))
@pytest.mark.parametrize('arch, dtype', [('resnet18', torch.float64), ('resnet50', torch.float32)], ids=str)
def test_stock_timm_loads_what_to_timm_writes(arch, norm, dtype):
    model, x = network(arch, norm, dtype, bn_eps=1e-4), torch.randn(4, 3, 64, 64, dtype=dtype)
    stock = timm.create_model(arch, num_classes=10).to(dtype)
    stock.load_state_dict(load(save(to_timm(model))), strict=True)
    assert error(stock.eval()(x), model(x)) <= LIMITS[dtype]

@torch.no_grad()
@pytest.mark.parametrize('norm', FIVE)
@pytest.mark.parametrize('arch', ('resnet50d', 'resnetaa50', 'resnet34d'))
def test_networks_of_known_layers_are_converted_whatever_their_stem_and_pools(arch, norm):
    model, x = network(arch, norm, torch.float64), torch.randn(2, 3, 64, 64).double()
    assert model(x).isfinite().all()
    if norm != 'bn' or arch == 'resnetaa50': assert error(fold(model)(x), model(x)) <= LIMITS[torch.float64]
    else:
        with pytest.raises(ValueError, match=r'GhostBatchNorm2d \(bn1\) does not directly follow a convolution'): fold(model)
    with pytest.raises(ValueError, match=r'fold\(model\)'): to_timm(model)

def test_a_layer_that_hides_its_weight_is_neither_folded_nor_given_back(mine):
    class Doubled(nn.Conv2d):
        def forward(self, x): return self._conv_forward(x, 2*self.weight, self.bias)
    def doubled(conv): return Doubled(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    model = mine(conv=doubled, inits=('keep',))
    for give in (fold, to_timm):
        with pytest.raises(ValueError, match='Doubled may make its weight in a way of its own: give it a property `w`'): give(model)
    Doubled.w = property(lambda self: 2*self.weight)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(fold(model)(x), model.eval()(x), atol=1e-4)

@pytest.mark.parametrize('slots', [dict(conv=weight_normalize, inits=('data',)), dict(conv=strict_weight_normalize), dict(norm=no_norm)], ids=['biases before bn', 'no biases before bn', 'no biases'])
def test_a_scheme_of_ones_own_is_given_back_whole(slots, mine):
    model = mine(**slots).train()
    x = torch.randn(4, 3, 32, 32)
    model(x), model.eval()
    stock = timm.create_model('resnet18', num_classes=10).eval()
    stock.load_state_dict(to_timm(model))
    assert torch.allclose(stock(x), model(x), rtol=1e-3, atol=1e-3*model(x).abs().max().item())

LATER = ('gn', 'gn_ws', 'wn_mbn', 'skipinit', 'nf', 'dyt')
NOT_FOLDED = ('gn', 'gn_ws')

@pytest.mark.parametrize('norm', (*FIVE, *LATER))
def test_onnx_gives_the_logits_of_torch(norm, tmp_path):
    for package in ('onnxscript', 'onnxruntime'): pytest.importorskip(package)
    torch.manual_seed(0)
    model = convert(stock_network('resnet18', 10, 'cifar', 0.25), norm, x=torch.randn(32, 3, 32, 32))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1+0.2*torch.rand_like(p)).add_(0.05*torch.randn_like(p)*p.abs().mean())
    model.train()(torch.randn(8, 3, 32, 32))
    for p in model.parameters(): p.data = p.data.bfloat16().float()  # as weights that were stored in bf16
    write_onnx(model if norm in NOT_FOLDED else fold(model), tmp_path/'model.onnx', 32)
    for images in (1, 5): assert onnx_error(tmp_path/'model.onnx', model, torch.randn(images, 3, 32, 32)) <= 1e-5

def test_onnx_of_the_paper_s_network_in_double_precision_and_channels_last(tmp_path):
    for package in ('onnxscript', 'onnxruntime'): pytest.importorskip(package)
    model = network('resnet50', 'wn', torch.float64, strides='v1').to(memory_format=torch.channels_last)
    write_onnx(fold(model), tmp_path/'model.onnx', 64)
    assert model.conv1.v.dtype == torch.float64 and model.conv1.v.is_contiguous(memory_format=torch.channels_last)  # left untouched
    assert onnx_error(tmp_path/'model.onnx', model.float(), torch.randn(2, 3, 64, 64)) <= 1e-5

def test_without_the_extra_onnx_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ValueError, match=r"onnxscript is not installed: pip install 'nwrepro\[export\]'"): write_onnx(nn.Identity(), tmp_path/'x.onnx', 8)
