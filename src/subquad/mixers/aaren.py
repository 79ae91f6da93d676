"""Attention as a recurrence (Feng et al. 2024, "Attention as an RNN", section 4): one learnt query per layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.contract import RecurrentMixer, Request, keep_mask, wide
from subquad.ops import PrefixState, prefix_attention


class Aaren(RecurrentMixer):
    """``y_t = W_o o_t``, o_t the attention of one learnt query over the tokens up to t, in H heads.

    The query does not depend on the tokens, so the state is one triple per head, H (V + 2) numbers, and a token costs
    the same however many came before. What one layer cannot do is look a key up: no output depends on what the current
    token asks for. The order of the past changes nothing, so positions have to be in x where order matters.

    Keys are never formed: their product with the query is one vector per head, ``s_t = x_t . (W_k^T q) + b_k . q``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        bias: of the four projections, as in the paper. (Those of keys shift all scores of a head alike and cancel.)

    Example:
        >>> mixer = Aaren(16, 4)
        >>> mixer.pool(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        bias: bool = True,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        self.query_token = nn.Parameter(torch.empty(dim))
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The query starts from N(0, 0.02^2), so that a new layer takes nearly even means."""
        nn.init.normal_(self.query_token, 0.0, 0.02)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, PrefixState]:
        scores, values = self._scores(x), self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        keep = keep_mask(x, lengths)
        if keep is not None:
            scores = scores.where(keep[..., None], -torch.inf)
        o, state = prefix_attention(
            scores,
            values,
            initial_state=request.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        return self.o_proj(o.flatten(-2)), state  # type: ignore[return-value]

    def pool(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Many to one: what the query reads from all tokens, the last output of a causal pass.

        Args:
            x: ``(B, T, D)``.
            mask: ``(B, T)`` bool, True = keep.

        Returns:
            ``(B, D)``.

        Raises:
            ValueError, TypeError: as :meth:`forward` does.
        """
        self._check(x, None, mask, None, None, None, None, False)
        scores = self._scores(x)
        if mask is not None:
            scores = scores.where(mask[..., None], -torch.inf)
        # a row of padding alone has seen nothing: zero, not 0/0
        weights = torch.softmax(scores, 1).where(scores.amax(1, keepdim=True) != -torch.inf, 0).to(x.dtype)
        read = torch.einsum("bth,bthv->bhv", weights, self.v_proj(x).unflatten(-1, (-1, self.head_dim)))
        output: Tensor = self.o_proj(read.flatten(-2))
        return output

    def _scores(self, x: Tensor) -> Tensor:
        """``(B, T, H)`` in float32: a score is exponentiated."""
        # two rows of it: how the product of a single row is rounded depends on where the weights lie in memory
        query = wide(self.q_proj(self.query_token.expand(2, -1))[0]).unflatten(-1, (self.num_heads, self.head_dim))
        query = query * self.head_dim**-0.5
        if type(self.k_proj) is not nn.Linear:  # an adapter: what it computes is known by calling it alone
            keys = wide(self.k_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
            return torch.einsum("bthk,hk->bth", keys, query)
        keys = wide(self.k_proj.weight).unflatten(0, (self.num_heads, self.head_dim))
        readers = torch.einsum("hk,hkd->hd", query, keys)
        bias = None
        if self.k_proj.bias is not None:
            bias = (query * wide(self.k_proj.bias).unflatten(0, (self.num_heads, self.head_dim))).sum(-1)
        return F.linear(wide(x), readers, bias)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> PrefixState:
        mass = torch.zeros(batch, self.num_heads, device=device)
        return PrefixState(mass - torch.inf, mass, torch.zeros(batch, self.num_heads, self.head_dim, device=device))
