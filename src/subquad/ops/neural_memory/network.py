"""The network that is the memory of one head: linear layers with GELU between them, its weights in one vector.

Source: Behrouz et al. 2025, "Titans: Learning to Memorize at Test Time", section 3.1.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


class MemoryNetwork(NamedTuple):
    """``M(x) = gelu(... gelu(x W_1) W_2 ...) W_L``, or ``x + LayerNorm(M(x))`` with ``norm_residual``.

    Attributes:
        widths: of the input, the hidden layers and the output; L + 1 numbers.
        norm_residual: whether the network is wrapped in a residual and a layer norm without parameters.
    """

    widths: tuple[int, ...]
    norm_residual: bool

    @property
    def num_weights(self) -> int:
        return sum(a * b for a, b in pairwise(self.widths))

    def layers(self, weights: Tensor) -> list[Tensor]:
        """``(..., num_weights)`` -> each layer's ``(..., width in, width out)``, views."""
        sizes = [a * b for a, b in pairwise(self.widths)]
        pieces = weights.split(sizes, dim=-1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, pairwise(self.widths))]

    def output(self, layers: list[Tensor], x: Tensor) -> Tensor:
        """x ``(..., T, width in)`` through layers whose leading axes broadcast to those of x."""
        y = x
        for number, layer in enumerate(layers):
            y = (F.gelu(y) if number else y) @ layer
        return x + layer_norm(y)[0] if self.norm_residual else y


class Descent(NamedTuple):
    """How a memory learns.

    Attributes:
        network: whose weights are trained.
        chunk_size: tokens whose gradients are taken at the same weights.
        max_grad_norm: longer gradients of a token are shortened to this length; None: none is.
    """

    network: MemoryNetwork
    chunk_size: int
    max_grad_norm: float | None


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x normed over its last axis, and the inverse of the standard deviation it was divided by."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    return centred * inverse, inverse


def layer_norm_transposed(gradient: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The gradient before :func:`layer_norm` from the one after it."""
    along = (gradient * normed).mean(-1, keepdim=True)
    return (gradient - gradient.mean(-1, keepdim=True) - normed * along) * inverse


def gelu_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu(x) = x Phi(x)`` and its derivative ``Phi(x) + x phi(x)``."""
    cumulative = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))
    return x * cumulative, torch.addcmul(cumulative, x, density)
