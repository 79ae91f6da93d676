"""How the GPU's scans are cut: sequences by their first token, channels in blocks that fit a program's registers."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

#: Tokens between two kept states.
CHUNK = 32
#: Entries of the state of one program, and states per channel at most.
TILE, MAX_STATES = 512, 256


class Grid(NamedTuple):
    """Blocks per group of channels, and the sizes of a program's tile ``(block_d, block_n)``, powers of two."""

    blocks: int
    block_d: int
    block_n: int
    warps: int

    @classmethod
    def of(cls, channels: int, states: int, groups: int) -> "Grid":
        if states > MAX_STATES:
            raise ValueError(f"the tiles of backend 'gpu' hold {MAX_STATES} states per channel; got {states}")
        block_n = triton.next_power_of_2(states)
        block_d = max(4, min(64, TILE // block_n))
        return cls(triton.cdiv(channels // groups, block_d), block_d, block_n, max(1, block_d * block_n // TILE))


def sequence_places(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(sequences + 1,)`` int64: first token of each sequence, and number of its first kept state."""
    if cu_seqlens is None:
        step = torch.arange(batch + 1, device=device)
        return step * time, step * ((time - 1) // CHUNK)
    kept = (cu_seqlens.diff() - 1).clamp(min=0) // CHUNK
    return cu_seqlens, torch.cat([kept.new_zeros(1), kept.cumsum(0)])
