"""Layers of transformers with recurrent code of their own: whole methods of ours in their place.

Where transformers mixes rows or loses a state (one token of several rows in RWKV; prompts in pieces and beams in
RecurrentGemma and MiniMax), these give what the model's own pass over the whole text gives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from subquad.inference.optimize.seam import LAYER_INDEX
from subquad.ops import MLSTMState, WKVState, diagonal_scan, lightning_attention, mlstm, short_convolution, wkv


def rg_lru_scan(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``RecurrentGemmaRglru._rnn_scan``: a diagonal recurrence ``(B, T, D)`` whose state is dropped where ``reset``."""
    if hidden_states.shape[1] == 1 and recurrent_states is None:
        return hidden_states, hidden_states[:, 0].to(acc_dtype)
    decay = (recurrent_gate * ~reset).to(torch.promote_types(hidden_states.dtype, acc_dtype))
    if hidden_states.shape[1] == 1 and recurrent_states is not None:
        after = torch.addcmul(hidden_states[:, 0].to(decay.dtype), decay[:, 0], recurrent_states)
        return after[:, None].to(hidden_states.dtype), after
    output, state = diagonal_scan(decay, hidden_states, initial_state=recurrent_states, return_state=True)
    assert state is not None
    return output, state


def recurrent_gemma_block(
    self: Any, input_states: Tensor, position_ids: Tensor, attention_mask: Any, use_cache: bool = True, **kwargs: Any
) -> tuple[Tensor, None]:
    """``RecurrentGemmaRecurrentBlock.forward``, its two states in the cache's layer where the cache has one for it.

    transformers keeps them on the module, where neither beams nor a second text are told apart. Without such a cache
    they stay there, and a prompt in pieces is carried on by the positions of its tokens.
    """
    length, tail = input_states.shape[1], self.conv1d_width - 1
    layer = _cache_layer(kwargs.get("cache"), self) if use_cache else None
    y = self.act_fn(self.linear_y(input_states))
    x = self.linear_x(input_states)
    if not use_cache:
        before = self.rg_lru.recurrent_states = None
    elif layer is not None:
        known = layer.has_previous_state[0]
        before = layer.conv_states[0][..., -tail:].mT.clone() if known else None
        self.rg_lru.recurrent_states = layer.recurrent_states[0] if known else None
        layer.update_conv_state(x.mT, conv_kernel_size=tail)
    else:
        kept = self.conv1d_state
        known = kept is not None and kept.shape[0] == x.shape[0]
        begins = position_ids[:, :1, None] == 0
        before = kept.mT.masked_fill(begins, 0) if known else x.new_zeros(x.shape[0], tail, x.shape[2])
        if not known:
            self.rg_lru.recurrent_states = None
        self.conv1d_state = torch.cat([before, x], dim=1)[:, length:].mT
    weight, bias = self.conv_1d.weight[:, 0], self.conv_1d.bias
    if length == 1 and before is not None:
        convolved = ((torch.cat([before, x], dim=1) * weight.T).sum(1) + bias)[:, None]
    else:
        convolved, _ = short_convolution(x, weight, bias, initial_state=before)
    hidden_states = self.rg_lru(convolved, position_ids) * y
    if layer is not None:
        layer.update_recurrent_state(self.rg_lru.recurrent_states)
        self.rg_lru.recurrent_states = None
    return self.linear_out(hidden_states), None


def _cache_layer(cache: Any, block: Any) -> Any:
    """The cache's layer for this block: the place of the block among the model's layers was noted when it was bound."""
    layers = getattr(cache, "layers", ())
    index = block.__dict__.get(LAYER_INDEX)
    if index is None or index >= len(layers) or not isinstance(layers[index], LinearAttentionCacheLayerMixin):
        return None
    return layers[index]


class LinearStateLayer(DynamicLayer):
    """The place of a lightning attention in MiniMax's cache: counts tokens, and reorders the state with the beams."""

    def __init__(self, cache: Any, index: int) -> None:
        super().__init__()
        self._states, self._index, self.seen = cache.linear_cache, index, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        state = self._states[self._index]
        self._states[self._index] = state.index_select(0, beam_idx.to(state.device))

    def reset(self) -> None:
        self.seen = 0
        self._states[self._index].zero_()


