"""Where blocks of queries lie in rows whose real tokens begin and end at different columns.

All places are counted among a row's real tokens, so that a padded row is cut into blocks as it would be alone; a block
of queries is that of its place, so that a prompt read in pieces has the blocks of the whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """T queries over S keys, in blocks; causal queries are the last T tokens, and padded ones are in no block."""

    queries: int  # T
    keys: int  # S
    starts: Tensor  # (B,) int64, first real column of the keys
    ends: Tensor  # (B,) int64, column after the last real key
    block_q: int
    causal: bool
    blocks: int  # most blocks of queries in any row

    @classmethod
    def of(cls, queries: int, keys: int, starts: Tensor, ends: Tensor, block_q: int, causal: bool) -> "Places":
        if causal:
            first = (keys - queries - starts).clamp(min=0) // block_q
            blocks = int(((ends - 1 - starts) // block_q - first).max()) + 1
        else:
            blocks = -(-queries // block_q)
        return cls(queries, keys, starts, ends, block_q, causal, max(1, blocks))

    def slots(self, budget: int, block_k: int, window: int) -> int:
        """Most blocks of keys that any block of queries can be given: never more than there are."""
        span = int((self.ends - self.starts).max()) - window
        return max(1, min(budget // block_k, -(-span // block_k)))

    def queries_of_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of queries ``(B, blocks, block_q)``, which of them exist, and their places; -1 where there is none.

        A query that is not causal has the place of the last key.
        """
        steps = torch.arange(self.blocks * self.block_q, device=self.starts.device)
        if self.causal:
            before = (self.keys - self.queries - self.starts).clamp(min=0)
            place = (before // self.block_q * self.block_q)[:, None] + steps
            column = place + (self.starts - (self.keys - self.queries))[:, None]
            exists = (place >= before[:, None]) & (place < (self.ends - self.starts)[:, None])
        else:
            column = steps.expand(len(self.starts), -1)
            exists = column < self.queries
            place = (self.ends - self.starts - 1)[:, None].expand_as(column)
        shape = (-1, (self.blocks, self.block_q))
        return column.unflatten(*shape), exists.unflatten(*shape), place.where(exists, -1).unflatten(*shape)
