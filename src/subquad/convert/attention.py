"""The converted attention layer: the source's own module, with another attention function between its projections.

The module keeps its class's code for projections, norms and positions: a subclass of that class lets the code run with
positions that turn nothing, takes queries and keys as they are, turns them itself with the family's own function, and
gives both to an :class:`~subquad.mixers.cores.AttentionCore`. Weights keep their names; those of a core are added under
``subquad.``. The source's attention stays at hand for layer-wise training, on the same weights.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from subquad.convert.sites import FAMILIES, Site, as_heads
from subquad.mixers.cores import AttentionCore, Heads
from subquad.models.cache import StateLayer

IMPLEMENTATION = "subquad_converted"
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # what families and versions call it
LAYOUT = "subquad_layout"

Observer = Callable[["ConvertedAttention", Heads, "Layout", Tensor], None]


class Layout(NamedTuple):
    """Which tokens of a batch are real, and where packed sequences begin."""

    mask: Tensor | None = None  # (B, T) bool over the current tokens; None: all are real
    cu_seqlens: Tensor | None = None  # (N + 1,)


class Call(NamedTuple):
    """What a converted layer gives to its attention function beside queries, keys and values."""

    layout: Layout
    layer: StateLayer | None
    positions: tuple[Tensor, Tensor] | None  # cos and sin


class ConvertedAttention:
    """Mixed in before the class of a source's attention; see :func:`install`.

    Attributes:
        subquad: the core.
        observer: while it is set, the source's own attention runs, and the observer is told what it saw and gave.
    """

    subquad: AttentionCore
    observer: Observer | None
    source_config: Any
    family: str
    scaling: float
    layer_idx: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
        cache = next((value for value in found if value is not None), None)
        layout = kwargs.pop(LAYOUT, None) or Layout()
        if self.observer is not None and cache is not None:
            raise ValueError("the source's attention is observed without a cache: use_cache=False")
        layer = None if cache is None else state_layer(cache, self.layer_idx)
        positions = kwargs.get("position_embeddings")
        if positions is not None:  # turn nothing in there: queries and keys are wanted as they are, too
            cos, sin = positions
            kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        call = Call(layout, layer, positions)
        return super().forward(hidden_states, *args, subquad_call=call, **kwargs)  # type: ignore[misc]

    def heads(self, query: Tensor, key: Tensor, value: Tensor, positions: tuple[Tensor, Tensor] | None) -> Heads:
        """Queries, keys and values as the source made them, ``(B, H, T, K)``, without positions."""
        if FAMILIES[self.family].scaled_queries:
            query = query / self.scaling
        turned = (query, key)
        if positions is not None:
            turned = self._module().apply_rotary_pos_emb(query, key, *positions)
        q, k, v = (as_heads(x) for x in (query, key, value))
        q_turned, k_turned = (q, k) if positions is None else map(as_heads, turned)
        return Heads(q, k, v, q_turned, k_turned, self.scaling)

    def source_attention(self, heads: Heads, attention_mask: Tensor | None, **options: Any) -> Tensor:
        """What the source's own attention function gives, ``(B, T, H, V)``."""
        eager = self._module().eager_attention_forward
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.source_config._attn_implementation, eager)
        q, k, v = (as_heads(x) for x in (heads.q_turned, heads.k_turned, heads.v))
        output: Tensor = function(self, q, k, v, attention_mask, scaling=heads.scale, **options)[0]
        return output

    def _module(self) -> Any:
        return FAMILIES[self.family].modeling


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function of converted layers, as transformers calls it."""
    call: Call = options.pop("subquad_call")
    options.pop("scaling", None)
    heads = module.heads(query, key, value, call.positions)
    if module.observer is not None:
        output = module.source_attention(heads, attention_mask, **options)
        module.observer(module, heads, call.layout, output)
        return output, None
    layer = call.layer
    output, state = module.subquad(
        heads,
        mask=call.layout.mask,
        cu_seqlens=call.layout.cu_seqlens,
        state=None if layer is None else layer.state,
        use_state=layer is not None,
    )
    if layer is not None:
        layer.store(state, query.shape[2])
    return output, None


AttentionInterface.register(IMPLEMENTATION, _attend)


def state_layer(cache: Any, index: int) -> StateLayer:
    """The place of layer ``index`` in a cache, made to hold a core's state.

    Raises:
        TypeError: it already holds keys and values.
    """
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        if layer.is_initialized:
            raise TypeError(
                f"layer {index} of the cache is a {type(layer).__name__} that is already in use; a converted model "
                "begins with a new DynamicCache, or with none"
            )
        layer = cache.layers[index] = StateLayer()
    return layer


@functools.cache
def converted_class(source: type[nn.Module]) -> type[nn.Module]:
    """The converted form of an attention class; it can be pickled by its name here."""
    return type(
        f"Converted{source.__name__}",
        (ConvertedAttention, source),
        {"__module__": __name__, "__doc__": f"{source.__name__} around another attention function."},
    )


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == f"Converted{family.attention}":
            return converted_class(getattr(family.modeling, family.attention))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install(site: Site, core: AttentionCore) -> None:
    """Lets ``core`` attend at ``site``, in place. The module's class changes, so weights, buffers and hooks stay."""
    module: Any = site.module
    module.source_config = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = IMPLEMENTATION
    module.family, module.observer = site.family.name, None
    module.__class__ = converted_class(type(module))
    if getattr(module, "layer_idx", None) is None:
        module.layer_idx = site.layer
    module.subquad = core


def converted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the layers of ``model`` that are converted."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ConvertedAttention)]


def parts_of_cores(model: Any) -> list[nn.Module]:
    """All modules inside the cores of a converted model, the cores themselves included."""
    return [part for _, layer in converted_layers(model) for part in layer.subquad.modules()]


@contextmanager
def as_source(model: nn.Module, observer: Observer | None = None) -> Iterator[None]:
    """While it lasts the model computes what its source does, and each layer tells ``observer`` what it saw.

    Caches cannot be used meanwhile.
    """
    modules = [module for _, module in converted_layers(model)]
    before = [module.observer for module in modules]
    try:
        for module in modules:
            module.observer = observer or _ignore
        yield
    finally:
        for module, earlier in zip(modules, before):
            module.observer = earlier


def _ignore(module: ConvertedAttention, heads: Heads, layout: Layout, output: Tensor) -> None:
    pass


def give_layout(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of the base model: what its mask and positions say of each token, for the converted layers.

    Raises:
        ValueError: a mask that is not ``(batch, time)``.
    """
    given = {**dict(zip(_argument_names(type(model)), args)), **kwargs}
    x = given.get("input_ids")
    x = given.get("inputs_embeds") if x is None else x
    if x is None:
        return args, kwargs
    mask, positions, bounds = given.get("attention_mask"), given.get("position_ids"), given.get("cu_seq_lens_q")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(
                f"a converted model takes attention_mask as (batch, time); it has shape {tuple(mask.shape)}"
            )
        mask = mask[:, -x.shape[1] :] != 0
        mask = None if bool(mask.all()) else mask
    if bounds is None and mask is None and positions is not None and x.shape[0] == 1:
        starts = torch.nonzero(positions[0] == 0).flatten()
        if len(starts) > 1:
            bounds = torch.cat([starts, starts.new_tensor([x.shape[1]])])
    return args, {**kwargs, LAYOUT: Layout(mask, bounds)}


@functools.cache
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    function = inspect.unwrap(kind.forward)
    return tuple(inspect.signature(function).parameters)[1:]
