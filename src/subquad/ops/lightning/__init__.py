"""Linear attention with a constant decay per head: lightning attention and retention."""

from subquad.ops.lightning.api import lightning_attention, lightning_slopes, retention_slopes, window_slopes

__all__ = ["lightning_attention", "lightning_slopes", "retention_slopes", "window_slopes"]
