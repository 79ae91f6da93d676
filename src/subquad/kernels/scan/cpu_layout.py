"""How the CPU kernels see a selective scan: tokens as rows, sequences by their first row, channels in blocks.

Everything is packed: a batch is a packed run whose sequences happen to be equally long. One work item is a block of
channels of one sequence; a block never crosses the groups that share B and C.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from subquad.kernels.recurrence.checks import check_offsets

Array = npt.NDArray[np.float32]

#: Tokens between two kept states; the backward pass recomputes what lies between.
CHUNK = 32
#: Most channels of a block. Forward: long rows suit the memory; backward: what a chunk keeps has to fit a cache.
FORWARD_BLOCK, BACKWARD_BLOCK = 256, 128


class Layout(NamedTuple):
    """Sizes and places that follow from the arguments' shapes and ``cu_seqlens`` alone."""

    batch: int
    time: int
    tokens: int  # of all sequences together
    sequences: int
    channels: int
    states: int  # N
    groups: int
    starts: npt.NDArray[np.int64]  # (sequences + 1,) first token of each sequence
    kept_starts: npt.NDArray[np.int64]  # (sequences + 1,) first kept state of each sequence

    @classmethod
    def of(cls, u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> "Layout":
        batch, time, channels = u.shape
        starts = sequence_starts(batch, time, cu_seqlens)
        kept = np.maximum(np.diff(starts) - 1, 0) // CHUNK
        return cls(
            batch=batch,
            time=time,
            tokens=batch * time,
            sequences=len(starts) - 1,
            channels=channels,
            states=A.shape[1],
            groups=B.shape[2],
            starts=starts,
            kept_starts=np.concatenate([[0], np.cumsum(kept)]),
        )

    def blocks(self, largest: int) -> int:
        """Blocks per group of channels; see :func:`blocks_of`."""
        return blocks_of(self.channels // self.groups, self.sequences * self.groups, largest)


def sequence_starts(batch: int, time: int, cu_seqlens: Tensor | None) -> npt.NDArray[np.int64]:
    """``(sequences + 1,)`` first row of each sequence, and the end of the last."""
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * time
    return np.array(check_offsets(cu_seqlens, time), dtype=np.int64)


def blocks_of(channels: int, pieces: int, largest: int) -> int:
    """Blocks of the channels of each of ``pieces``: none above ``largest``, and no thread idle for want of one."""
    blocks, threads = -(-channels // largest), torch.get_num_threads()
    if pieces % threads:
        blocks = -(-blocks // threads) * threads
    return min(blocks, channels)


def kept_states(batch: int, time: int) -> int:
    """Number of kept states, one before each chunk but the first of a sequence.

    For packed sequences (batch 1) it is an upper bound, known from shapes alone.
    """
    return batch * ((time - 1) // CHUNK)


def rows(x: Tensor) -> Array:
    """``x (B, T, ...)`` as float32 rows ``(B T, row length)`` that begin with a token's values; shares memory where it
    can: a slice of wider rows comes as the wider rows, of which the last may end beyond the memory."""
    flat = x.detach().flatten(0, 1).flatten(1)
    if flat.dtype != torch.float32:
        flat = flat.to(torch.float32)
    tokens, width = flat.shape
    stride = flat.stride(0) if tokens > 1 else width
    if (width > 1 and flat.stride(1) != 1) or stride < width:
        flat, stride = flat.contiguous(), width
    return as_strided(flat.numpy(), (tokens, stride), (4 * stride, 4))


def dense(x: Tensor | None, dimensions: int) -> Array:
    """A contiguous float32 array; an empty one for what is absent."""
    if x is None:
        return np.empty((0,) * dimensions, np.float32)
    return x.detach().to(torch.float32).contiguous().numpy()


def absent_rows(x: Tensor | None) -> Array:
    return np.empty((0, 0), np.float32) if x is None else rows(x)


def uninitialised(*shape: int) -> Tensor:
    """A float32 tensor in memory that numpy asks for: large arrays come in huge pages, which torch's do not."""
    return torch.from_numpy(np.empty(shape, np.float32))
