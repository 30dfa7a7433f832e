"wn_noise: weight normalization with gaussian noise on scale and shift, of the size that batch statistics have under bn"
import torch
from torch import nn
from nwrepro import SCHEMES, Scheme

# Standard deviation of scale and shift under bn by layer, in units of the standardized output, as tools/batch_noise.py measures it.
# None so far: the noise is measured on a run of the study, and without it this scheme is refused.
SIZES = {}

class BatchNoise(nn.Module):
    "y + s (y - mean) + t std per channel, with s and t drawn anew for each group of `bn_batch` images; nothing in evaluation mode"
    batch_statistics, running_mean, bn_batch = True, None, None
    def __init__(self,
        channels:int,     # of the convolution before it
        scale:float=0.,   # standard deviation of s
        shift:float=0.,   # standard deviation of t
    ):
        super().__init__()
        self.channels, self.scale, self.shift = channels, scale, shift
    def noisy(self, y):
        with torch.no_grad():
            std, mean = torch.std_mean(y, (0, 2, 3), correction=0, keepdim=True)
            s, t = (size*torch.randn(1, self.channels, 1, 1, device=y.device).to(y) for size in (self.scale, self.shift))
        return y + s*(y-mean) + t*std
    def forward(self,
        y:torch.Tensor,   # `[N, C, H, W]`
    )->torch.Tensor:      # same shape
        return torch.cat([self.noisy(group) for group in y.split(self.bn_batch or len(y))]) if self.training else y
    def scale_shift(self): return torch.ones(self.channels), torch.zeros(self.channels)  # what folding takes for it

def set_sizes(model):
    for name, m in model.named_modules():
        if not isinstance(m, BatchNoise): continue
        if name not in SIZES: raise ValueError(f'wn_noise knows no noise for {name}: measure it on a finished run of bn in this network, by tools/batch_noise.py')
        m.scale, m.shift = SIZES[name]

wn = SCHEMES['wn']
SCHEMES['wn_noise'] = Scheme(conv=wn.conv, norm=lambda bn: BatchNoise(bn.num_features), head=wn.head, inits=wn.inits, finish=set_sizes)
