"""Feed-forward layers that skip neurons which are zero, or too small to matter."""

from subquad.ops.sparse_feedforward.api import sparse_down_projection, sparse_gated_feedforward

__all__ = ["sparse_down_projection", "sparse_gated_feedforward"]
