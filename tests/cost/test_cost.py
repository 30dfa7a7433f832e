"What a step costs: counts and predictions against numbers made by hand, and cost.ipynb as papermill runs it"
import math

import numpy, pandas, pytest, timm, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import FIVE, run_in
from nwrepro.cost.roofline import Ceiling, Machine, Part, conv_work, filter_step, kept_bytes, map_rates, part_sizes, part_work, predict_step_ratios, step_work, work_seconds
from nwrepro.results.claims import CLAIMS
from nwrepro.results.costs import cost_records
from nwrepro.methods.schemes import convert, set_v1_strides

SMALL = '-p arch resnet18 -p image_size 16 -p batch_size 4 -p rounds 6'.split()
INF = float('inf')

# counts

@pytest.fixture(scope='module')
def stock(): return timm.create_model('resnet18', num_classes=10)

def test_sizes_of_a_network_by_hand(stock):
    parts = part_sizes(stock, 32).set_index('layer')
    assert parts.loc['conv1'].tolist() == ['conv', 3*32*32, 64*16*16, 64*3*49, 64, 64*16*16*3*49]
    assert parts.loc['maxpool', ['kind', 'inputs', 'outputs']].tolist() == ['pool', 64*16*16, 64*8*8]
    assert parts.loc['layer1.0'].tolist()[:3] == ['join', 64*8*8, 64*8*8] and parts.loc['layer2.0'].tolist()[:3] == ['join_down', 64*8*8,
        128*4*4]
    assert parts.loc['layer2.0.conv2', 'kind'] == 'last' and parts.loc['layer2.0.downsample.0', 'weights'] == 128*64
    assert parts.loc['fc'].tolist() == ['linear', 512, 10, 5120, 10, 5120]
    assert parts.kind.value_counts().to_dict() == dict(conv=12, last=8, act=9, join=5, join_down=3, pool=1, linear=1)

@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
def test_every_scheme_has_the_sizes_of_the_stock_network(arch):
    plain = timm.create_model(arch, num_classes=10)
    set_v1_strides(plain)
    for norm in FIVE:
        converted = convert(plain, norm)
        mode = [m.training for m in converted.modules()]
        pandas.testing.assert_frame_equal(part_sizes(converted, 32), part_sizes(plain, 32))
        assert [m.training for m in converted.modules()] == mode and not any(m._forward_hooks for m in converted.modules())

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kernels_are_timed_in_every_precision(dtype):
    assert all(rate > 0 for pair in map_rates(dtype, 64).values() for rate in pair) and filter_step(dtype, 8, 1) > 0

def test_survey_takes_its_hooks_off_when_the_pass_fails(stock):
    with pytest.raises(Exception): part_sizes(stock, 0)
    assert not any(m._forward_hooks for m in stock.modules())

def test_work_of_one_convolution_by_hand():
    row = Part('c', 'conv', 3*64, 4*64, 4*27, 4, 4*64*27)
    forward, backward = conv_work(row, 2, 'fp32', False)
    assert forward[3:] == (4*(2*192+108), 4*2*256, 512, 4, 2*2*6912, 4)
    assert backward[3:] == (4*(2*2*256+2*192+108), 4*(108+2*192), 512, 4, 4*2*6912, 4)
    assert conv_work(row, 2, 'fp32', True)[1][3:] == (4*(2*256+2*192), 4*108, 512, 4, 2*2*6912, 4)
    casts = [w for w in conv_work(row, 2, 'bf16', False) if w.slot == 'casts']
    assert [(w.part, w.read, w.write) for w in casts] == [('forward', 4*108, 2*108), ('backward', 2*108, 4*108)]

@pytest.mark.parametrize('device, counts', [('cpu', (3, 1, 4, 1)), ('cuda', (2, 1, 4, 1))])
@pytest.mark.parametrize('precision, width', [('fp32', 4), ('bf16', 2), ('fp64', 8)])
def test_passes_of_batch_normalization(device, counts, precision, width):
    row = Part('c', 'conv', 3*64, 4*64, 4*27, 4, 4*64*27)
    norm = [w for w in part_work(row, 'bn', 2, precision, device) if w.slot == 'norm']
    assert [(w.part, w.read, w.write) for w in norm] == [('forward', counts[0]*512*width, counts[1]*512*width),
                                                         ('backward', counts[2]*512*width, counts[3]*512*width)]

def total(parts, norm, slot, **setting):
    work = step_work(parts, norm, **dict(dict(batch_size=4), **setting))
    work = work[work.slot == slot]
    return int((work.read+work.write).sum())

