"""Softmax attention over chosen blocks of keys, and a tree search that chooses them (HiP)."""

from subquad.ops.block_sparse.api import block_sparse_attention, hip_attention, hip_mask

__all__ = ["block_sparse_attention", "hip_attention", "hip_mask"]
