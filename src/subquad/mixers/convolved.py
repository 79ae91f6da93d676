"""Projections to q, k, v followed by short convolutions: how DeltaNet, GLA, LightNet and neural memories begin."""

from typing import Any, Protocol

from torch import Tensor

from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import Request


class Convolved(Protocol):
    """A mixer with such projections, whose state has the convolutions' ``tails``."""

    convolutions: QKVConvolutions
    q_proj: Any
    k_proj: Any
    v_proj: Any


def convolved_projections(
    mixer: Convolved, x: Tensor, lengths: Tensor | None, request: Request
) -> tuple[Tensor, Tensor, Tensor, ConvolutionTails]:
    """q, k, v ``(B, T, channels)`` of x after convolutions that go on from the request's state, and the tails."""
    return mixer.convolutions(
        mixer.q_proj(x),
        mixer.k_proj(x),
        mixer.v_proj(x),
        state=None if request.state is None else request.state.tails,
        lengths=lengths,
        cu_seqlens=request.cu_seqlens,
        return_state=request.use_state,
    )
