"""The neural memory as defined: one token after another, the gradient of the surprise taken by autograd.

Source: Behrouz et al. 2025, "Titans: Learning to Memorize at Test Time", equations 9 to 14, and section 3.2 for chunks.
"""

import torch
from torch import Tensor

from subquad.ops.neural_memory.network import Descent, MemoryNetwork


def neural_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor,
    descent: Descent,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every token, ``M_start`` being the weights before the first token of its chunk::

        gradient_t = d |M_start(k_t) - v_t|^2 / d M_start
        surprise_t = momentum_t surprise_{t-1} - step_t gradient_t
        M_t        = (1 - forget_t) M_{t-1} + surprise_t
        output_t   = M_t(q_t)

    q, k ``(B, T, H, K)``, v ``(B, T, H, V)``, gates ``(B, T, H)``; the state is that of ``NeuralMemoryState``. Only the
    first ``lengths (B,)`` tokens of a row are real: others change no state, and their output is zero.
    """
    network, chunk_size, max_grad_norm = descent
    weights, surprise, start, filled = state
    outputs = []
    for t in range(q.shape[1]):
        start = torch.where((filled == 0)[:, None, None], weights, start)
        gradient = _gradient(start, k[:, t], v[:, t], network)
        if max_grad_norm is not None:
            size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            gradient = gradient * (max_grad_norm / size.clamp(min=max_grad_norm))
        a, e, th = (gate[:, t, :, None] for gate in (forget, momentum, step))
        real = t < lengths
        new_surprise = e * surprise - th * gradient
        new_weights = (1 - a) * weights + new_surprise
        output = network.output(network.layers(new_weights), q[:, t, :, None])[:, :, 0]
        keep = real[:, None, None]
        outputs.append(output.where(keep, 0))
        surprise, weights = new_surprise.where(keep, surprise), new_weights.where(keep, weights)
        filled = (filled + real.to(filled.dtype)) % chunk_size
    start = torch.where((filled == 0)[:, None, None], weights, start)
    return torch.stack(outputs, dim=1), (weights, surprise, start, filled)


def _gradient(weights: Tensor, k: Tensor, v: Tensor, network: MemoryNetwork) -> Tensor:
    """Of ``|M(k) - v|^2`` by the weights, row by row; itself differentiable where gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        at = weights if weights.requires_grad else weights.detach().requires_grad_()
        error = network.output(network.layers(at), k[:, :, None])[:, :, 0] - v
        (gradient,) = torch.autograd.grad(error.square().sum(), at, create_graph=recorded)
    return gradient
