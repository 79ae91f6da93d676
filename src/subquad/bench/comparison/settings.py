"""The settings of a comparison: one frozen record, checked when it is made."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from subquad.evaluation.report import listed
from subquad.mixers import Pattern, mixer_class
from subquad.models.config import expand_mixers

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384)
DEFAULT_BUDGET = 300.0
LONGEST_PATTERN = 128  # layers


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """The recall test: multi-query associative recall (Arora et al. 2023), learnt by a small model of its own.

    Args:
        steps: at most so many optimizer steps; a budget may leave fewer, the same number for every mixer.
        batch_size: rows per step.
        learning_rates: each is tried on the first seed; the best goes on with the other seeds.
        vocab_size, length, num_pairs: of ``tasks.Mqar``.
        hidden_size, heads: width and heads of the model, which has two layers (a hybrid: one of each of its pattern).
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    vocab_size: int = 32
    length: int = 24
    num_pairs: int = 4
    hidden_size: int = 64
    heads: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "vocab_size", "length", "num_pairs", "hidden_size", "heads"):
            _check_integer(f"recall's {name}", getattr(self, name), 1)
        object.__setattr__(self, "learning_rates", _numbers("recall's learning_rates", self.learning_rates))


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What is compared, and at what size.

    Args:
        mixers: names of ``mixers.available()``.
        hybrids: patterns over the layers, such as ``"gla*3+softmax"``; each is one more candidate.
        context: tokens per training row.
        budget: seconds for the whole comparison; None: as long as ``tokens`` need. With neither, 300 seconds.
        tokens: training tokens of every model, at most; None: what the budget allows. All models see equally many.
        parameters: of every model, met within 2% by the width of the feed-forward layers.
        hidden_size, layers, heads: of every model; None: a usual shape for this number of parameters.
        seeds: one model per mixer and seed; two or more show what is chance.
        batch_size: rows per step.
        learning_rates: peaks that are tried on the first seed, the same for every mixer.
        sweep_fraction: length of a try, as a share of the whole training.
        weight_decay: AdamW's.
        contexts: ascending lengths at which reading, writing and memory are measured.
        decode_tokens: tokens written at each of them.
        recall: the recall test; None leaves it out.
        threads: torch threads of each training. Results depend on it in the last bits; on ``workers`` they do not.
        workers: trainings side by side; None: as many as the processor has room for.

    Raises:
        ValueError, TypeError: an unknown mixer (the nearest are named), contexts that do not ascend, and whatever else
            does not fit, in one sentence.

    Example:
        >>> CompareSettings(mixers=("softmax",), hybrids=("gla*3+softmax",)).candidates
        ('softmax', 'gla*3+softmax')
    """

    mixers: tuple[str, ...]
    hybrids: tuple[str, ...] = ()
    context: int = 512
    budget: float | None = None
    tokens: int | None = None
    parameters: int = 2_000_000
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    sweep_fraction: float = 1 / 3
    weight_decay: float = 0.1
    contexts: tuple[int, ...] = CONTEXTS
    decode_tokens: int = 16
    recall: RecallSettings | None = field(default_factory=RecallSettings)
    threads: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("mixers", "hybrids"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        self._check_candidates()
        for name in ("context", "batch_size", "parameters", "decode_tokens", "threads"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("hidden_size", "layers", "heads", "tokens", "workers"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.budget is None and self.tokens is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        if self.budget is not None:
            object.__setattr__(self, "budget", _number("budget", self.budget))
        object.__setattr__(self, "learning_rates", _numbers("learning_rates", self.learning_rates))
        if not 0 < _number("sweep_fraction", self.sweep_fraction) <= 1:
            raise ValueError(f"sweep_fraction must lie in (0, 1]; got {self.sweep_fraction}")
        _number("weight_decay", self.weight_decay, zero=True)
        object.__setattr__(self, "seeds", _integers("seeds", self.seeds, 0))
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from one another; got {list(self.seeds)}")
        object.__setattr__(self, "contexts", _integers("contexts", self.contexts, 1))
        if list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must ascend, each longer than the one before; got {list(self.contexts)}")
        if self.tokens is not None and self.tokens < 4 * self.tokens_per_step:
            raise ValueError(
                f"tokens must be at least 4 steps of batch_size x context = {self.tokens_per_step:,}; "
                f"got {self.tokens:,}"
            )

    @classmethod
    def demo(cls, **changes: Any) -> "CompareSettings":
        """Four mixers at a size that two cores finish in under five minutes, kernel compilation included.

        Example:
            >>> CompareSettings.demo(seeds=(0,)).mixers
            ('softmax', 'gla', 'delta_net', 'retention')
        """
        usual: dict[str, Any] = {
            "mixers": ("softmax", "gla", "delta_net", "retention"),
            "context": 256,
            "budget": 270.0,
            "tokens": 300 * 8 * 256,
            "parameters": 127_000,
            "hidden_size": 64,
            "layers": 2,
            "recall": RecallSettings(steps=240),
        }
        return cls(**{**usual, **changes})

    @property
    def candidates(self) -> tuple[str, ...]:
        """Everything that is compared: the mixers, then the hybrids."""
        return self.mixers + self.hybrids

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()} | {
            "recall": None
            if self.recall is None
            else {**plain["recall"], "learning_rates": list(self.recall.learning_rates)}
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "CompareSettings":
        """The settings that :meth:`to_dict` gave."""
        recall = None if plain["recall"] is None else RecallSettings(**plain["recall"])
        return cls(**{**plain, "recall": recall})

    def _check_candidates(self) -> None:
        if not self.candidates:
            raise ValueError("name at least one mixer to compare")
        for name in self.mixers:
            _check_causal(name)
        for pattern in self.hybrids:
            entries = pattern_of(pattern)
            for entry in entries:
                _check_causal(entry)
            if len(set(entries)) < 2:
                raise ValueError(f"a hybrid mixes at least two mixers, as 'gla*3+softmax' does; got {pattern!r}")
        twice = sorted({name for name in self.candidates if self.candidates.count(name) > 1})
        if twice:
            raise ValueError(f"every mixer is compared once; {listed(twice)} stands in the list more than once")


def _check_causal(name: str) -> None:
    patterns = mixer_class(name).patterns
    if Pattern.CAUSAL_SELF not in patterns:
        raise ValueError(
            f"a comparison trains causal language models, and mixer {name!r} has no causal form; "
            f"it serves {', '.join(sorted(patterns))}"
        )


def pattern_of(text: str) -> list[str]:
    """The shortest list of mixers that ``text`` repeats over the layers.

    Raises:
        ValueError: a text that is no pattern.

    Example:
        >>> pattern_of("gla*3+softmax")
        ['gla', 'gla', 'gla', 'softmax']
    """
    entries = [str(entry) for entry in expand_mixers(text, 2 * LONGEST_PATTERN)]
    for period in range(1, LONGEST_PATTERN + 1):
        if all(entry == entries[i % period] for i, entry in enumerate(entries)):
            return entries[:period]
    raise ValueError(f"a pattern spans at most {LONGEST_PATTERN} layers; {text!r} spans more")


def _names(what: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{what} must be a list of names; got {value!r}")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} must be a list of names; it holds {name!r}")
    return names


def _check_integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def _number(name: str, value: Any, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}; got {value}")
    return float(value)


def _several(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of numbers; got {value!r}")
    values = list(value)
    if not values:
        raise ValueError(f"{name} must hold at least one number")
    return values


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    return tuple(sorted({_number(name, each) for each in _several(name, value)}))


def _integers(name: str, value: Any, least: int) -> tuple[int, ...]:
    return tuple(_check_integer(name, each, least) for each in _several(name, value))
