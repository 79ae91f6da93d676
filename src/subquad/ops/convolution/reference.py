"""The short causal convolution as defined: each channel is a weighted sum of its own last few values."""

import torch
from torch import Tensor


def short_convolution_reference(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after another, the window being the last W values, the current one included::

        window_t = [window_{t-1}[1:], x_t]
        output_t = sum_w weight_w * window_t[w] + bias

    x ``(B, T, D)``, weight ``(D, W)``, state ``(B, W - 1, D)`` -> output and the last W - 1 values.
    """
    outputs = []
    for x_t in x.unbind(1):
        window = torch.cat([state, x_t[:, None]], dim=1)
        outputs.append(torch.einsum("bwd,dw->bd", window, weight) + (0 if bias is None else bias))
        state = window[:, 1:]
    return torch.stack(outputs, dim=1), state
