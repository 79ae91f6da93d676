"""Prompts in pieces for Mamba: transformers' scan begins every piece with zeros, ours where the last one ended."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from subquad.inference.optimize import functions, seam


def continue_state(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A method like ``forward`` whose scan begins with the state that ``cache`` holds, for several tokens at once.

    ``forward`` is a clone that reads ``mamba_selective_scan`` from its globals, once or once per head.
    """
    innermost = seam.innermost(forward)

    def continuing(
        self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if cache is None or hidden_states.shape[1] == 1 or not cache.has_previous_state(self.layer_idx):
            return forward(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is None:
            return forward(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        scan = _scan_from(state)
        names = innermost.__globals__ | {"mamba_selective_scan": scan}
        return seam.clone(forward, names)(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)

    return continuing


def _scan_from(state: Tensor) -> Callable[..., Any]:
    """The scan from ``state (B, D, N)``; of heads that are scanned one after another, ``(B, heads, D, N)``."""
    if state.ndim == 3:
        return partial(functions.mamba_selective_scan, initial_state=state.clone())
    heads = iter(state.clone().unbind(1))

    def scan(*args: Any, **kwargs: Any) -> Any:
        return functions.mamba_selective_scan(*args, initial_state=next(heads), **kwargs)

    return scan
