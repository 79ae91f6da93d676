"""What the one-token kernels read of a layer: arrays on the memory of its weights, and numbers.

A projection's weight is ``(outputs, inputs)``; ``width`` and ``columns`` are the widths K and V of a head. What a layer
does not have is an empty array (:func:`nothing`).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

#: Kinds of output norm. RMS is over all heads together or over each, as its weight is long.
NO_NORM, LAYER, RMS, SIMPLE_RMS = range(4)


def nothing(dimensions: int) -> Array:
    """The array in place of a weight that a layer does not have."""
    return np.empty((0,) * dimensions, np.float32)


class Lightning(NamedTuple):
    """Lightning attention with SiLU on q and k, a norm and a gate."""

    q: Array
    k: Array
    v: Array
    gate: Array  # or the first of its two factors
    gate_high: Array  # the second; then the gate is a sigmoid
    o: Array
    slope: Array  # (H,)
    norm_weight: Array
    norm_bias: Array
    norm: int
    norm_eps: float
    silu_values: bool
    heads: int
    width: int


class Retention(NamedTuple):
    """Rotated q and k, a fixed decay per head, RMS norm per head, a SiLU gate."""

    q: Array
    k: Array
    v: Array
    gate: Array
    o: Array
    slope: Array  # (H,)
    rates: Array  # (K / 2,) radians per position
    norm_weight: Array
    norm_eps: float
    heads: int
    width: int
    columns: int


class GLA(NamedTuple):
    """Gated linear attention: a forget gate per key channel through a bottleneck, RMS norm per head, a SiLU gate."""

    q: Array
    k: Array
    v: Array
    gate: Array
    forget_low: Array
    forget_high: Array
    forget_bias: Array
    o: Array
    q_taps: Array  # (channels, width) of the short convolutions
    k_taps: Array
    v_taps: Array
    norm_weight: Array
    norm_eps: float
    temperature: float
    heads: int
    width: int
    columns: int


class Delta(NamedTuple):
    """The delta rule on unit keys; a decay per head where there is ``forget``, a SiLU gate where there is ``gate``."""

    q: Array
    k: Array
    v: Array
    beta: Array
    gate: Array
    forget: Array
    forget_rate_log: Array  # (H,)
    forget_bias: Array  # (H,)
    o: Array
    q_taps: Array  # (channels, width) of the short convolutions
    k_taps: Array
    v_taps: Array
    norm_weight: Array
    norm_eps: float
    largest_beta: float
    heads: int
    width: int
    columns: int


class Mamba(NamedTuple):
    """A short convolution with SiLU, maps of it, the selective scan's step, a SiLU gate."""

    inner: Array  # both halves: what the convolution reads, and the gate
    taps: Array  # (channels, width)
    taps_bias: Array
    maps: Array  # (rank + 2 N, channels)
    step: Array  # (channels, rank)
    step_bias: Array
    rate_log: Array  # (channels, N)
    skip: Array
    o: Array
