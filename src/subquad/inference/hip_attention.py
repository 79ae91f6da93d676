"""HiP on the weights of any transformers causal language model (Lee et al. 2024, "HiP attention").

It is an attention implementation like "sdpa": long prompts are read with a few keys per query, and tokens are generated
over blocks of keys that are searched anew every few steps. Nothing is trained and no weight changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
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
from subquad.ops import block_sparse_attention, hip_mask, softmax_attention

NAME = "subquad_hip"
SAVED_AS = "subquad_hip"  # in the model's config


@dataclass(frozen=True)
class HipOptions:
    """What HiP does in a model; saved in its config.

    Attributes:
        budget: keys that are searched for and chosen, per block of queries; a multiple of block_k.
        dense_layers: layers that keep their own attention, -1 being the last.
        refresh: tokens that are generated over one choice.
        block_q, block_k, window, sinks, query_stride, representative, shared: see :func:`subquad.ops.hip_attention`;
            single tokens are blocks of their own.
        backend: of the ops.
    """

    budget: int = 512
    dense_layers: tuple[int, ...] = (0, 1, 2)
    refresh: int = 8
    block_q: int = 32
    block_k: int = 2
    window: int = 256
    sinks: int = 16
    query_stride: int = 2
    representative: str = "center"
    shared: bool = False
    backend: str = "auto"


class HipCacheLayer(GrowingLayer):
    """Keys and values of one layer, and the blocks of keys that the last tokens went to."""

    def __init__(self) -> None:
        super().__init__()
        self.choice: tuple[Tensor, Tensor] | None = None
        self.steps = 0

    def forget(self) -> None:
        """The next token searches: rows have moved, or tokens are gone."""
        self.choice, self.steps = None, 0

    def reset(self) -> None:
        self.forget()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.forget()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.forget()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.forget()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.forget()
        super().batch_select_indices(indices)


class HipModel:
    """A model whose attention is HiP's, as :func:`hip` returns it; a context manager that undoes it at the end.

    Attributes:
        model: the model itself, which is used as before.
        options: in force.
    """

    def __init__(self, model: PreTrainedModel, options: HipOptions, attentions: list[nn.Module]) -> None:
        self.model, self.options, self._attentions = model, options, attentions
        self._previous = model.config._attn_implementation
        count = len(attentions)
        dense = {layer % count for layer in options.dense_layers}
        for number, attention in enumerate(attentions):
            attention._subquad_hip = _Layer(options, number in dense)
        give_caches(model, HipCacheLayer)
        setattr(model.config, SAVED_AS, {**asdict(options), "dense_layers": list(options.dense_layers)})
        model.set_attn_implementation(NAME)

    def undo(self) -> None:
        """The model computes as before :func:`hip`. A second call changes nothing."""
        if "_prepare_cache_for_generation" not in vars(self.model):
            return
        take_caches(self.model)
        delattr(self.model.config, SAVED_AS)
        for attention in self._attentions:
            del attention._subquad_hip
        self.model.set_attn_implementation(self._previous)

    def __enter__(self) -> "HipModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    @torch.no_grad()
    def recall(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[float | None]:
        """Per layer, the share of its own attention's mass that falls on the keys HiP reads, mean over all queries.

        None for layers that keep their own attention. What a layer reads comes from the layers before it, HiP included.
        Costs dense attention in every layer.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 1 = a real token.
        """
        with self._measuring() as layers:
            self.model(input_ids, attention_mask=attention_mask, use_cache=False)
            return [sum(layer.found) / len(layer.found) if layer.found else None for layer in layers]

    @contextmanager
    def _measuring(self) -> Iterator[list["_Layer"]]:
        layers = [attention._subquad_hip for attention in self._attentions]
        for layer in layers:
            layer.measures, layer.found = True, []
        try:
            yield layers
        finally:
            for layer in layers:
                layer.measures, layer.found = False, []


class _Layer:
    """What one attention module knows of HiP."""

    def __init__(self, options: HipOptions, dense: bool) -> None:
        self.options, self.dense = options, dense
        self.measures = False
        self.found: list[float] = []


def hip(model: PreTrainedModel, **options: Any) -> HipModel:
    """Sets HiP as the attention of ``model``: for prompts, generation (``generate`` as ever) and training.

    Layers with a mask of their own that is more than causal (sliding windows, packed sequences) keep their attention.
    The options are kept in the model's config, are saved with it, and are the defaults of the next call.

    Args:
        model: a transformers causal language model whose attention can be chosen (Llama, Qwen, Mistral, Gemma, ...).
        options: those of :class:`HipOptions` to change.

    Returns:
        A handle with ``undo()`` and ``recall()``; as a context manager it undoes at the end.

    Raises:
        ValueError, TypeError: an unknown option or one out of range, a model without such attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> with hip(model, budget=8, window=8, block_q=8, sinks=2, dense_layers=()):
        ...     model.generate(torch.arange(40)[None], max_new_tokens=4, pad_token_id=0).shape
        torch.Size([1, 44])
    """
    attentions = attention_layers(model)
    known = {field.name for field in fields(HipOptions)}
    unknown = set(options) - known
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {', '.join(sorted(known))}")
    saved = dict(getattr(model.config, SAVED_AS, {}))
    chosen = replace(HipOptions(), **{**saved, **options})
    chosen = replace(chosen, dense_layers=tuple(chosen.dense_layers))
    _check(chosen, len(attentions))
    return HipModel(model, chosen, attentions)


def _check(options: HipOptions, layers: int) -> None:
    for layer in options.dense_layers:
        if not isinstance(layer, int) or not -layers <= layer < layers:
            raise ValueError(f"dense_layers must be layers of the model's {layers}; got {options.dense_layers}")
    if not isinstance(options.refresh, int) or options.refresh < 1:
        raise ValueError(f"refresh must be an integer >= 1; got {options.refresh!r}")
    x = torch.zeros(1, 1, 1, 1)
    sizes = {"block_q": options.block_q, "block_k": options.block_k, "window": options.window}
    search = {"query_stride": options.query_stride, "representative": options.representative}
    indices, counts = hip_mask(x, x, budget=options.budget, shared=options.shared, **sizes, **search)
    block_sparse_attention(x, x, x, indices, counts, sinks=options.sinks, backend=options.backend, **sizes)


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
    """HiP under the signature of transformers' attention functions: ``(B, H, T, K)`` in, ``(B, T, H, V)`` out."""
    layer: _Layer | None = getattr(module, "_subquad_hip", None)
    if layer is None:
        raise ValueError(f"attention {NAME!r} is set up by subquad.inference.hip(model), not by its name alone")
    options, queries, mask = layer.options, query.shape[2], attention_mask
    more_than_causal = mask is not None and mask.ndim == 4
    if layer.dense or more_than_causal or key.shape[2] <= options.window + options.budget:
        return full_attention(module, query, key, value, mask, dropout, scaling)
    hip_layer = cache_layer if isinstance(cache_layer, HipCacheLayer) else None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    block_q = 1 if queries == 1 else options.block_q
    sizes = {"block_q": block_q, "block_k": options.block_k, "window": options.window, "mask": mask}
    if hip_layer is not None and queries > 1:
        hip_layer.forget()
    choice = None if hip_layer is None or hip_layer.steps >= options.refresh else hip_layer.choice
    if choice is None:
        choice = hip_mask(
            q,
            k,
            budget=options.budget,
            query_stride=options.query_stride,
            representative=options.representative,
            shared=options.shared,
            backend=options.backend,
            **sizes,
        )
        if hip_layer is not None and queries == 1:
            hip_layer.choice, hip_layer.steps = choice, 0
    if hip_layer is not None:
        hip_layer.steps += 1
    o, _, *mass = block_sparse_attention(
        q,
        k,
        v,
        *choice,
        sinks=options.sinks,
        scale=scaling,
        return_log_sum_exp=layer.measures,
        backend=options.backend,
        **sizes,
    )
    if layer.measures:
        layer.found.append(_share(q, k, mask, mass[0], scaling))
    return o, None


def _share(q: Tensor, k: Tensor, mask: Tensor | None, mass: Tensor, scale: float | None) -> float:
    """How much of the whole softmax's mass the log-sum-exps ``(B, T, H)`` hold, mean over real queries of a prompt."""
    _, _, whole = softmax_attention(q, k, k, mask=mask, scale=scale, return_log_sum_exp=True)  # type: ignore[misc]
    real = mass > -torch.inf
    return float((mass[real] - whole[real]).exp().mean())


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, padding_mask)
