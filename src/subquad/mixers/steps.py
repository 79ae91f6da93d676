"""What several mixers' one-token steps share: whether a state can be read by a kernel, and the short convolutions."""

import torch
from torch import Tensor

from subquad.kernels.steps import layouts, plan
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions, ShortConvolution
from subquad.mixers.contract import PositionedState


def fits_positions(x: Tensor, state: PositionedState, positions: Tensor | None, *matrix: int) -> bool:
    """Whether a kernel can read this state, with ``matrix`` its heads, key and value width, and these positions."""
    rows = x.shape[0]
    return (
        type(state) is PositionedState
        and plan.fits(state.state, rows, *matrix)
        and plan.fits(state.seen, rows, dtype=torch.int64)
        and (positions is None or plan.fits(positions, rows, 1, dtype=torch.int64))
    )


def fits_tails(tails: ConvolutionTails, layer: layouts.GLA | layouts.Delta, rows: int) -> bool:
    """Whether a kernel can read the earlier tokens of the layer's convolutions."""
    if type(tails) is not ConvolutionTails:
        return False
    channels, width = layer.q_taps.shape
    if not channels:
        return tails.q is None and tails.k is None and tails.v is None
    return (
        plan.fits(tails.q, rows, width - 1, channels)
        and plan.fits(tails.k, rows, width - 1, layer.k_taps.shape[0])
        and plan.fits(tails.v, rows, width - 1, layer.v_taps.shape[0])
    )


def read_convolutions(
    read: plan.Reading, convolutions: QKVConvolutions, activation: str | None, *channels: int
) -> tuple[layouts.Array, layouts.Array, layouts.Array]:
    """The taps of the convolutions on q, k, v with so many ``channels``; empty arrays where there are none."""
    width = read.value(convolutions, "width")
    if not width:
        return layouts.nothing(2), layouts.nothing(2), layouts.nothing(2)

    def taps(name: str, channels: int) -> layouts.Array:
        convolution = read.child(convolutions, name, ShortConvolution)
        read.require(read.value(convolution, "activation") == activation and read.absent(convolution, "bias"))
        return read.tensor(convolution, "weight", channels, width)

    q, k, v = channels
    return taps("q", q), taps("k", k), taps("v", v)
