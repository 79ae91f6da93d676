"""From a mixer's name to the mixer."""

import inspect
from typing import Any

from subquad.catalog import MIXERS
from subquad.layers.registry import load, unknown_name
from subquad.mixers.contract import Mixer, Pattern


def available(pattern: str | None = None) -> list[str]:
    """The names of all mixers, in alphabetical order.

    Args:
        pattern: only of those that serve this use, such as ``"causal self-attention"``
            (:class:`subquad.mixers.Pattern`): what a causal language model can be made of.

    Raises:
        ValueError: an unknown use; the message lists the nearest.

    Example:
        >>> "inline" in available(), "inline" in available(Pattern.CAUSAL_SELF)
        (True, False)
    """
    if pattern is None:
        return sorted(MIXERS)
    if pattern not in list(Pattern):
        raise unknown_name("use of a mixer", pattern, [str(known) for known in Pattern])
    return [name for name in sorted(MIXERS) if pattern in mixer_class(name).patterns]


def mixer_class(name: str) -> type[Mixer]:
    """The class called ``name``.

    Raises:
        ValueError: an unknown name; the message lists the nearest.
    """
    if name not in MIXERS:
        raise unknown_name("mixer", name, MIXERS)
    found: type[Mixer] = load(MIXERS[name].path)
    return found


def build(name: str, dim: int, *, num_heads: int | None = None, **options: Any) -> Mixer:
    """A mixer over ``dim`` channels.

    Args:
        name: one of :func:`available`.
        dim: D, the width of its input and output.
        num_heads: H; None: the method's own default, where it has one, else D / 64 (at least 1).
        options: those of the class; the catalog's own options of that name come first.

    Raises:
        ValueError: an unknown name, an option that the mixer does not have (the message lists those it has), or a value
            that does not fit.

    Example:
        >>> build("gla", 32, num_heads=2).num_heads
        2
    """
    cls = mixer_class(name)
    merged = {**MIXERS[name].options, **options}
    parameters = inspect.signature(cls.__init__).parameters
    known = [parameter for parameter in parameters if parameter not in ("self", "dim", "num_heads")]
    for option in merged:
        if option not in known:
            raise unknown_name(f"option of mixer {name!r}:", option, known)
    if num_heads is None and parameters["num_heads"].default is inspect.Parameter.empty:
        num_heads = max(1, dim // 64)
    if num_heads is not None:
        merged["num_heads"] = num_heads
    return cls(dim, **merged)
