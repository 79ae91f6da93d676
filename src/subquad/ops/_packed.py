"""Definitions on packed sequences: one sequence after another, each from a state of its own."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from subquad.kernels.recurrence.checks import check_offsets

State = TypeVar("State", bound="Tensor | tuple[Tensor, ...]")


def each_sequence(
    define: Callable[..., tuple[Tensor, Any]],
    tokens: Sequence[Tensor],
    state: State,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State]:
    """``define(*tokens, state) -> (output, state)`` on each packed sequence; as it is without ``cu_seqlens``.

    Args:
        define: the definition, for sequences of one token or more.
        tokens: the first ``(1, T, ...)``, others also ``(1, n T, ...)``, n entries per token: cut where sequences begin
            and end. A vector (one number per head) goes to each whole.
        state: ``(N, ...)``, one row per sequence: a tensor, or a tuple of them, named or not, which ``define`` gives
            back as one. An empty sequence keeps its own.
        cu_seqlens: ``(N + 1,)``.

    Returns:
        The outputs one after another, and the states as ``state`` came.

    Raises:
        ValueError: offsets that do not begin at 0, end at T and rise.
    """
    if cu_seqlens is None:
        return define(*tokens, state)
    time = tokens[0].shape[1]
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(check_offsets(cu_seqlens, time))):
        own = _like(state, [leaf[n : n + 1] for leaf in _leaves(state)])
        if end > start:
            output, own = define(*(_part(x, start, end, time) for x in tokens), own)
            outputs.append(output)
        states.append(_leaves(own))
    return torch.cat(outputs, dim=1), _like(state, [torch.cat(leaves) for leaves in zip(*states)])


def _part(x: Tensor, start: int, end: int, time: int) -> Tensor:
    if x.ndim == 1:
        return x
    per_token = x.shape[1] // time
    return x[:, start * per_token : end * per_token]


def _leaves(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _like(state: State, leaves: list[Tensor]) -> State:
    """The leaves in the form of ``state``."""
    if isinstance(state, Tensor):
        return leaves[0]  # type: ignore[return-value]
    kind: Any = type(state)
    rebuilt: State = kind(*leaves) if hasattr(state, "_fields") else kind(leaves)
    return rebuilt
