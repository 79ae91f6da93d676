"""Convolutions over few tokens: the short causal one with a state, and one on grids with kernels per sample."""

from subquad.ops.convolution.api import short_convolution
from subquad.ops.convolution.dynamic import dynamic_depthwise_conv

__all__ = ["dynamic_depthwise_conv", "short_convolution"]