def test_what_a_scheme_moves_besides_by_hand(stock):
    parts = part_sizes(stock, 32)
    weights, joins = int(parts.weights.sum()), parts[parts.kind.str.startswith('join')].outputs.sum()
    acts = parts[parts.kind == 'act'].outputs.sum()
    assert total(parts, 'none', 'optimizer') == 4*6*weights == total(parts, 'wn', 'filters') == total(parts, 'trelu', 'filters')
    assert total(parts, 'none', 'join') == 4*4*(5+3)*joins and total(parts, 'np', 'np') == 4*4*((3+3)*joins+5*acts)
    assert total(parts, 'trelu', 'trelu') == 4*4*(8*joins+5*acts)  # sum and activation apart, or the gradient of the shortcut's weight
    assert total(parts, 'torch_wn', 'weights') == 4*8*weights
    assert total(parts, 'wn', 'filters', precision='bf16') == 4*6*weights and total(parts, 'wn', 'casts', precision='bf16') == total(parts,
        'none', 'casts', precision='bf16') > 0
    assert total(parts, 'bn', 'bias') == total(parts, 'trelu', 'bias') == 0

def test_maps_grow_with_the_batch_and_weights_do_not(stock):
    parts = part_sizes(stock, 32)
    for slot, norm in (('norm', 'bn'), ('np', 'np'), ('trelu', 'trelu'), ('fork', 'none')): assert total(parts, norm, slot,
        batch_size=8) == 2*total(parts, norm, slot)
    for slot, norm in (('filters', 'trelu'), ('weights', 'torch_wn')): assert total(parts, norm, slot, batch_size=8) == total(parts, norm,
        slot)

def test_flops_are_those_that_torch_counts(stock):
    with FlopCounterMode(display=False) as forward: loss = stock(torch.zeros(3, 3, 32, 32)).sum()
    with FlopCounterMode(display=False) as backward: loss.backward()
    found = step_work(part_sizes(stock, 32), 'bn', 3).groupby('part').flops.sum()
    assert found[['forward', 'backward']].tolist() == [forward.get_total_flops(), backward.get_total_flops()]

def test_a_scheme_without_a_table_is_refused(stock):
    with pytest.raises(ValueError, match="^norm 'mine' has no row in PASSES: add one, as for none, bn, wn"): step_work(part_sizes(stock, 32),
        'mine', 4)

# memory

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(5, 5))
    def forward(self, x): return torch.tanh(x@self.w)*2

def test_kept_bytes_by_hand():
    net, x = Twice(), torch.randn(3, 5)
    assert kept_bytes(net, lambda: net(x)) == 4*(15+15)  # x for the product, tanh's output; w is there anyway
    assert kept_bytes(net, lambda: net(x.double().float()*1)) == 4*(15+15)
    with torch.no_grad(): assert kept_bytes(net, lambda: net(x)) == 0

def test_a_storage_that_is_kept_twice_counts_once():
    net = Twice()
    x = torch.randn(3, 5, requires_grad=True)
    assert kept_bytes(net, lambda: x.view(5, 3).T*x.view(3, 5)) == 4*15

def test_batch_normalization_keeps_a_map_more_than_none(stock):
    x, sizes = torch.randn(2, 3, 32, 32), part_sizes(stock, 32)
    kept = {norm: kept_bytes(net, lambda: net(x)) for norm in ('bn', 'none') for net in [convert(stock, norm).train()]}
    convs = sizes[sizes.kind.isin(['conv', 'last'])]
    assert kept['bn']-kept['none'] == pytest.approx(4*(2*convs.outputs.sum()+2*convs.channels.sum()), rel=0.05)

# prediction

def made(slot='act', part='forward', read=0, write=0, elements=250_000, width=4, flops=0, channels=64):
    return pandas.DataFrame([dict(part=part, slot=slot, layer='l', read=read, write=write, elements=elements, width=width, flops=flops,
                                  channels=channels)])

