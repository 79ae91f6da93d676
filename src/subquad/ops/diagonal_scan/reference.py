"""The diagonal scan as defined: every channel forgets by its own gate and adds its own input.

Source: Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", section 2.
"""

import torch
from torch import Tensor


def diagonal_scan_reference(decay: Tensor, x: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after another, per channel::

        state_t = decay_t * state_{t-1} + x_t        output_t = state_t

    decay, x ``(B, T, D)``, initial_state ``(B, D)``.
    """
    state, outputs = initial_state, []
    for decay_t, x_t in zip(decay.unbind(1), x.unbind(1)):
        state = decay_t * state + x_t
        outputs.append(state)
    return torch.stack(outputs, dim=1), state
