"""Mixture of memories: a router sends each token to a few of several states (Du et al. 2025, "MoM", section 3).

A memory's tokens are a sequence of their own. All of them, of all rows, are packed behind one another and run through
the short convolutions and the recurrence in one call: no padding to the longest memory, no capacity, nothing dropped.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import ops
from subquad.kernels.packing import locate
from subquad.layers.norms import build_norm, l2_normalize
from subquad.layers.registry import unknown_name
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import Mixer, MixerOutput, Pattern, Request, wide
from subquad.mixers.delta_net import HeadDecay

LARGEST_BUFFER = 2**24  # bytes: longer inputs go piece by piece, which keeps buffers in the allocator's reach
GATE_RANK, GATE_TEMPERATURE = 16, 16.0  # of gates per channel, as in gated linear attention


class Inner(NamedTuple):
    """A recurrence that each memory can run.

    Attributes:
        op: called with q, k, v, then the log decay if it has one, then beta if it erases.
        gate: ``"head"`` or ``"channel"``, what its decay is per; None: it has none.
        erases: whether it follows the delta rule: keys and queries then have unit length.
    """

    op: Callable[..., tuple[Tensor, Any]]
    gate: str | None
    erases: bool


INNERS = {
    "linear_attention": Inner(ops.linear_attention, None, False),
    "simple_gla": Inner(ops.simple_gla, "head", False),
    "gla": Inner(ops.gla, "channel", False),
    "delta_rule": Inner(ops.delta_rule, None, True),
    "gated_delta_rule": Inner(ops.gated_delta_rule, "head", True),
    "kda": Inner(ops.kda, "channel", True),
}


class MemoriesState(NamedTuple):
    """The states of all memories, the shared one last, and each one's own last tokens of the short convolutions."""

    states: Tensor  # (B, M, H, K, V) float32
    tails: ConvolutionTails  # (B, M, width - 1, channels) each


class RouterLoad(NamedTuple):
    """How a router has spread its tokens: what a layer contributes to the balance loss of all layers.

    Attributes:
        choices: ``(k, E)``, how many tokens have memory e as their j-th choice.
        probability: ``(E,)``, the sum of the tokens' probabilities, with their gradient.
        tokens: how many there are.
        weight: of the loss.
    """

    choices: Tensor
    probability: Tensor
    tokens: Tensor
    weight: float

    @classmethod
    def pooled(cls, parts: "Sequence[RouterLoad]") -> Tensor:
        """``weight E sum_j sum_e f_je P_e`` over the tokens of all parts: weight k where balanced (Fedus et al. 2022).

        f_je is the share of tokens whose j-th choice is e, P_e the mean probability. Routers of different sizes or
        weights have losses of their own, which are added.
        """
        alike: dict[Any, list[RouterLoad]] = {}
        for part in parts:
            alike.setdefault((part.choices.shape, part.weight), []).append(part)
        losses = []
        for (shape, weight), members in alike.items():
            tokens = torch.stack([part.tokens for part in members]).sum().clamp(min=1)
            share = torch.stack([part.choices for part in members]).sum((0, 1)) / tokens
            mean = torch.stack([part.probability for part in members]).sum(0) / tokens
            losses.append(weight * shape[1] * (share * mean).sum())
        return torch.stack(losses).sum()

    @classmethod
    def of_pieces(cls, pieces: "Sequence[RouterLoad]") -> "RouterLoad":
        """The load of one layer from those of pieces of its tokens."""
        choices, probability, tokens = (torch.stack(column).sum(0) for column in list(zip(*pieces))[:3])
        return cls(choices, probability, tokens, pieces[0].weight)

    def shares(self) -> Tensor:
        """``(E,)``, each memory's share of all choices; zero: it is dead."""
        used = self.choices.sum(0)
        return used / used.sum().clamp(min=1)


