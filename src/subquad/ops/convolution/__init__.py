"""Short causal convolution, channel by channel, with a state."""

from subquad.ops.convolution.api import short_convolution

__all__ = ["short_convolution"]
