"""Recycled attention: most generated tokens read only cached tokens that an earlier full step found important.

Source: Xu et al. 2024, "Recycled Attention: efficient inference for long-context language models", section 3. On
the same cache, the policies that it is compared with: StreamingLLM, H2O and SnapKV, which drop tokens for good.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from subquad.inference.attention_sites import (
    GrowingLayer,
    attention_layers,
    full_attention,
    give_caches,
    padding_mask,
    take_caches,
)

NAME = "subquad_recycled"
SAVED_AS = "subquad_recycled"  # in the model's config
MODES = ("recycled", "snapkv", "h2o", "streaming")
QUERY_BLOCK = 128  # rows of weights of a prompt held at once


@dataclass(frozen=True)
class RecycledOptions:
    """Which cached tokens a generated token reads; saved in the model's config.

    Attributes:
        max_partial: K, tokens in the partial cache, or its share of the prompt (a float up to 1).
        stride: S, steps from one full step to the next; with a threshold, from one check to the next.
        threshold: at a check, a full step is made where the cosine of the query to that of the last full step is at
            most this in some row, layer by layer; None: at every check.
        pool: positions over which importance spreads, odd.
        mode: ``"recycled"``, or a policy that never makes a full step: ``"snapkv"`` (the prompt's most important
            tokens and all generated ones), ``"h2o"`` (the largest sums of attention), ``"streaming"`` (the first and
            the last tokens).
        sinks: first tokens of ``"streaming"``.
        observed: last queries of the prompt by which ``"snapkv"`` chooses.
    """

    max_partial: int | float = 0.125
    stride: int = 10
    threshold: float | None = None
    pool: int = 7
    mode: str = "recycled"
    sinks: int = 4
    observed: int = 16


@dataclass
class Partial:
    """The partial cache of a layer, slot by slot: K of them and one for the next token."""

    keys: Tensor  # (B, G, slots, K)
    values: Tensor  # (B, G, slots, V)
    places: Tensor  # (B, G, slots) int64, columns of the whole cache; -1: an empty slot
    scores: Tensor  # (B, G, slots) float32, importance: at the last step, or summed over steps (h2o)
    newest: Tensor  # (B, G, 1) int64, the slot of the last token, which is not the next to go


@dataclass
class Counts:
    """What the steps of one layer have read."""

    steps: int = 0
    full_steps: int = 0
    keys_read: int = 0
    keys_held: int = 0


class RecycledLayer(GrowingLayer):
    """All keys and values of one layer, and the few that steps between full ones read."""

    def __init__(self) -> None:
        super().__init__()
        self.partial: Partial | None = None
        self.reference: Tensor | None = None  # (B, K), the mean query of the last full step
        self.size = 0  # K
        self.since_check = 0
        self.counts = Counts()

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.partial is not None:
            self.partial = Partial(*(function(x) for x in vars(self.partial).values()))
        if self.reference is not None:
            self.reference = function(self.reference)

    def reset(self) -> None:
        self.partial = self.reference = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.partial = self.reference = None  # the next step is a full one

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda x: x[indices.to(x.device)])


class RecycledModel:
    """A model that recycles attention, as :func:`recycle` returns it; a context manager that undoes it at the end."""

    def __init__(self, model: PreTrainedModel, options: RecycledOptions, attentions: list[nn.Module]) -> None:
        self.model, self.options, self._attentions = model, options, attentions
        self._previous = model.config._attn_implementation
        self._counts: deque[Counts] = deque(maxlen=len(attentions))
        for attention in attentions:
            attention._subquad_recycled = options
        give_caches(model, self._new_layer)
        setattr(model.config, SAVED_AS, asdict(options))
        model.set_attn_implementation(NAME)

    def _new_layer(self) -> RecycledLayer:
        layer = RecycledLayer()
        self._counts.append(layer.counts)
        return layer

    def undo(self) -> None:
        """The model computes as before :func:`recycle`. A second call changes nothing."""
        if "_prepare_cache_for_generation" not in vars(self.model):
            return
        take_caches(self.model)
        delattr(self.model.config, SAVED_AS)
        for attention in self._attentions:
            del attention._subquad_recycled
        self.model.set_attn_implementation(self._previous)

    def stats(self) -> dict[str, float]:
        """Of the steps of the last ``generate``: the share of full ones, and the share of the cache that was read."""
        steps = max(1, sum(counts.steps for counts in self._counts))
        held = max(1, sum(counts.keys_held for counts in self._counts))
        return {
            "full_steps": sum(counts.full_steps for counts in self._counts) / steps,
            "read": sum(counts.keys_read for counts in self._counts) / held,
        }

    def __enter__(self) -> "RecycledModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def recycle(model: PreTrainedModel, **options: Any) -> RecycledModel:
    """Generated tokens read a partial cache between full steps; prompts are read as ever, and no weight changes.

    Memory is not saved: the whole cache is kept, so that nothing is lost for good. Keys and values of tokens from
    partial steps are approximate, and a later full step does not repair them. The options are kept in the model's
    config, are saved with it, and are the defaults of the next call.

    Args:
        model: a transformers causal language model whose attention can be chosen.
        options: those of :class:`RecycledOptions` to change.

    Returns:
        A handle with ``undo()`` and ``stats()``; as a context manager it undoes at the end. Its cache comes with
        ``generate``; a loop of one's own takes ``Cache(layer_class_to_replicate=RecycledLayer)``.

    Raises:
        ValueError, TypeError: an unknown option or one out of range, a model without such attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> with recycle(model, max_partial=8, stride=4) as handle:
        ...     tokens = model.generate(torch.arange(40)[None], max_new_tokens=9, min_new_tokens=9, pad_token_id=0)
        ...     handle.stats()["full_steps"]
        0.25
    """
    attentions = attention_layers(model)
    known = {field.name for field in fields(RecycledOptions)}
    unknown = set(options) - known
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {', '.join(sorted(known))}")
    chosen = replace(RecycledOptions(), **{**getattr(model.config, SAVED_AS, {}), **options})
    _check(chosen)
    return RecycledModel(model, chosen, attentions)


def _check(options: RecycledOptions) -> None:
    size = options.max_partial
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise TypeError(f"max_partial must be a number of tokens or a share of the prompt; got {size!r}")
    if (isinstance(size, float) and not 0 < size <= 1) or size <= 0:
        raise ValueError(f"max_partial must be an integer >= 1 or a float in (0, 1]; got {size!r}")
    for name in ("stride", "observed", "pool"):
        number = getattr(options, name)
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer >= 1; got {number!r}")
    if options.pool % 2 == 0:
        raise ValueError(f"pool must be odd, so that it has a middle; got {options.pool}")
    if options.threshold is not None and not 0 < options.threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1]; got {options.threshold!r}")
    if options.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}; got {options.mode!r}")
    if options.mode == "streaming" and isinstance(size, int) and size < options.sinks + 2:
        raise ValueError(f"streaming needs max_partial of at least sinks + 2 = {options.sinks + 2}; got {size}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache_layer: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Under the signature of transformers' attention functions: ``(B, H, T, K)`` in, ``(B, T, H, V)`` out."""
    options: RecycledOptions | None = getattr(module, "_subquad_recycled", None)
    if options is None:
        raise ValueError(f"attention {NAME!r} is set up by subquad.inference.recycle(model), not by its name alone")
    more_than_causal = attention_mask is not None and attention_mask.ndim == 4
    if not isinstance(cache_layer, RecycledLayer) and key.shape[2] > query.shape[2]:
        raise ValueError(
            f"recycled attention keeps what it reads in a cache of its own, and {type(module).__name__} was given "
            "another or does not hand it on; where you call the model yourself, take "
            "Cache(layer_class_to_replicate=RecycledLayer)"
        )
    if not isinstance(cache_layer, RecycledLayer) or more_than_causal:
        return full_attention(module, query, key, value, attention_mask, dropout, scaling)
    layer, scale = cache_layer, query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        if query.shape[2] > 1:
            output = full_attention(module, query, key, value, attention_mask, dropout, scaling)
            _choose(layer, query, key, value, attention_mask, scale, options)
            return output
        counts = layer.counts
        counts.steps += 1
        counts.keys_held += key.shape[2]
        if layer.partial is None or _is_due(layer, query, options):
            counts.full_steps += 1
            counts.keys_read += key.shape[2]
            output = full_attention(module, query, key, value, attention_mask, dropout, scaling)
            _choose(layer, query, key, value, attention_mask, scale, options)
            return output
        layer.since_check += 1
        return _partial_step(layer, query, key, value, scale, options), None


