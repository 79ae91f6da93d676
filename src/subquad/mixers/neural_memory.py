"""The neural memory as a token mixer of its own (Behrouz et al. 2025, "Titans", sections 3.1 and 4.4)."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.norms import build_norm, l2_normalize
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import RecurrentMixer, Request, wide
from subquad.mixers.convolved import convolved_projections
from subquad.ops import NeuralMemoryState, neural_memory, neural_memory_read

FIRST_FORGET, FIRST_MOMENTUM = -4.0, -2.0  # biases: a forgetting of 0.02, and momentum that multiplies steps by 1.1


class MemoryState(NamedTuple):
    """The memory, and the last tokens of the short convolutions."""

    memory: NeuralMemoryState
    tails: ConvolutionTails


class FirstWeights(nn.Module):
    """The learnt weights of a memory before any token: a matrix ``(H, width in, width out)`` per layer."""

    def __init__(self, num_heads: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(num_heads, a, b)) for a, b in pairwise(widths))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in self.layers:
            nn.init.normal_(layer, 0.0, layer.shape[1] ** -0.5)


class MemoryGates(nn.Module):
    """Per head and token: ``forget`` and ``momentum`` in (0, 1), ``step`` in (0, max_step), float32."""

    def __init__(self, dim: int, num_heads: int, max_step: float) -> None:
        super().__init__()
        self.max_step = max_step
        self.proj = nn.Linear(dim, 3 * num_heads, bias=False)
        self.bias = nn.Parameter(torch.empty(3, num_heads))
        self.bias._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.bias.copy_(torch.tensor([FIRST_FORGET, FIRST_MOMENTUM, 0.0])[:, None].expand_as(self.bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, D)`` -> forget, momentum, step, ``(B, T, H)`` each."""
        logits = wide(self.proj(x)).unflatten(-1, self.bias.shape) + wide(self.bias)
        forget, momentum, step = torch.sigmoid(logits).unbind(-2)
        return forget, momentum, self.max_step * step

    def extra_repr(self) -> str:
        return f"max_step={self.max_step:g}"


class NeuralMemory(RecurrentMixer):
    """``y = W_o RMSNorm(M_t(q_t))``: a small network M per head that learns ``M(k_t) = v_t`` while it reads.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        head_dim: width of a head; None is D / H.
        memory_layers: L, linear layers of M; 1 is a matrix.
        expansion: width of M's hidden layers over that of a head.
        norm_residual: ``x + LayerNorm(M(x))`` in place of ``M(x)``.
        conv_size: width of the short convolutions on q, k, v; 0: none.
        chunk_size: C, tokens whose gradients are taken at the same weights. A state belongs to its chunk size.
        max_step: largest step of a token; None is 1 / C, with which a chunk of equal tokens still descends.
        max_grad_norm: longer gradients of a token are shortened to this length; None: none is.
        norm_eps: of the norm on each head's output.

    Example: learning goes on at inference, in the state.
        >>> mixer = NeuralMemory(16, 2)
        >>> output, state, _ = mixer(torch.zeros(1, 5, 16), use_state=True)
        >>> output.shape, state.memory.filled.tolist()
        (torch.Size([1, 5, 16]), [5])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        head_dim: int | None = None,
        memory_layers: int = 2,
        expansion: float = 4.0,
        norm_residual: bool = False,
        conv_size: int = 4,
        chunk_size: int = 16,
        max_step: float | None = None,
        max_grad_norm: float | None = None,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if memory_layers < 1:
            raise ValueError(f"memory_layers must be at least 1; got {memory_layers}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        if max_step is not None and not (max_step > 0 and math.isfinite(max_step)):
            raise ValueError(f"max_step must be positive or None; got {max_step}")
        self.head_dim = head_dim or self.head_width(dim)
        hidden = round(self.head_dim * expansion)
        if hidden < 1:
            raise ValueError(f"expansion {expansion} leaves a hidden layer of width {hidden}")
        self.widths = (self.head_dim, *[hidden] * (memory_layers - 1), self.head_dim)
        self.norm_residual, self.max_grad_norm, self.chunk_size = norm_residual, max_grad_norm, chunk_size
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.o_norm = build_norm("rms", self.head_dim, norm_eps)
        self.convolutions = QKVConvolutions(inner, inner, inner, conv_size)
        self.gates = MemoryGates(dim, num_heads, 1 / chunk_size if max_step is None else max_step)
        self.first = FirstWeights(num_heads, self.widths)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, MemoryState]:
        past: MemoryState | None = request.state
        q, k, v, tails = convolved_projections(self, x, lengths, request)
        if not self.convolutions.width:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        forget, momentum, step = self.gates(x)
        o, memory = neural_memory(
            l2_normalize(q),
            l2_normalize(k),
            v,
            forget,
            momentum,
            step,
            list(self.first.layers),
            norm_residual=self.norm_residual,
            max_grad_norm=self.max_grad_norm,
            lengths=lengths,
            initial_state=None if past is None else past.memory,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
            chunk_size=self.chunk_size,
        )
        return self.finish(o), MemoryState(memory, tails)  # type: ignore[arg-type]

    def finish(self, o: Tensor) -> Tensor:
        """What heads have read, ``(B, T, H, d)`` -> ``(B, T, D)``."""
        output: Tensor = self.o_proj(self.o_norm(o).flatten(-2))
        return output

    def read(self, q: Tensor, weights: Tensor) -> Tensor:
        """What the memory with these ``weights (B, H, N)`` answers to ``q (B, T, H d)``, without learning."""
        heads = l2_normalize((q if self.convolutions.width else F.silu(q)).unflatten(-1, (-1, self.head_dim)))
        return self.finish(neural_memory_read(heads, weights, self.widths, norm_residual=self.norm_residual)[0])

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MemoryState:
        kind = torch.promote_types(dtype, torch.float32)
        flat = torch.cat([layer.to(device, kind).flatten(1) for layer in self.first.layers], dim=-1)
        weights = flat.expand(batch, -1, -1)
        filled = torch.zeros(batch, dtype=torch.int64, device=device)
        memory = NeuralMemoryState(weights.clone(), torch.zeros_like(weights), weights.clone(), filled)
        return MemoryState(memory, self.convolutions.init_state(batch, dtype, device))