def minimax_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """``MiniMaxLightningAttention.forward``: linear attention with one constant decay per head."""
    rows, length, _ = hidden_states.shape
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    mixed = mixed.reshape(rows, length, self.num_attention_heads, 3 * self.head_dim)
    query, key, value = mixed.split(self.head_dim, dim=3)
    state = None if cache is None else cache.get_linear_cache(self.layer_idx)
    output, after = lightning_attention(
        query, key, value, self.slope_rate.flatten(), initial_state=_given(state), return_state=True
    )
    assert after is not None
    after = after.to(value.dtype)
    normed = self.norm(output.reshape(rows, length, -1))
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, after)
        _count(cache, self.layer_idx, length)
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * normed), after


def _given(state: Any) -> Tensor | None:
    return state if isinstance(state, Tensor) else None  # an empty list stands for a layer without one


def _count(cache: Any, index: int, tokens: int) -> None:
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[index], LinearStateLayer):
        cache.layers[index] = LinearStateLayer(cache, index)
    cache.layers[index].seen += tokens


def rwkv_attention(
    self: Any, hidden: Tensor, state: list[Tensor] | None = None, use_cache: bool = False
) -> tuple[Tensor, list[Tensor] | None]:
    """``RwkvSelfAttention.forward``: a weighted average of values. The state is five tensors ``(B, D, layers)``."""
    index = self.layer_id
    shifted = _shift(hidden, None if state is None else state[1][:, :, index])
    key, value, receptance = (
        projection(torch.lerp(shifted, hidden, mix))
        for projection, mix in (
            (self.key, self.time_mix_key),
            (self.value, self.time_mix_value),
            (self.receptance, self.time_mix_receptance),
        )
    )
    before = None if state is None else WKVState(*(part[:, :, index].float() for part in state[2:]))
    average, after = wkv(
        key, value, self.time_decay, self.time_first, initial_state=before, return_state=state is not None
    )
    if state is not None:
        assert after is not None
        state[1][:, :, index] = hidden[:, -1]
        for kept, new in zip(state[2:], after):
            kept[:, :, index] = new
    return self.output(torch.sigmoid(receptance) * average), state


def rwkv_feed_forward(
    self: Any, hidden: Tensor, state: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor] | None]:
    """``RwkvFeedForward.forward``, in which every row is mixed with its own last token."""
    shifted = _shift(hidden, None if state is None else state[0][:, :, self.layer_id])
    key = self.key(torch.lerp(shifted, hidden, self.time_mix_key))
    receptance = self.receptance(torch.lerp(shifted, hidden, self.time_mix_receptance))
    if state is not None:
        state[0][:, :, self.layer_id] = hidden[:, -1]
    return torch.sigmoid(receptance) * self.value(torch.relu(key).square()), state


def _shift(hidden: Tensor, last: Tensor | None) -> Tensor:
    """Every token's predecessor; the first one's is ``last (B, D)``, or zero."""
    first = torch.zeros_like(hidden[:, :1]) if last is None else last[:, None].to(hidden.dtype)
    if hidden.shape[1] == 1:
        return first.clone()  # not a view of the state, which changes
    return torch.cat([first, hidden[:, :-1]], dim=1)


def xlstm_backend(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> Any:
    """``xLSTMBackend.forward``: the matrix memory of ``query, key, value (B, H, T, .)`` and gates ``(B, H, T)``.

    The configuration's other modes return other things: those stay transformers' own.
    """
    chosen = self.config.mode if mode is None else mode
    if chosen != "inference":
        given = (query, key, value, igate, fgate, c_initial, n_initial, m_initial, return_last_states, mode)
        return type(self).forward(self, *given)
    q, k, v, added, forget = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
    before = None
    if c_initial is not None and n_initial is not None and m_initial is not None:
        before = MLSTMState(c_initial, n_initial, m_initial[..., 0])
    h, after = mlstm(q, k, v, added, forget, eps=self.config.eps, initial_state=before, return_state=True)
    assert after is not None
    dtype = getattr(torch, self.config.inference_state_dtype)
    state, normalizer, maximum = (part.to(dtype) for part in after)
    return h.transpose(1, 2), (state, normalizer, maximum[..., None])
