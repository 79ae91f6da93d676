"""Attention divided by a learnt function of the token (Sieber et al. 2024, section 4, "normalised attention")."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.registry import unknown_name
from subquad.mixers.contract import MatrixState, RecurrentMixer, Request, keep_mask, silence, wide
from subquad.ops import linear_attention

#: log of the normaliser n(w x + b), by name: a quotient of exponentials is taken as a difference
LOG_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda z: z,
    "softplus": lambda z: F.softplus(z).log(),
    "sigmoid": F.logsigmoid,
}


class NormalizedAttention(RecurrentMixer):
    """``o_t = sum_{j<=t} (q_t . k_j) v_j / n_t`` with ``n_t = exp(w . x_t + b)`` per head.

    Softmax's denominator is a sum over the past, linear attention's the same sum over features; here it is read off the
    token alone. Weights may be negative and need not sum to 1. Without a norm before the mixer outputs can grow: blocks
    have one. At the start w = 0 and b = 0, n = 1.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        head_dim: K, width of queries and keys in a head; None is D / H.
        normalizer: ``"exp"`` (the paper's), ``"softplus"`` or ``"sigmoid"``.
        dropout: on the output in training. (The paper drops weights; they are never formed here.)
        bias: of the projections.

    Example:
        >>> NormalizedAttention(16, 2)(torch.zeros(1, 3, 16)).output.shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        head_dim: int | None = None,
        normalizer: str = "exp",
        dropout: float = 0.0,
        bias: bool = True,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if normalizer not in LOG_NORMALIZERS:
            raise unknown_name("normalizer", normalizer, LOG_NORMALIZERS)
        self.head_v_dim = self.head_width(dim)
        self.head_dim = self.head_v_dim if head_dim is None else head_dim
        self.log_normalizer, self.dropout = LOG_NORMALIZERS[normalizer], dropout
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.normalizer_weight = nn.Parameter(torch.empty(num_heads, dim))
        self.normalizer_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The normaliser starts as 1 (exp), whatever the token."""
        self.normalizer_weight.zero_()
        self.normalizer_bias.zero_()

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, MatrixState]:
        q, k = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
        score = F.linear(wide(x), wide(self.normalizer_weight), wide(self.normalizer_bias))
        q = wide(q) * (-self.log_normalizer(score)).exp()[..., None]
        k, v = silence(keep_mask(x, lengths), wide(k), wide(v))
        o, state = linear_attention(
            q,
            k,
            v,
            initial_state=None if request.state is None else request.state.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        o = F.dropout(o.to(x.dtype), self.dropout, self.training)
        output: Tensor = self.o_proj(o.flatten(-2))
        return output, MatrixState(state)  # type: ignore[arg-type]

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MatrixState:
        return MatrixState(torch.zeros(batch, self.num_heads, self.head_dim, self.head_v_dim, device=device))
