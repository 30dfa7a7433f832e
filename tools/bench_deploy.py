"""What a folded network saves: inference of `fold`ed `bn` and `wn` against timm's own network in evaluation mode, and against its batch normalization folded by torch.

python tools/bench_deploy.py [--arch resnet50] [--batch_size 16] [--image_size 224] [--precisions fp32 bf16] [--rounds 9]
One forward pass of each in turn in one process, after two that do not count; medians over rounds, and medians and ranges of the ratios to timm's network in the same round.
All are channels_last, and run under `torch.inference_mode`. Statistics and lengths are drawn, so that folding has something to do.
"""
import argparse, copy, statistics, time
import timm, torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from nwrepro.methods.deploy import fold
from nwrepro.methods.schemes import convert

@torch.no_grad()
def lived_in(model):
    "As if it had been trained: statistics, scales and shifts that are not those of the start"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.running_mean, -.2, .2), (m.running_var, .5, 1.5), (m.weight, .5, 1.), (m.bias, -.2, .2)): t.uniform_(low, high)
        elif hasattr(m, 'g'):
            m.g.mul_(torch.empty_like(m.g).uniform_(.5, 1.))
            m.bias.uniform_(-.2, .2)
    return model

def fused(stock):
    "Torch's own folding, applied by hand to every pair of the stock network"
    model = copy.deepcopy(stock).eval()
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv, layer), (bn, norm) in zip(children, children[1:]):
            if not isinstance(norm, nn.BatchNorm2d): continue
            setattr(parent, conv, fuse_conv_bn_eval(layer, norm))
            setattr(parent, bn, nn.Identity())
    return model

def networks(arch):
    "What is timed, by name; and for each folded one the network whose logits it must give"
    torch.manual_seed(0)
    stock = lived_in(timm.create_model(arch)).eval().to(memory_format=torch.channels_last)
    bn, wn = convert(stock, 'bn', init='keep').eval(), lived_in(convert(stock, 'wn')).eval().to(memory_format=torch.channels_last)
    return {'timm bn': stock, 'torch fused bn': fused(stock), 'folded bn': fold(bn), 'folded wn': fold(wn)}, {'torch fused bn': stock, 'folded bn': bn, 'folded wn': wn}

def seconds(model, x):
    begin = time.perf_counter()
    model(x)
    return time.perf_counter()-begin

def difference(a, b, x):
    "Largest difference of logits, in units of the largest logit"
    a, b = a(x), b(x)
    return ((a-b).abs().max()/b.abs().max()).item()

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition('\n')[0])
    parser.add_argument('--arch', default='resnet50')
    for name, default in (('batch_size', 16), ('image_size', 224), ('rounds', 9)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--precisions', nargs='+', choices=('fp32', 'bf16'), default=('fp32', 'bf16'))
    asked = parser.parse_args()
    models, before = networks(asked.arch)
    x = torch.randn(asked.batch_size, 3, asked.image_size, asked.image_size).to(memory_format=torch.channels_last)
    print(f'{asked.arch}, {asked.image_size} px, batch {asked.batch_size}, channels_last, {torch.get_num_threads()} threads, {asked.rounds} rounds, torch {torch.__version__}, timm {timm.__version__}')
    with torch.inference_mode():
        off = {name: difference(models[name], unfolded, x[:4]) for name, unfolded in before.items()}
        for precision in asked.precisions:
            dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
            ready, y = {name: copy.deepcopy(model).to(dtype) for name, model in models.items()}, x.to(dtype)
            rounds = [{name: seconds(model, y) for name, model in ready.items()} for _ in range(asked.rounds+2)][2:]
            for name in ready:
                ratios = sorted(r[name]/r['timm bn'] for r in rounds)
                ms = 1e3*statistics.median(r[name] for r in rounds)
                note = f', logits differ by {off[name]:.1e} of the largest in fp32' if name in off else ''
                print(f'{precision} {name:14} {ms:7.1f} ms {1e3*asked.batch_size/ms:7.1f} images/s  ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}){note}')

if __name__ == '__main__': main()
