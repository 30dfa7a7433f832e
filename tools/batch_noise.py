"""How noisy the batch statistics of a trained `bn` network are, layer by layer: the table that reports/cifar10/wn_noise.py wants

python tools/batch_noise.py RUN [FOLDER]   a finished run whose weights are in data/checkpoints, and the folder of its record
"""
import sys
import torch
from nwrepro.training.sources import load_source
from nwrepro.training.loader import loader
from nwrepro.training.records import records
from nwrepro.methods.schemes import takes_batch_statistics
from nwrepro.training.engine import logits_of
from nwrepro.training.build import make_views
from nwrepro.training.lifecycle import recipe_of, trained

GROUPS = 200  # of `bn_batch` images

def spread(
    means,  # of a layer's input per group and channel, `[groups, C]`
    stds,   # the same
):          # standard deviations of scale and shift, as the root of their mean square over channels
    "Noise that group statistics put on the standardized output: (1+s) z + t, where z has the statistics of all groups"
    mean, std = means.mean(0), (stds.square()+(means-means.mean(0)).square()).mean(0).sqrt()
    scale, shift = std/stds-1, (mean-means)/stds
    return [round((x-x.mean(0)).square().mean().sqrt().item(), 4) for x in (scale, shift)]

@torch.no_grad()
def measure(network, batches, recipe):
    "Layer -> `spread`, over batches of `bn_batch` training images"
    seen, hooks = {}, []
    for name, m in network.named_modules():
        if not takes_batch_statistics(m): continue
        def keep(m, args, name=name): seen.setdefault(name, []).append(torch.std_mean(args[0].float(), (0, 2, 3), correction=0))
        hooks.append(m.register_forward_pre_hook(keep))
    network.train()
    for m in network.modules():
        if takes_batch_statistics(m): m.momentum = 0.  # running statistics stay
    for x, _, _ in batches: logits_of(network, x, recipe)
    for hook in hooks: hook.remove()
    return {name: spread(torch.stack([mean for _, mean in pairs]), torch.stack([std for std, _ in pairs])) for name, pairs in seen.items()}

if __name__ == '__main__':
    run, = [r for r in records(sys.argv[2] if len(sys.argv) > 2 else None) if r.name == sys.argv[1]]
    recipe = recipe_of(run)
    views = make_views(recipe, load_source(run.config['source']['name']))
    views.train.indices = views.train.indices[::max(1, len(views.train.indices)//(GROUPS*recipe.bn_batch))]
    sizes = measure(trained(run), loader(views.train, 0, recipe.bn_batch, drop_last=True), recipe)
    print('SIZES = {\n'+''.join(f'    {name!r}: {pair},\n' for name, pair in sizes.items())+'}')
