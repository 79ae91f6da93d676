"""Linear attention that subtracts the mean of its scores instead of dividing by their sum."""

from subquad.ops.injective.api import (
    InjectiveState,
    combine_injective,
    injective_linear_attention,
    injective_read,
    injective_state,
)

__all__ = [
    "InjectiveState",
    "combine_injective",
    "injective_linear_attention",
    "injective_read",
    "injective_state",
]
