"""How the CPU kernels see their arguments: flat memory with steps, and where a block of queries lies."""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels.block_sparse.places import Places

#: Keys that are scored at once: with their values they fit a first-level cache.
TILE = 64


def flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """float32 memory and the steps between rows, tokens and heads: one compiled kernel serves all layouts."""
    x = x.detach().float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride()))
    return x.as_strided((extent,), (1,)).numpy(), tuple(x.stride()[:3])


def whole_numbers(x: Tensor) -> np.ndarray:
    numbers: np.ndarray = x.int().contiguous().numpy()
    return numbers


def numbers(places: Places) -> tuple[np.ndarray, np.ndarray, int, int, int, bool]:
    starts, ends = (x.contiguous().numpy() for x in (places.starts, places.ends))
    return starts, ends, places.queries, places.keys, places.block_q, places.causal


@njit
def block_of(queries, keys, start, end, block_q, causal, block):
    """First and last query of a block, and their places; see :meth:`Places.queries_of_blocks`."""
    if causal:
        before = max(0, keys - queries - start)
        first = max((before // block_q + block) * block_q, before)
        last = min((before // block_q + block + 1) * block_q, end - start) - 1
        moved = start - (keys - queries)
        return first + moved, last + moved, first, last
    first = block * block_q
    return first, min(first + block_q, queries) - 1, end - start - 1, end - start - 1
