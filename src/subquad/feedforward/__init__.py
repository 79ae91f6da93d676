"""Channel mixers by name.

Example:
    >>> "swiglu" in available()
    True
"""

from torch import nn

from subquad.catalog import FEEDFORWARDS
from subquad.layers.registry import load, unknown_name

__all__ = ["available", "build"]


def available() -> list[str]:
    """The names of all feed-forward layers."""
    return sorted(FEEDFORWARDS)


def build(name: str, dim: int, hidden: int) -> nn.Module:
    """The feed-forward layer called ``name``, ``(..., dim)`` to the same shape through ``hidden`` channels."""
    if name not in FEEDFORWARDS:
        raise unknown_name("feed-forward", name, FEEDFORWARDS)
    entry = FEEDFORWARDS[name]
    layer: nn.Module = load(entry.path)(dim, hidden, **entry.options)
    return layer
