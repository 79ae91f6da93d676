"""Feature maps of linear attention that have no parameters, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.layers.registry import unknown_name

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "elu": F.elu,
    "elu+1": lambda x: F.elu(x) + 1,  # Katharopoulos et al. 2020, eq. 7
    "softmax": lambda x: torch.softmax(x, dim=-1),
}
NON_NEGATIVE = frozenset({"relu", "elu+1", "softmax"})


def feature_map(name: str) -> Callable[[Tensor], Tensor]:
    """The function called ``name``; it acts on the last axis or elementwise.

    Example:
        >>> feature_map("elu+1")(torch.tensor([0.0, 1.0])).tolist()
        [1.0, 2.0]
    """
    if name not in FEATURE_MAPS:
        raise unknown_name("feature map", name, FEATURE_MAPS)
    return FEATURE_MAPS[name]