class MemoryProjections(nn.Module):
    """One memory's keys, values, write strength and forget gate: ``(n, D)`` -> k, v, beta or None, gate or None.

    Beta and gate are logits, float32.
    """

    def __init__(self, dim: int, num_heads: int, key_dim: int, value_dim: int, inner: Inner) -> None:
        super().__init__()
        self.k_proj = nn.Linear(dim, key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.b_proj = nn.Linear(dim, num_heads, bias=False) if inner.erases else None
        self.a_proj: nn.Module | None = None
        if inner.gate == "head":
            self.a_proj = nn.Linear(dim, num_heads, bias=False)
        elif inner.gate == "channel":
            self.a_proj = nn.Sequential(nn.Linear(dim, GATE_RANK, bias=False), nn.Linear(GATE_RANK, key_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        beta = None if self.b_proj is None else wide(self.b_proj(x))
        gate = None if self.a_proj is None else wide(self.a_proj(x))
        return self.k_proj(x), self.v_proj(x), beta, gate


class Routes(NamedTuple):
    """Where the n tokens go, as m = n (k + 1) pairs of a token and a memory (k without the shared one)."""

    order: Tensor  # (m,) pairs sorted by memory, then sequence, then time; pairs of a token lie together before
    keys: Tensor  # (s,) memory * sequences + sequence, of the sub-sequences that hold a token, ascending
    offsets: Tensor  # (s + 1,) where they begin and end
    per_memory: list[int]  # M, how many pairs each memory has
    weights: Tensor  # (n, k + 1)


class MixtureOfMemories(Mixer):
    """``o_t = sum_e w_te o_t^e + o_t^shared`` over the memories e that a router chose; then norm, gate and projection.

    With ``p = softmax(W_r x)`` the k largest are chosen and ``w`` is p over their sum. Memory e, with keys, values and
    gates of its own, sees only the tokens routed to it, as if they were a sequence of their own; queries are shared.
    In training ``losses["router_balance"]`` is a :class:`RouterLoad`, from which the model takes one loss over the
    tokens of all layers.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        inner: the recurrence of each memory, by the name of its op.
        num_memories: E; 1: no router.
        top_k: k, memories per token.
        shared: whether one more memory sees every token.
        single_kv: one projection of keys, values and gates for all memories: routing then only selects the state.
        expand_k, expand_v: total key and value width over D.
        conv_size: width of the short convolutions on q, k, v, whose weights all memories share; 0: none.
        router_aux_weight: of the balance loss.
        norm_eps: of the norm on each head's output.

    Example:
        >>> mixer = MixtureOfMemories(16, 2, num_memories=3)
        >>> output, _, losses = mixer(torch.zeros(1, 5, 16))
        >>> output.shape, int(losses["router_balance"].tokens)
        (torch.Size([1, 5, 16]), 5)
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        inner: str = "gated_delta_rule",
        num_memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        single_kv: bool = False,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        router_aux_weight: float = 0.01,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if inner not in INNERS:
            raise unknown_name("inner recurrence", inner, INNERS)
        if not 1 <= top_k <= num_memories:
            raise ValueError(f"top_k must lie in [1, num_memories {num_memories}]; got {top_k}")
        if top_k == 1 and num_memories > 1 and not shared:
            raise ValueError(
                "top_k=1 without a shared memory leaves the router no gradient: its one weight is always 1; "
                "take shared=True or top_k=2"
            )
        self.inner, self.num_memories, self.top_k = INNERS[inner], num_memories, top_k
        self.router_aux_weight = router_aux_weight
        self.all_memories = num_memories + int(shared)
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        self.head_k_dim = self.head_width(key_dim, "expand_k * dim")
        self.head_v_dim = self.head_width(value_dim, "expand_v * dim")
        self.router = nn.Linear(dim, num_memories, bias=False) if num_memories > 1 else None
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.memories = nn.ModuleList(
            MemoryProjections(dim, num_heads, key_dim, value_dim, self.inner)
            for _ in range(1 if single_kv else self.all_memories)
        )
        self.decay = HeadDecay(num_heads) if self.inner.gate == "head" else None
        self.convolutions = QKVConvolutions(key_dim, key_dim, value_dim, conv_size)
        self.g_proj = nn.Linear(dim, value_dim, bias=False)
        self.o_norm = build_norm("rms", self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if request.cu_seqlens is not None:
            sequences = len(request.cu_seqlens) - 1
            sequence = locate(request.cu_seqlens, x.shape[1]).sequence
        else:
            sequences = x.shape[0]
            sequence = torch.arange(sequences, device=x.device).repeat_interleave(x.shape[1])
        tokens = x.flatten(0, 1)
        real = None if request.mask is None else request.mask.flatten()
        if real is not None:
            tokens, sequence = tokens[real], sequence[real]
        past: MemoriesState | None = request.state
        if not len(tokens):  # nothing but padding
            unchanged = self.init_state(sequences, x.dtype, x.device) if past is None else past
            return MixerOutput(torch.zeros_like(x), unchanged if request.use_state else None, {})
        outputs, loads, state = [], [], past
        width = max(self.dim, self.q_proj.out_features, self.g_proj.out_features)
        size = max(1, LARGEST_BUFFER // (width * (self.top_k + 1) * x.element_size()))
        pieces = list(zip(tokens.split(size), sequence.split(size)))
        for number, (piece, own) in enumerate(pieces):
            routes, load = self._route(piece, own, sequences)
            goes_on = request.use_state or number < len(pieces) - 1
            o, state = self._recur(piece, routes, state, sequences, goes_on)
            o = self.o_norm(o) * F.silu(self.g_proj(piece)).unflatten(-1, (-1, self.head_v_dim))
            outputs.append(self.o_proj(o.flatten(-2)))
            loads.append(load)
        output = torch.cat(outputs)
        if real is not None:
            output = output.new_zeros(len(real), self.dim).index_put((real.nonzero()[:, 0],), output)
        losses = {"router_balance": RouterLoad.of_pieces(loads)} if self.training and self.router is not None else {}
        return MixerOutput(output.view_as(x), state if request.use_state else None, losses)

    def probabilities(self, x: Tensor) -> Tensor:
        """What the router says of tokens ``(..., D)``: ``(..., E)``, float32, from logits in float32."""
        if self.router is None:
            return torch.ones_like(wide(x[..., :1]))
        with torch.autocast(x.device.type, enabled=False):
            return torch.softmax(F.linear(wide(x), wide(self.router.weight)), dim=-1)

    def load_of(self, x: Tensor) -> RouterLoad:
        """How the router spreads tokens ``(..., D)``."""
        probability = self.probabilities(x).flatten(0, -2)
        return self._load(probability, probability.topk(self.top_k, dim=-1).indices)

    def _load(self, probability: Tensor, chosen: Tensor) -> RouterLoad:
        choices = torch.stack([torch.bincount(c, minlength=self.num_memories) for c in chosen.unbind(-1)])
        tokens = torch.tensor(len(chosen), device=chosen.device)
        return RouterLoad(choices, probability.sum(0), tokens, self.router_aux_weight)

    def _route(self, tokens: Tensor, sequence: Tensor, sequences: int) -> tuple[Routes, RouterLoad]:
        probability = self.probabilities(tokens)
        weights, chosen = probability.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        memory = chosen
        if self.all_memories > self.num_memories:
            memory = F.pad(chosen, (0, 1), value=self.num_memories)
            weights = F.pad(weights, (0, 1), value=1.0)
        # stable: the pairs of one memory and sequence stay in the order of time
        keys, order = torch.sort((memory * sequences + sequence[:, None]).flatten(), stable=True)
        present, sizes = torch.unique_consecutive(keys, return_counts=True)
        offsets = F.pad(sizes.cumsum(0), (1, 0))
        per_memory = torch.bincount(memory.flatten(), minlength=self.all_memories).tolist()
        return Routes(order, present, offsets, per_memory, weights), self._load(probability, chosen)

    def _recur(
        self, tokens: Tensor, routes: Routes, past: MemoriesState | None, sequences: int, use_state: bool
    ) -> tuple[Tensor, MemoriesState | None]:
        """Tokens ``(n, D)`` -> the mixed reading ``(n, H, V)`` and the states after them."""
        copies = routes.weights.shape[1]
        place = routes.order // copies  # the token of each pair
        q = self.q_proj(tokens)[place]
        k, v, beta, gate = self._project(tokens[place], routes.per_memory)
        single = len(routes.keys) == len(place)  # one token in each: rows of a batch, without packing

        def lay(x: Tensor) -> Tensor:
            return x[:, None] if single else x[None]

        cu_seqlens = None if single else routes.offsets
        at = (routes.keys % sequences, routes.keys // sequences)
        started = None if past is None else ConvolutionTails(*(None if t is None else t[at] for t in past.tails))
        q, k, v, tails = self.convolutions(
            lay(q), lay(k), lay(v), state=started, cu_seqlens=cu_seqlens, return_state=use_state
        )
        if not self.convolutions.width:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        if self.inner.erases:
            q, k = l2_normalize(q), l2_normalize(k)
        o, after = self.inner.op(
            q,
            k,
            v.unflatten(-1, (-1, self.head_v_dim)),
            *([] if gate is None else [lay(self._log_decay(gate))]),
            *([] if beta is None else [lay(torch.sigmoid(beta))]),
            scale=self.head_k_dim**-0.5,
            initial_state=None if past is None else past.states[at],
            return_state=use_state,
            cu_seqlens=cu_seqlens,
        )
        o = o.flatten(0, 1)
        back = torch.empty_like(routes.order).scatter(0, routes.order, torch.arange(len(place), device=o.device))
        read = o.flatten(1)[back].unflatten(0, (-1, copies))
        mixed = torch.bmm(routes.weights[:, None].to(o.dtype), read)[:, 0].unflatten(-1, o.shape[1:])
        if not use_state:
            return mixed, None
        assert after is not None
        before = self.init_state(sequences, tokens.dtype, tokens.device) if past is None else past

        def stored(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            return None if old is None or new is None else old.to(new.dtype).index_put(at, new)

        kept = ConvolutionTails(*map(stored, before.tails, tails))
        return mixed, MemoriesState(before.states.to(after.dtype).index_put(at, after), kept)

    def _project(self, x: Tensor, per_memory: list[int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Each memory's pairs lie together: one product per memory on its rows."""
        if len(self.memories) == 1:
            found: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = self.memories[0](x)
            return found
        ends = torch.tensor([0, *per_memory]).cumsum(0).tolist()
        parts = [project(x[a:b]) for project, (a, b) in zip(self.memories, pairwise(ends)) if b > a]
        keys, values, betas, gates = zip(*parts)
        return (
            torch.cat(keys),
            torch.cat(values),
            None if betas[0] is None else torch.cat(betas),
            None if gates[0] is None else torch.cat(gates),
        )

    def _log_decay(self, logit: Tensor) -> Tensor:
        if self.decay is not None:
            return self.decay(logit)
        return F.logsigmoid(logit).unflatten(-1, (-1, self.head_k_dim)) / GATE_TEMPERATURE

    def _check_state(self, state: MemoriesState, rows: int) -> None:
        super()._check_state(state, rows)
        shape = (rows, self.all_memories, self.num_heads, self.head_k_dim, self.head_v_dim)
        if tuple(state.states.shape) != shape:
            raise ValueError(
                f"state.states must be (batch, memories, heads, key width, value width) = {shape}; "
                f"it has shape {tuple(state.states.shape)}"
            )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MemoriesState:
        shape = (batch, self.all_memories, self.num_heads, self.head_k_dim, self.head_v_dim)
        empty = self.convolutions.init_state(1, dtype, device)
        tails = (None if t is None else t.new_zeros(batch, self.all_memories, *t.shape[1:]) for t in empty)
        return MemoriesState(torch.zeros(shape, device=device), ConvolutionTails(*tails))
