"""The state space model with one decay per head: Mamba-2's."""

from subquad.ops.ssd.api import ssd

__all__ = ["ssd"]
