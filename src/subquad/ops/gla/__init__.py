"""Linear attention with gates computed from the token."""

from subquad.ops.gla.api import gla, simple_gla

__all__ = ["gla", "simple_gla"]
