"""What attention implementations for other people's models share: which layers, which masks, and a cache that grows."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The causal softmax attention layers of a model, in order.

    Raises:
        TypeError, ValueError: no transformers model, one without such layers, or one whose cache was replaced already.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    if "_prepare_cache_for_generation" in vars(model):
        raise ValueError("the cache of this model is already ours: undo what was applied to it first")
    found = [
        module
        for module in model.modules()
        if getattr(module, "is_causal", False) is True and hasattr(module, "layer_idx")
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers of causal softmax attention to replace")
    return found


class GrowingLayer(DynamicLayer):
    """Keys and values with room at their end: a token costs what it is long, not what came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None  # (B, G, capacity, width) each; keys and values are their heads

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends; ``kwargs["kwargs"]``, which models hand to their attention, gets this layer as ``cache_layer``."""
        if isinstance(kwargs.get("kwargs"), dict):
            kwargs["kwargs"]["cache_layer"] = self
        if key_states.requires_grad or value_states.requires_grad:
            self.room = None
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, new = self.get_seq_length(), key_states.shape[-2]
        if (
            self.room is None
            or self.room[0].shape[-2] < length + new
            or self.keys.data_ptr() != self.room[0].data_ptr()
        ):
            capacity = length + new if length == 0 else 2 * length + new
            self.room = tuple(x.new_empty(*x.shape[:-2], capacity, x.shape[-1]) for x in (key_states, value_states))
            if length:
                for target, source in zip(self.room, (self.keys, self.values)):
                    target[..., :length, :] = source
        for target, source in zip(self.room, (key_states, value_states)):
            target[..., length : length + new, :] = source
        self.keys, self.values = (x[..., : length + new, :] for x in self.room)
        return self.keys, self.values

    def reset(self) -> None:
        self.room = None
        super().reset()


def give_caches(model: PreTrainedModel, layer_class: Callable[[], CacheLayerMixin]) -> None:
    """``generate`` gives the model a cache whose growing layers are made by ``layer_class``; a given cache stays."""
    prepare = model._prepare_cache_for_generation

    def prepared(
        self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("cache")
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("cache")
        if given is None and isinstance(cache, Cache):
            cache.layers = [layer_class() if type(layer) is DynamicLayer else layer for layer in cache.layers]
            if cache.layer_class_to_replicate is DynamicLayer:
                cache.layer_class_to_replicate = layer_class
        return result

    model._prepare_cache_for_generation = types.MethodType(prepared, model)


def take_caches(model: PreTrainedModel) -> None:
    """Undoes :func:`give_caches`."""
    del model._prepare_cache_for_generation


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Under the signature of transformers' mask functions: ``(B, S)`` bool, True = a real token, or None.

    Where a layer's mask is more than causal (windows, packed sequences, a cache with empty places) it has four axes.
    """
    if mask_function is not causal_mask_function or kv_offset or int(q_offset) + q_length != kv_length:
        options = {**kwargs, "allow_is_causal_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options)
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.to(torch.bool)


def full_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """torch's attention, the queries being the last tokens; ``mask`` as :func:`padding_mask` gives it."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and queries in (1, keys):
        options = {"is_causal": queries > 1}
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **options)
    if mask is None or mask.ndim == 2:
        columns = torch.arange(keys, device=key.device)
        own = columns[-queries:, None]
        visible = (columns <= own)[None, None]
        if mask is not None:  # padded queries see themselves, so that no row is empty
            visible = (visible & mask[:, None, None]) | (columns == own)
        mask = visible
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling)
