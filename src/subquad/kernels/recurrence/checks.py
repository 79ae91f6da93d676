"""Checks that read values: ranges of the gates, and offsets of packed sequences. On a CPU they always run."""

from itertools import pairwise

from torch import Tensor


def check_gates(log_decay: Tensor | None, beta: Tensor | None, value_log_decay: Tensor | None = None) -> None:
    """Refuses gates outside the recurrence's range. NaN passes: it stays in its row."""
    for name, gate in (("log_decay", log_decay), ("value_log_decay", value_log_decay)):
        # the maximum is one pass without a temporary; it is NaN where any gate is, and then decides nothing
        if gate is not None and not bool(gate.max() <= 0) and bool((gate > 0).any()):
            largest = float(gate.nan_to_num(0.0).max())
            raise ValueError(f"{name} must be at most 0 (a decay of at most 1); its largest value is {largest:.4g}")
    if beta is not None and bool(((beta < 0) | (beta > 2)).any()):
        low, high = (float(x) for x in beta.nan_to_num(0.0).aminmax())
        raise ValueError(
            "beta must lie in [0, 2] (above 1: negative eigenvalues, Grazzi et al. 2025); "
            f"it ranges over [{low:.4g}, {high:.4g}]"
        )


def check_offsets(cu_seqlens: Tensor, length: int) -> list[int]:
    """The offsets as integers, in order, from 0 to ``length``."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or any(a > b for a, b in pairwise(offsets)):
        shown = ", ".join(map(str, offsets[:8])) + (", ..." if len(offsets) > 8 else "")
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {length}; got [{shown}]")
    return offsets
