"""Titans: attention over a short range joined with a neural memory, in three ways (Behrouz et al. 2025, section 4).

Memory as context, as a gate beside attention, and as a layer below it. Learnt tokens that depend on no input stand in
front of every sequence (section 3.3).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.packing import Places, locate
from subquad.layers.norms import build_norm
from subquad.mixers.contract import RecurrentMixer, Request, keep_mask, map_state
from subquad.mixers.neural_memory import MemoryState, NeuralMemory
from subquad.mixers.softmax import SoftmaxAttention
from subquad.ops import SoftmaxState
from subquad.ops._contract import values_may_be_read
from subquad.positions.rope import apply_rope


class PersistentTokens(nn.Module):
    """``num_tokens`` learnt vectors that stand in front of every sequence."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens)  # as large as what a norm hands to the mixer

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def prepend(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` -> ``(B, P + T, D)``."""
        return torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


def check_persistent(num_persistent: int) -> None:
    if num_persistent < 0:
        raise ValueError(f"num_persistent must be at least 0; got {num_persistent}")


def _unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Places]:
    """Packed sequences ``(1, T, D)`` as rows ``(N, longest, D)``, zero after their ends, and where each token lies."""
    places = locate(cu_seqlens, x.shape[1])
    rows = x.new_zeros(len(places.sizes), int(places.sizes.max()), x.shape[2])
    return rows.index_put((places.sequence, places.place), x[0]), places


class WindowedState(NamedTuple):
    """The window's keys and values, and the memory."""

    attention: SoftmaxState
    memory: MemoryState


class _WindowAndMemory(RecurrentMixer):
    """What memory as a gate and memory as a layer share: parts, persistent tokens, states."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        window_size: int = 64,
        num_persistent: int = 16,
        head_dim: int | None = None,
        memory_layers: int = 2,
        expansion: float = 4.0,
        conv_size: int = 4,
        chunk_size: int = 16,
        max_step: float | None = None,
        max_grad_norm: float | None = None,
        rope_base: float | None = 10_000.0,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        check_persistent(num_persistent)
        self.attention = SoftmaxAttention(
            dim,
            num_heads,
            head_dim=head_dim,
            window_size=window_size,
            num_sinks=num_persistent,
            rope_base=rope_base,
            layer_index=layer_index,
            num_layers=num_layers,
        )
        self.memory = NeuralMemory(
            dim,
            num_heads,
            head_dim=head_dim,
            memory_layers=memory_layers,
            expansion=expansion,
            conv_size=conv_size,
            chunk_size=chunk_size,
            max_step=max_step,
            max_grad_norm=max_grad_norm,
            layer_index=layer_index,
            num_layers=num_layers,
        )
        self.persistent = PersistentTokens(num_persistent, dim) if num_persistent else None
        self.add_norms(dim)

    def add_norms(self, dim: int) -> None:
        """Makes the norms that :meth:`join` needs, where it needs any."""

    def join(
        self, x: Tensor, lengths: Tensor | None, state: WindowedState | None, use_state: bool
    ) -> tuple[Tensor, WindowedState]:
        """Rows of tokens, persistent ones among them -> outputs and state."""
        raise NotImplementedError(f"{type(self).__name__} must define join")

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, WindowedState]:
        if request.cu_seqlens is None:
            return self._rows(x, lengths, request)
        rows, place = _unpack(x, request.cu_seqlens)
        output, state = self._rows(rows, place.sizes, request)
        return output[place.sequence, place.place][None], state

    def _rows(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, WindowedState]:
        if self.persistent is None or request.state is not None:
            return self.join(x, lengths, request.state, request.use_state)
        before = len(self.persistent)
        lengths = None if lengths is None else lengths + before
        output, state = self.join(self.persistent.prepend(x), lengths, None, request.use_state)
        return output[:, before:], state

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> WindowedState:
        """The state before any token: the persistent tokens have been read."""
        empty = WindowedState(
            self.attention.init_state(batch, dtype, device), self.memory.init_state(batch, dtype, device)
        )
        if self.persistent is None:
            return empty
        tokens = self.persistent.tokens.expand(batch, -1, -1)
        _, state = self.join(tokens, None, None, True)
        return map_state(lambda leaf: leaf.to(device), state)

    def _attend(
        self, x: Tensor, lengths: Tensor | None, state: WindowedState | None, use_state: bool
    ) -> tuple[Tensor, SoftmaxState]:
        past = None if state is None else state.attention
        request = Request(mask=keep_mask(x, lengths), state=past, use_state=use_state)
        output, after, _ = self.attention.mix(x, None, request)
        return output, after  # type: ignore[return-value]

    def _remember(
        self, x: Tensor, lengths: Tensor | None, state: WindowedState | None, use_state: bool
    ) -> tuple[Tensor, MemoryState]:
        past = None if state is None else state.memory
        return self.memory.recur(x, lengths, Request(state=past, use_state=use_state))


class TitansMAG(_WindowAndMemory):
    """Memory as a gate: ``y = RMSNorm(attention(x)) * sigmoid(RMSNorm(memory(x)))``, attention in a sliding window.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        window_size: a query sees its last so many keys, and the persistent tokens.
        num_persistent: learnt tokens in front of every sequence, read by both branches.
        head_dim, memory_layers, expansion, conv_size, chunk_size, max_step, max_grad_norm: of the memory, see
            :class:`NeuralMemory`; head_dim also of the attention.
        rope_base: of the attention's rotary positions; None: no positions.
    """

    def add_norms(self, dim: int) -> None:
        self.attention_norm = build_norm("rms", dim)
        self.memory_norm = build_norm("rms", dim)

    def join(
        self, x: Tensor, lengths: Tensor | None, state: WindowedState | None, use_state: bool
    ) -> tuple[Tensor, WindowedState]:
        attended, window = self._attend(x, lengths, state, use_state)
        remembered, memory = self._remember(x, lengths, state, use_state)
        gate = torch.sigmoid(self.memory_norm(remembered))
        return self.attention_norm(attended) * gate, WindowedState(window, memory)


class TitansMAL(_WindowAndMemory):
    """Memory as a layer: ``y = attention(memory(x))``, attention in a sliding window.

    Args: those of :class:`TitansMAG`.
    """

    def join(
        self, x: Tensor, lengths: Tensor | None, state: WindowedState | None, use_state: bool
    ) -> tuple[Tensor, WindowedState]:
        remembered, memory = self._remember(x, lengths, state, use_state)
        attended, window = self._attend(remembered, lengths, state, use_state)
        return attended, WindowedState(window, memory)


class SegmentState(NamedTuple):
    """The keys and values of the segment that is not yet full, and the memory."""

    context_keys: Tensor  # (B, n, H, d), of what the memory answered
    context_values: Tensor  # (B, n, H, d)
    keys: Tensor  # (B, n, H, d), of the tokens
    values: Tensor  # (B, n, H, d)
    filled: Tensor  # (B,) int64, how many of the n places hold a token
    reading: Tensor  # (B, H, N) float32, the memory before the segment
    query_tail: Tensor | None  # (B, width - 1, H d), the last tokens of the convolution on the queries of x
    memory: MemoryState


class TitansMAC(RecurrentMixer):
    """Memory as context: in segments of n tokens, attention over what the memory answers to them and over themselves.

    With the memory M before the segment, ``h_t = M(q_t)``; ``y = attention`` of the tokens over the persistent tokens,
    h and x up to each; the memory learns from y, and the output is ``RMSNorm(y) * RMSNorm(M_t(y_t))``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        segment_size: n.
        num_persistent: learnt tokens that every query sees.
        head_dim, memory_layers, expansion, conv_size, max_step, max_grad_norm: of the memory, see
            :class:`NeuralMemory`; head_dim also of the attention.
        chunk_size: of the memory, a divisor of n.
        rope_base: of rotary positions inside the segment; None: no positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        segment_size: int = 64,
        num_persistent: int = 16,
        head_dim: int | None = None,
        memory_layers: int = 2,
        expansion: float = 4.0,
        conv_size: int = 4,
        chunk_size: int = 16,
        max_step: float | None = None,
        max_grad_norm: float | None = None,
        rope_base: float | None = 10_000.0,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        check_persistent(num_persistent)
        if segment_size < 1 or chunk_size < 1 or segment_size % chunk_size:
            raise ValueError(
                f"chunk_size must divide segment_size, both at least 1; got {chunk_size} and {segment_size}"
            )
        self.memory = NeuralMemory(
            dim,
            num_heads,
            head_dim=head_dim,
            memory_layers=memory_layers,
            expansion=expansion,
            conv_size=conv_size,
            chunk_size=chunk_size,
            max_step=max_step,
            max_grad_norm=max_grad_norm,
            layer_index=layer_index,
            num_layers=num_layers,
        )
        self.segment_size, self.rope_base, self.head_dim = segment_size, rope_base, self.memory.head_dim
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width; it is {self.head_dim}")
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.attention_norm = build_norm("rms", dim)
        self.memory_norm = build_norm("rms", dim)
        self.persistent = PersistentTokens(num_persistent, dim) if num_persistent else None

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, SegmentState]:
        if request.cu_seqlens is not None:
            rows, place = _unpack(x, request.cu_seqlens)
            output, state = self._segments(rows, place.sizes, request.state)
            return output[place.sequence, place.place][None], state
        return self._segments(x, lengths, request.state)

    def _segments(self, x: Tensor, lengths: Tensor | None, past: SegmentState | None) -> tuple[Tensor, SegmentState]:
        """Rows of tokens, each from its own place in a segment on, segment by segment."""
        rows, time, size = x.shape[0], x.shape[1], self.segment_size
        if past is None and lengths is None:
            state, outputs = self.init_state(rows, x.dtype, x.device), []
            for piece in x.split(size, dim=1):
                output, state = self._segment(piece, None, state)
                outputs.append(output)
            return torch.cat(outputs, dim=1), state
        state = self.init_state(rows, x.dtype, x.device) if past is None else past
        counts = torch.full((rows,), time, device=x.device) if lengths is None else lengths
        if time == 1:
            return self._segment(x, counts, state)
        before = state.filled
        reach = int((before + counts).max()) if values_may_be_read(x) else size - 1 + time
        step, outputs = torch.arange(size, device=x.device), []
        for number in range(max(1, -(-reach // size))):
            first = (number * size - before).clamp(min=0)
            own = (((number + 1) * size - before).minimum(counts) - first).clamp(min=0)
            at = (first[:, None] + step).clamp(max=time - 1)
            output, state = self._segment(x.gather(1, at[..., None].expand(-1, -1, self.dim)), own, state)
            outputs.append(output)
        place = before[:, None] + torch.arange(time, device=x.device)
        segment = (place // size).clamp(max=len(outputs) - 1)
        within = place - torch.maximum(segment * size, before[:, None])
        index = segment * size + within.clamp(max=size - 1)
        output = torch.cat(outputs, dim=1).gather(1, index[..., None].expand(-1, -1, self.dim))
        return output, state

    def _segment(self, x: Tensor, counts: Tensor | None, state: SegmentState) -> tuple[Tensor, SegmentState]:
        """Tokens ``(B, w, D)`` of which the first ``counts (B,)`` of a row are real (None: all), all in one segment."""
        width, memory = x.shape[1], self.memory
        place = state.filled[:, None] + torch.arange(width, device=x.device)
        query, query_tail = memory.q_proj(x), state.query_tail
        if memory.convolutions.width:
            query, query_tail = memory.convolutions.q(query, state=query_tail, lengths=counts, return_state=True)
        answers = memory.read(query, state.reading)

        new = (*self._keys_and_values(answers, place), *self._keys_and_values(x, place))
        context_keys, context_values, keys, values = (
            self._fill(old, fresh, place, counts) for old, fresh in zip(state[:4], new)
        )
        y = self._attend(x, place, context_keys, context_values, keys, values)

        remembered, learnt = memory.recur(y, counts, Request(state=state.memory, use_state=True))
        output = self.attention_norm(y) * self.memory_norm(remembered)
        filled = state.filled + (width if counts is None else counts)
        full = filled == self.segment_size
        reading = torch.where(full[:, None, None], learnt.memory.weights, state.reading)
        after = SegmentState(
            context_keys, context_values, keys, values, filled.where(~full, 0), reading, query_tail, learnt
        )
        return output, after

    def _keys_and_values(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj))
        return self._turn(key, place), value

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotary positions; the persistent tokens come first."""
        if self.rope_base is None:
            return x
        return apply_rope(x, place + (0 if self.persistent is None else len(self.persistent)), self.rope_base)

    def _fill(self, old: Tensor, new: Tensor, place: Tensor, counts: Tensor | None) -> Tensor:
        """``old (B, n, H, d)`` with ``new (B, w, H, d)`` at its places, as far as it is real."""
        if counts is None and new.shape[1] == self.segment_size:
            return new  # a whole segment
        spare = torch.cat([old.to(new.dtype), torch.zeros_like(old[:, :1])], dim=1)  # one more place, for padding
        if counts is not None:
            real = torch.arange(new.shape[1], device=new.device) < counts[:, None]
            place = place.where(real, self.segment_size)
        return spare.scatter(1, place[..., None, None].expand_as(new), new)[:, : self.segment_size]

    def _attend(
        self,
        x: Tensor,
        place: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Each token over the persistent tokens and over the answers and tokens of its segment up to its own place."""
        query = self._turn(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), place)
        seen = torch.arange(self.segment_size, device=x.device) <= place[..., None]
        visible = torch.cat([seen, seen], dim=-1)
        key, value = torch.cat([context_keys, keys], dim=1), torch.cat([context_values, values], dim=1)
        if self.persistent is not None:
            count = len(self.persistent)
            first = torch.arange(-count, 0, device=x.device)
            own = self._keys_and_values(self.persistent.tokens.to(x.dtype)[None], first)
            key, value = (torch.cat([p.expand(len(x), -1, -1, -1), y], 1) for p, y in zip(own, (key, value)))
            visible = F.pad(visible, (count, 0), value=True)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        o = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        output: Tensor = self.o_proj(o.transpose(1, 2).flatten(-2))
        return output

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> SegmentState:
        empty = torch.zeros(batch, self.segment_size, self.num_heads, self.head_dim, dtype=dtype, device=device)
        filled = torch.zeros(batch, dtype=torch.int64, device=device)
        memory = self.memory.init_state(batch, dtype, device)
        return SegmentState(
            empty,
            empty.clone(),
            empty.clone(),
            empty.clone(),
            filled,
            memory.memory.weights.clone(),
            memory.tails.q,
            memory,
        )