@pytest.mark.parametrize('work, seconds', [
    (made(read=2e6, write=1e6), 3e6/1e9),                               # 1 MB tensors at 1 GB/s
    (made(read=2e6, write=1e6, elements=1_000_000), 3e6/2e9),            # 4 MB at 2 GB/s
    (made(read=2e6, elements=500_000), 2e6/1.5e9),                       # between them, by the logarithm
    (made(read=1e6, elements=25), 1e6/1e9),                              # below the smallest size: its rate
    (made(read=1e6, elements=25_000_000), 1e6/2e9),                      # above the largest
    (made('convolution', read=1e6, flops=5e9), 5e9/1e10),                # flops last longer than bytes
    (made('norm', read=1e6, elements=250_000), 250_000/1e7+1e-3),        # arithmetic of batch normalization, forward
    (made('norm', 'backward', read=1e6, elements=250_000), 250_000/2e7+1e-3), # backward
    (made('norm', read=1e9, elements=250_000), 1.+1e-3),                 # its bytes last longer
    (made('norm', read=1e6, elements=250_000, channels=512),
     250_000*(1/1e7+1/5e6)/2+1e-3),  # between 64 and 4096 channels, by the logarithm
    (made('norm', read=1e6, elements=250_000, channels=9999), 250_000/5e6+1e-3),
])
def test_time_of_one_row(work, seconds):
    machine = Machine('made up', 'cpu', {1.: 1e9, 4.: 2e9}, 1e10, dict(norm=Ceiling({64: (1e7, 2e7), 4096: (5e6, 2e7)}, 1e-3)))
    assert work_seconds(work, machine).tolist() == pytest.approx([seconds])

def test_a_prediction_is_extra_time_over_that_of_none(stock):
    parts, machine = part_sizes(stock, 32), Machine('made up', 'cpu', {1.: 1e9}, INF)
    told = predict_step_ratios(parts, ['none', 'bn', 'wn', 'torch_wn'], 4, 'fp32', machine, none_seconds=2.)
    assert told['none'] == told['wn'] == 1 and told['torch_wn'] == pytest.approx(1+8*4*parts.weights.sum()/1e9/2)
    e = parts[parts.kind.isin(['conv', 'last'])].outputs.sum()
    assert told['bn'] == pytest.approx(1+(9-1)*4*4*e/1e9/2)
    alone = predict_step_ratios(parts, ['bn'], 4, 'fp32', machine)['bn']
    assert alone == pytest.approx(sum(work_seconds(step_work(parts, 'bn', 4), machine))/sum(work_seconds(step_work(parts, 'none', 4),
        machine)))

# the notebook

@pytest.mark.slow
def test_cost_leaves_a_record_that_is_judged(project):
    done = run_in(project, 'papermill', 'nbs/cost.ipynb', 'reports/cost.ipynb', *SMALL, '-y', '{norms: [bn, wn]}')
    assert done.returncode == 0, done.stderr
    record, = [r for r in cost_records(project/'reports/cost') if r['image_size'] == 16]
    assert (record['arch'], record['batch_size'], record['precision']) == ('resnet18', 4, 'fp32') and list(record['seconds']) == ['bn',
        'wn', 'none']
    assert {len(s) for s in record['seconds'].values()} == {6} and all(0 < s < 60 for part in record['seconds'].values() for s in part)
    names = ['bn', 'wn', 'none', 'torch_wn']
    for norm in names:
        own = record['seconds'].get(norm, record['reference'].get(norm))
        assert numpy.sum(list(record['parts'][norm].values()), axis=0).tolist() == own and list(record['parts'][norm]) == ['forward',
            'backward', 'optimizer']
        assert sum(record['operators'][norm].values()) == pytest.approx(100) and math.isfinite(record['predicted'][norm])
    assert list(record['kept_bytes']) == names and record['kept_bytes']['bn'] > record['kept_bytes']['none'] and record['kept_bytes']['torch_wn'] > record['kept_bytes']['none']
    assert record['operators']['bn']['batch norm'] > 0 == record['operators']['none'].get('batch norm', 0)
    verdict = CLAIMS['C10'].decide(None, project/'reports/cost')
    assert verdict.kind == 'analogue' and verdict.verdict == 'undecided' and 'rounds) in 1 process' in verdict.why

@pytest.mark.slow
def test_another_layout_has_a_record_of_its_own(project):
    done = run_in(project, 'papermill', 'nbs/cost.ipynb', 'reports/cost.ipynb', *SMALL, '-p', 'channels_last', 'False', '-p', 'precision',
                  'bf16', '-y', '{norms: [none]}')
    assert done.returncode == 0, done.stderr
    assert 'resnet18-16px-batch4-bf16-contiguous-cpu.json' in {path.name for path in (project/'reports/cost').glob('*.json')}

@pytest.mark.slow
@pytest.mark.parametrize('wrong, sentence', [(('round', '6'), "unknown parameter 'round': did you mean 'rounds'?"),
                                             (('image_size', '8'), 'image_size = 8 is not accepted'),
                                             (('rounds', '0'), 'rounds = 0 is not accepted: expected steps of each scheme')])
def test_a_wrong_value_stops_in_one_sentence(wrong, sentence, project):
    done = run_in(project, 'papermill', 'nbs/cost.ipynb', 'reports/cost.ipynb', *SMALL, '-p', *wrong)
    assert done.returncode != 0 and sentence in done.stderr.strip().splitlines()[-1], done.stderr
