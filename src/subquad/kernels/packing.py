"""Sequences of different lengths, packed one after another: where each token lies, and a few padded batches of them.

Sequences whose lengths round up to the same power of two share a batch, so padding at most doubles the work.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Sequences of a similar length: which they are, where their tokens lie, and which places are padding."""

    sequences: Tensor  # (G,) their numbers
    tokens: Tensor  # (G, L) positions in the packed axis; padding points at token 0
    real: Tensor  # (G, L) bool


class Places(NamedTuple):
    """Of packed tokens ``(T,)``: the number of each one's sequence, and its place in it. Sizes are ``(N,)``."""

    sequence: Tensor
    place: Tensor
    sizes: Tensor


def locate(cu_seqlens: Tensor, length: int) -> Places:
    """Where ``length`` packed tokens lie; no value is read, so graphs can be traced.

    Example:
        >>> locate(torch.tensor([0, 2, 2, 5]), 5).place.tolist()
        [0, 1, 0, 1, 2]
    """
    offsets = cu_seqlens.to(torch.int64)
    at = torch.arange(length, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), at, right=True)
    return Places(sequence, at - offsets[sequence], offsets[1:] - offsets[:-1])


def by_length(offsets: Sequence[int], device: torch.device) -> Iterator[Group]:
    """Groups of the sequences ``offsets[n] .. offsets[n+1]`` that are not empty."""
    buckets: dict[int, list[int]] = defaultdict(list)
    for n, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            buckets[(end - start - 1).bit_length()].append(n)
    for members in buckets.values():
        lengths = torch.tensor([offsets[n + 1] - offsets[n] for n in members], device=device)
        starts = torch.tensor([offsets[n] for n in members], device=device)
        step = torch.arange(int(lengths.max()), device=device)
        real = step < lengths[:, None]
        yield Group(torch.tensor(members, device=device), (starts[:, None] + step).where(real, 0), real)


def take(x: Tensor, group: Group) -> Tensor:
    """``x (1, T, ...)`` -> the group's padded batch ``(G, L, ...)``, zero in the padding."""
    real = group.real.reshape(*group.real.shape, *[1] * (x.ndim - 2))
    return x[0][group.tokens] * real.to(x.dtype)
