"""Every mixer by name, small, with the options that make its borders fall inside a short sequence."""

import torch

from subquad import mixers
from subquad.mixers.contract import Pattern, map_state

OPTIONS = {
    "sliding_window": {"window_size": 5, "num_sinks": 2},
    "diag_attention": {"block_size": 6},
    "delta_net": {"eigenvalues": (-1, 1)},
    "gla": {"num_key_value_heads": 2, "conv_size": 3},
    "inline": {"local": False, "kernel": "leaky_relu"},
    "lightning": {"lrpe": True},
    "lolcats": {"num_key_value_heads": 2, "window": 4, "form": "terraced", "feature_dim": 6, "qk_norm": True},
    "liger": {"num_key_value_heads": 2, "window": 5, "qk_norm": True},
    "delta_product": {"gated": True},
    "neural_memory": {"chunk_size": 5, "expansion": 1.5},
    "titans_mac": {"segment_size": 6, "chunk_size": 3, "num_persistent": 2, "expansion": 1.5},
    "titans_mag": {"window_size": 5, "chunk_size": 4, "num_persistent": 2, "expansion": 1.5},
    "titans_mal": {"window_size": 5, "chunk_size": 4, "num_persistent": 2, "expansion": 1.5},
}
NAMES = mixers.available()
CAUSAL = mixers.available(Pattern.CAUSAL_SELF)
DIM = 32


def make(name, dtype=torch.float64, **options):
    """A mixer in evaluation mode whose weights depend on the name alone."""
    torch.manual_seed(sum(map(ord, name)))
    return mixers.build(name, DIM, num_heads=4, **{**OPTIONS.get(name, {}), **options}).to(dtype).eval()


def tokens(batch=2, time=23, dtype=torch.float64, seed=0):
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide_state(mixer, batch):
    """The state before any token, in float64 where it is floating: tests compare to rounding."""
    state = mixer.init_state(batch, torch.float64, "cpu")
    return map_state(lambda x: x.double() if x.is_floating_point() else x, state)
