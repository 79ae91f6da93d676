"""Models of equal size, one per mixer: the shape is chosen once, the feed-forward width makes up for the mixer."""

import math
from typing import Any

import torch

from subquad.bench.comparison.settings import CompareSettings, RecallSettings, pattern_of
from subquad.models import SubquadConfig, SubquadForCausalLM

TOLERANCE = 0.02
NARROWEST = 8  # of the feed-forward layer
WIDTHS = (16, 32, *range(64, 8192 + 1, 64))

Fields = dict[str, Any]


def matched_models(settings: CompareSettings, vocab_size: int) -> dict[str, tuple[Fields, int]]:
    """For each candidate the fields of its :class:`SubquadConfig` and its number of parameters.

    All have the same width, layers and heads, and differ in ``intermediate_size`` alone. Without a ``hidden_size`` in
    the settings, the widest that leaves every candidate a feed-forward layer is taken.

    Raises:
        ValueError: no feed-forward width brings a candidate within 2% of ``settings.parameters``; the sentence says
            what would.
    """
    widths = [settings.hidden_size] if settings.hidden_size is not None else _usual_widths(settings, vocab_size)
    for number, width in enumerate(widths):
        shape = _shape(settings, width, vocab_size)
        try:
            return {name: _matched(name, shape, settings.parameters) for name in settings.candidates}
        except _TooLargeError as error:
            if number == len(widths) - 1:
                raise ValueError(str(error)) from None
    raise AssertionError("there is always one width to try")


def count_parameters(fields: Fields) -> int:
    """Parameters of the language model with these fields, shared ones once, without making their values."""
    with torch.device("meta"):
        model = SubquadForCausalLM(SubquadConfig(**fields))
    return sum(parameter.numel() for parameter in model.parameters())


def recall_model(name: str, recall: RecallSettings) -> Fields:
    """The fields of the small model that a candidate learns the recall test with."""
    return {
        "mixers": name,
        "vocab_size": recall.vocab_size,
        "hidden_size": recall.hidden_size,
        "num_hidden_layers": max(2, len(pattern_of(name))),
        "num_attention_heads": recall.heads,
        "intermediate_size": 2 * recall.hidden_size,
    }


class _TooLargeError(Exception):
    pass


def _shape(settings: CompareSettings, width: int, vocab_size: int) -> Fields:
    longest = max(len(pattern_of(name)) for name in settings.candidates)
    layers = settings.layers if settings.layers is not None else max(_usual_layers(width), longest)
    if layers < longest:
        pattern = max(settings.candidates, key=lambda name: len(pattern_of(name)))
        raise ValueError(f"the pattern {pattern!r} spans {longest} layers; the models have {layers}")
    heads = settings.heads if settings.heads is not None else max(2, width // 64)
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max(settings.context, *settings.contexts),
    }


def _usual_layers(width: int) -> int:
    return max(2, width // 48)


def _usual_widths(settings: CompareSettings, vocab_size: int) -> list[int]:
    """Widths to try, the largest first: those at which a Transformer's layers, 12 D^2 each, do not exceed the size."""

    def size(width: int) -> int:
        shape = _shape(settings, width, vocab_size)
        return 12 * width**2 * int(shape["num_hidden_layers"]) + vocab_size * width

    return [width for width in reversed(WIDTHS) if size(width) <= 1.05 * settings.parameters] or [WIDTHS[0]]


def _matched(name: str, shape: Fields, target: int) -> tuple[Fields, int]:
    fields = {**shape, "mixers": name}

    def count(width: int) -> int:
        try:
            return count_parameters({**fields, "intermediate_size": width})
        except ValueError as error:
            raise ValueError(f"{name} does not fit this model: {error}") from error

    least, more = count(NARROWEST), count(2 * NARROWEST)
    per_unit = (more - least) / NARROWEST
    width = max(NARROWEST, NARROWEST + math.floor((target - least) / per_unit + 0.5))
    parameters = count(width)
    if abs(parameters / target - 1) <= TOLERANCE:
        return {**fields, "intermediate_size": width}, parameters
    size = f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}"
    if parameters > target:
        raise _TooLargeError(
            f"{name} cannot be made with {target:,} parameters: {size} take at least {least:,} even with the narrowest "
            "feed-forward layer; ask for more parameters, a smaller hidden_size or fewer layers"
        )
    raise ValueError(
        f"{name} cannot be matched to {target:,} parameters within {TOLERANCE:.0%}: with {size} the nearest is "
        f"{parameters:,}; ask for more parameters"
    )
