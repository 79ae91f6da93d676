"""Where attention sits in pretrained models: the families that can be converted, and the sites of one model.

All families compute queries, keys and values in their own way (fused or not, with norms, biases, full, partial or no
rotary positions) and hand them to one attention function. A conversion replaces that function and leaves the rest as it
is, so a family is only a few names.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Family:
    """A source family of transformers.

    Attributes:
        name: its ``model_type``.
        stem: what its classes' names begin with.
        attention: the class of its self-attention modules.
        projections: names of the linear layers of q, k, v and o inside such a module; a fused layer comes several
            times. An output projection may lie outside (BERT).
        models: classes that can be converted, by the Auto class that loads them.
        causal: whether tokens see earlier tokens only.
        scaled_queries: whether queries reach the attention function already multiplied by the scale.
    """

    name: str
    stem: str
    attention: str
    projections: tuple[str, str, str, str]
    models: tuple[tuple[str, str], ...]
    causal: bool = True
    scaled_queries: bool = False

    @property
    def modeling(self) -> Any:
        """The modeling module of transformers."""
        return importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")

    @property
    def config_class(self) -> type[Any]:
        """The configuration class of transformers; the modeling code is not loaded for it."""
        module = importlib.import_module(f"transformers.models.{self.name}.configuration_{self.name}")
        kind: type[Any] = getattr(module, f"{self.stem}Config")
        return kind


def _decoder(name: str, stem: str, *, attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Family:
    models = (("AutoModel", f"{stem}Model"), ("AutoModelForCausalLM", f"{stem}ForCausalLM"))
    return Family(name, stem, f"{stem}Attention", attention, models)  # type: ignore[arg-type]


def _encoder(name: str, stem: str) -> Family:
    heads = {
        "AutoModel": "Model",
        "AutoModelForMaskedLM": "ForMaskedLM",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
    }
    models = tuple((auto, stem + head) for auto, head in heads.items())
    return Family(name, stem, f"{stem}SelfAttention", ("query", "key", "value", "output.dense"), models, causal=False)


FAMILIES = {
    family.name: family
    for family in (
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _decoder("phi3", "Phi3", attention=("qkv_proj", "qkv_proj", "qkv_proj", "o_proj")),
        _decoder("gemma", "Gemma"),
        Family(
            "gpt2",
            "GPT2",
            "GPT2Attention",
            ("c_attn", "c_attn", "c_attn", "c_proj"),
            (("AutoModel", "GPT2Model"), ("AutoModelForCausalLM", "GPT2LMHeadModel")),
        ),
        _decoder("gpt_neox", "GPTNeoX", attention=("query_key_value", "query_key_value", "query_key_value", "dense")),
        Family(
            "opt",
            "OPT",
            "OPTAttention",
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            (("AutoModel", "OPTModel"), ("AutoModelForCausalLM", "OPTForCausalLM")),
            scaled_queries=True,
        ),
        _encoder("bert", "Bert"),
        _encoder("roberta", "Roberta"),
    )
}

NOT_CONVERTED = {
    "bloom": "its attention adds ALiBi biases, which no recipe reproduces",
    "mpt": "its attention adds ALiBi biases, which no recipe reproduces",
    "falcon": "its attention may add ALiBi biases, which no recipe reproduces",
    "t5": "its attention adds relative-position biases, and it is an encoder-decoder",
    "bart": "it is an encoder-decoder",
    "gpt_neo": "its layers alternate between whole and local attention with one shared mask",
}


@dataclass(frozen=True)
class Site:
    """One attention layer of a model.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        layer: its number.
        module: the attention module.
        num_heads, num_key_value_heads, head_dim: H, G, K.
        scale: of the scores.
        sliding_window: tokens that the source itself sees here; None: all.
        family: of the model.
    """

    name: str
    layer: int
    module: nn.Module
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    family: Family

    @property
    def causal(self) -> bool:
        return self.family.causal

    @cached_property
    def kept_bytes_per_token(self) -> int:
        """What the source keeps of every token here while it generates: a key and a value per head."""
        element = next(self.module.parameters()).element_size()
        return 2 * self.num_key_value_heads * self.head_dim * element


def family_of(model: Any) -> Family:
    """The family of a transformers model or configuration.

    Raises:
        ValueError: one that cannot be converted; the message names those that can.
    """
    config = getattr(model, "config", model)
    name = str(getattr(config, "model_type", type(model).__name__)).removeprefix("subquad_")
    if name == "subquad":
        raise ValueError(
            "this is a Subquad model, whose mixers are chosen when it is made: there is nothing to convert"
        )
    if name not in FAMILIES:
        reason = NOT_CONVERTED.get(name, "its attention is not known here")
        raise ValueError(f"models of family {name!r} are not converted: {reason}; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def find_sites(model: nn.Module) -> list[Site]:
    """The attention layers of a model, in order.

    Raises:
        ValueError: a family that cannot be converted, or a model without attention.
    """
    family = family_of(model)
    config: Any = model.config
    if getattr(config, "is_decoder", False) and not family.causal:
        raise ValueError(f"{family.name} with is_decoder=True is not converted: only its encoder form is")
    if getattr(config, "quantization_config", None):
        raise ValueError("quantised weights cannot be adapted and merged: load the model without quantisation")
    kind = getattr(family.modeling, family.attention)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(f"this {type(model).__name__} has no {family.attention}: there is nothing to convert")
    return [_site(name, layer, module, config, family) for layer, (name, module) in enumerate(modules)]


def _site(name: str, layer: int, module: Any, config: Any, family: Family) -> Site:
    heads = config.num_attention_heads
    width = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    window = None
    types = getattr(config, "layer_types", None)
    if types is None or types[layer] == "sliding_attention":
        window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Site(name, layer, module, heads, groups, int(width), float(module.scaling), window, family)


def choose_layers(count: int, layers: str | Sequence[int]) -> list[int]:
    """Numbers of the layers to convert, of ``count``.

    Args:
        layers: ``"all"``; ``"every:n"``: all but every n-th, which stays softmax (n - 1, 2 n - 1, ...); or numbers.

    Raises:
        ValueError: an unknown word, a number outside the model, or no layer.

    Example:
        >>> choose_layers(8, "every:4"), choose_layers(3, [0, -1])
        ([0, 1, 2, 4, 5, 6], [0, 2])
    """
    if isinstance(layers, str):
        if layers == "all":
            return list(range(count))
        word, _, number = layers.partition(":")
        if word == "every" and number.isdigit() and int(number) >= 2:
            return [layer for layer in range(count) if (layer + 1) % int(number)]
        raise ValueError(f"layers must be 'all', 'every:n' with n >= 2, or numbers; got {layers!r}")
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not list(layers):
        raise ValueError(f"layers must name some of the model's {count} (0 to {count - 1}); got {list(layers)}")
    return sorted({layer % count for layer in layers})


def as_heads(x: Tensor) -> Tensor:
    """``(B, H, T, K)`` of transformers as ``(B, T, H, K)``."""
    return x.transpose(1, 2)