def _is_due(layer: RecycledLayer, query: Tensor, options: RecycledOptions) -> bool:
    """Whether this step is a full one."""
    if options.mode != "recycled" or layer.since_check + 1 < options.stride:
        return False
    if options.threshold is None or layer.reference is None:
        return True
    layer.since_check = 0
    likeness = F.cosine_similarity(query.mean(1)[:, 0].float(), layer.reference.float(), dim=-1)
    return bool((likeness.clamp(max=1) <= options.threshold).any())


def importance(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of queries that see all keys up to their own, the largest of each group, ``(B, G, T, S)`` float32.

    Args:
        query: ``(B, H, T, K)``, the last T tokens.
        key: ``(B, G, S, K)``.
        mask: ``(B, S)`` bool, True = a real token, or None.
        scale: of the scores.
    """
    heads, queries, keys = key.shape[1], query.shape[2], key.shape[2]
    scores = torch.einsum("bgutk,bgsk->bguts", query.unflatten(1, (heads, -1)).float(), key.float()) * scale
    columns = torch.arange(keys, device=key.device)
    hidden = columns > columns[keys - queries :, None]
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0).amax(2)


def most_important(scores: Tensor, size: int, pool: int, mask: Tensor | None) -> Tensor:
    """The columns ``(B, G, size)`` with the largest scores ``(B, G, S)``, spread over their neighbours, -1 for padding.

    Pooling makes plateaus; of equals those with the larger score of their own come first, then the earlier.
    """
    pooled = F.max_pool1d(scores, pool, 1, pool // 2) if pool > 1 else scores
    if mask is not None:
        pooled = pooled.masked_fill(~mask[:, None], -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    again = torch.sort(pooled.gather(-1, order), dim=-1, descending=True, stable=True)
    found = order.gather(-1, again.indices)[..., :size]
    return found.where(again.values[..., :size] > -torch.inf, -1)


def _choose(
    layer: RecycledLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    options: RecycledOptions,
) -> None:
    """Fills the partial cache from the whole one, after a prompt or a full step."""
    keys = key.shape[2]
    if layer.partial is None:  # a share of the prompt, not of what is generated after it
        share = options.max_partial
        layer.size = max(1, int(share * keys)) if isinstance(share, float) else share
    size = min(keys, layer.size)
    if options.mode == "recycled":
        scores = importance(query[:, :, -1:], key, mask, scale)[:, :, 0]
        places = most_important(scores, size, options.pool, mask)
        layer.reference = query[:, :, -1].mean(1)
    elif options.mode == "snapkv":
        scores = importance(query[:, :, -options.observed :], key, mask, scale).sum(2)
        places = most_important(scores, size, options.pool, mask)
    elif options.mode == "h2o":
        parts = query.split(QUERY_BLOCK, 2)
        ends = torch.tensor([part.shape[2] for part in parts]).cumsum(0).tolist()
        first, scores = keys - query.shape[2], query.new_zeros(*key.shape[:3], dtype=torch.float32)
        for part, end in zip(parts, ends):
            seen = first + end
            own = importance(part, key[:, :, :seen], None if mask is None else mask[:, :seen], scale)
            scores[..., :seen] += own.sum(2)
        places = most_important(scores, size, 1, mask)
    else:
        scores = query.new_zeros(*key.shape[:3], dtype=torch.float32)
        places = _first_and_last(scores, size, min(options.sinks, size), mask)
    places = F.pad(places, (0, layer.size + 1 - size), value=-1)
    at = places.clamp(min=0)
    layer.partial = Partial(
        key.gather(2, at[..., None].expand(-1, -1, -1, key.shape[3])),
        value.gather(2, at[..., None].expand(-1, -1, -1, value.shape[3])),
        places,
        scores.gather(2, at),
        places.argmax(-1, keepdim=True),
    )
    layer.since_check = 0


def _first_and_last(scores: Tensor, size: int, sinks: int, mask: Tensor | None) -> Tensor:
    """The first real columns and the last ones, ``(B, G, size)``, -1 where there are fewer."""
    keys = scores.shape[-1]
    start = torch.zeros_like(scores[:, 0, :1], dtype=torch.int64)
    if mask is not None:
        start = mask.int().argmax(1, keepdim=True).to(torch.int64)
    steps = torch.arange(size, device=scores.device)
    places = torch.where(steps < sinks, start + steps, keys - size + steps)
    there = torch.where(steps < sinks, places < keys, places >= start + sinks)
    return places.where(there, -1)[:, None].expand(-1, scores.shape[1], -1)


def _partial_step(
    layer: RecycledLayer, query: Tensor, key: Tensor, value: Tensor, scale: float, options: RecycledOptions
) -> Tensor:
    """The new token takes a slot, and reads the partial cache."""
    partial = layer.partial
    assert partial is not None
    empty = partial.places < 0
    if options.mode == "snapkv" and not bool(empty.any(-1).all()):  # nothing goes: there is always one slot more
        partial.keys, partial.values, partial.scores = (
            torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (partial.keys, partial.values, partial.scores)
        )
        partial.places = F.pad(partial.places, (0, 1), value=-1)
        empty = partial.places < 0
    rank = partial.scores.double().scatter(2, partial.newest, torch.inf)
    if options.mode == "streaming":  # the oldest goes that is no sink
        oldest = torch.sort(partial.places.where(~empty, 2**62), dim=-1).values[..., : options.sinks + 1]
        rank = (partial.places != oldest[..., -1:]).double()
    slot = rank.masked_fill(empty, -torch.inf).argmin(-1, keepdim=True)
    for target, source in ((partial.keys, key), (partial.values, value)):
        target.scatter_(2, slot[..., None].expand(-1, -1, -1, target.shape[3]), source[:, :, -1:])
    partial.places.scatter_(2, slot, key.shape[2] - 1)
    partial.newest = slot
    layer.counts.keys_read += partial.places.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    scores = torch.einsum("bguk,bgsk->bgus", grouped.float(), partial.keys.float()) * scale
    weights = scores.masked_fill(partial.places[:, :, None] < 0, -torch.inf).softmax(-1)
    largest = weights.amax(2)
    partial.scores = partial.scores.scatter(2, slot, 0.0) + largest if options.mode == "h2o" else largest
    output = torch.einsum("bgus,bgsv->bguv", weights.to(partial.values.dtype), partial.values)
    return output.flatten(1, 2)[:, None]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, padding_mask)
