"""The configuration of Subquad's language models: an ordinary transformers configuration with a mixer per layer."""

import difflib
import re
from dataclasses import fields
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from subquad.layers.registry import unknown_name
from subquad.models.presets import PRESETS

POSITIONS = ("rope", "sinusoidal", "learned", "none")
MixerEntry = str | dict[str, Any]


class SubquadConfig(PreTrainedConfig):
    """Configuration of a language model.

    Field names are those of transformers. Beyond them:

    Attributes:
        mixers: the token mixer of each layer: one name for all (``"gla"``); a pattern repeated over the layers
            (``"gla*3+softmax"``), or the same as ``{"pattern": [entries]}``; a list with an entry per layer; or a
            division of the layers by place, ``{"first": ..., "rest": ...}`` or ``{"first_half": ...,
            "second_half": ...}`` (of an odd number the first half is the smaller). An entry is a name, or a name and
            options, ``{"name": "gla", "expand_k": 1}``. It is kept as the list.
        feedforward: the channel mixer by name, or None for none.
        positions: ``"rope"`` (inside softmax attention), ``"sinusoidal"``, ``"learned"`` (added to the embeddings) or
            ``"none"``. Retention turns its queries and keys in any case.
        norm, norm_place: of the blocks; see :class:`subquad.blocks.Block`.
        causal: False for a masked (bidirectional) model.
        scale_embeddings: multiply embeddings by ``sqrt(hidden_size)``.
        prefix_lm: ``generate`` reads the prompt as a prefix, in both directions, in the layers that serve it.

    Example:
        >>> SubquadConfig(mixers="gla*2+softmax", num_hidden_layers=4).mixers
        ['gla', 'gla', 'softmax', 'gla']
    """

    model_type = "subquad"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (transformers declares it so)

    vocab_size: int = 259
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    mixers: str | list | dict = "softmax"
    feedforward: str | None = "swiglu"
    positions: str = "rope"
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_place: str = "pre"
    rms_norm_eps: float = 1e-6
    causal: bool = True
    scale_embeddings: bool = False
    prefix_lm: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = [f.name for f in fields(self)]
        for name in kwargs:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near:
                raise ValueError(f"unknown configuration field {name!r}; did you mean {near[0]!r}?")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.positions not in POSITIONS:
            raise unknown_name("positions", self.positions, POSITIONS)
        if self.intermediate_size is None:  # SwiGLU's share of parameters, rounded up to 64
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 64) * 64
        self.mixers = [_as_saved(entry) for entry in expand_mixers(self.mixers, self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "SubquadConfig":
        """A published configuration by name, with fields replaced by ``overrides``.

        Raises:
            ValueError: an unknown name; the message lists the nearest.

        Example:
            >>> SubquadConfig.preset("transnormer_llm_385m").hidden_size
            1024
        """
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})


def expand_mixers(mixers: Any, layers: int) -> list[MixerEntry]:
    """One entry per layer from any of the forms that :class:`SubquadConfig` takes.

    Raises:
        ValueError: a list of another length, a pattern that does not parse, a division without its two keys.

    Example:
        >>> expand_mixers({"first_half": "a", "second_half": "b"}, 3)
        ['a', 'b', 'b']
    """
    if isinstance(mixers, str):
        pattern = _parse(mixers)
        return [pattern[i % len(pattern)] for i in range(layers)]
    if isinstance(mixers, dict):
        keys = set(mixers)
        if "name" in keys:
            return [dict(mixers) for _ in range(layers)]
        if keys == {"first", "rest"}:
            return [mixers["first"], *[mixers["rest"]] * (layers - 1)]
        if keys == {"first_half", "second_half"}:
            return [mixers["first_half"]] * (layers // 2) + [mixers["second_half"]] * (layers - layers // 2)
        if keys == {"pattern"} and isinstance(mixers["pattern"], list | tuple) and mixers["pattern"]:
            entries = mixers["pattern"]
            return expand_mixers([entries[i % len(entries)] for i in range(layers)], layers)
        raise ValueError(
            "mixers as a dict is one mixer {'name': ..., options}, {'first', 'rest'}, {'first_half', 'second_half'} or "
            f"{{'pattern': [entries]}}; got the keys {sorted(keys)}"
        )
    if isinstance(mixers, list | tuple):
        if len(mixers) != layers:
            raise ValueError(f"mixers has {len(mixers)} entries for {layers} layers")
        for entry in mixers:
            if not isinstance(entry, str) and not (isinstance(entry, dict) and "name" in entry):
                raise ValueError(f"an entry of mixers is a name, or a dict with 'name' and options; got {entry!r}")
        return list(mixers)
    raise ValueError(f"mixers must be a name, a pattern, a list or a dict; got {type(mixers).__name__}")


def _parse(pattern: str) -> list[str]:
    names: list[str] = []
    for part in pattern.split("+"):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\*\s*(\d+))?\s*", part)
        if match is None or match[2] == "0":
            raise ValueError(f"a pattern of mixers reads like 'gla*3+softmax'; cannot read {part!r} in {pattern!r}")
        names += [match[1]] * int(match[2] or 1)
    return names


def _as_saved(entry: MixerEntry) -> MixerEntry:
    """The entry as it comes back from a JSON file: tuples become lists."""
    if isinstance(entry, str):
        return entry
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
