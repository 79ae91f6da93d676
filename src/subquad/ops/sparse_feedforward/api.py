"""The doors to sparse feed-forward layers: gated ones, and the last projection alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad.kernels import backends
from subquad.ops import _contract as contract
from subquad.ops.sparse_feedforward.reference import active_gate, active_output, gated_feedforward_reference

MOST_TOKENS = 4  # more share hardly any inactive neuron, and a matrix product reads the weights once for all
LARGEST_SHARE = 0.5  # of neurons active for any token, beyond which a matrix product is faster
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def sparse_gated_feedforward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    activation: str = "relu",
    gate_threshold: float | Tensor = 0.0,
    output_threshold: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A gated feed-forward layer without its inactive neurons: they add nothing, and their weights need not be read.

    ::

        s = act(W_gate x),    0 where |s_i| < gate_threshold
        h = s * (W_up x),     0 where |h_i| < output_threshold_i
        o = W_down h

    With relu and thresholds of 0 this is the ordinary layer, exactly; with relu and a positive gate threshold it is
    FATReLU (Song et al. 2024, section 3.3); with output thresholds it is truncation by neuron (Luo et al. 2024).

    On a CPU up to four tokens in float32 read only the rows that any of them needs, if these are at most half of all:
    (1 + 2a) / 3 of the bytes at a share a. For this ``down_weight`` must be a transposed view of contiguous storage,
    ``down_weight.mT.is_contiguous()``. Whatever does not fit, gradients included, runs as plain matrix products.

    Args:
        x: ``(..., D)``, one of float64, float32, bfloat16, float16.
        gate_weight, up_weight: ``(F, D)``, in x's dtype, as linear layers hold them.
        down_weight: ``(E, F)``.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        gate_threshold: not negative: one number, or ``(F,)``.
        output_threshold: ``(F,)``, not negative, or None.
        backend: ``auto``; ``reference`` or ``chunked``, which compute everything; ``cpu``, which has no gradient.

    Returns:
        ``(..., E)`` in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit, a negative threshold, or a backend that cannot
            run the call.

    Example:
        >>> weights = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 4).mT
        >>> sparse_gated_feedforward(torch.randn(1, 4), *weights).shape
        torch.Size([1, 4])
    """
    rows = _check_rows("x", x)
    for name, weight in (("gate_weight", gate_weight), ("up_weight", up_weight)):
        _check_weight(name, weight, x, rows.shape[1])
    hidden = len(gate_weight)
    if len(up_weight) != hidden:
        raise ValueError(f"gate_weight and up_weight must have one shape; got {hidden} and {len(up_weight)} rows")
    _check_weight("down_weight", down_weight, x, hidden)
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {known}; got {activation!r}")
    _check_threshold("gate_threshold", gate_threshold, hidden)
    _check_threshold("output_threshold", output_threshold, hidden)
    chosen = _choose(backend, x, gate_weight, up_weight, down_weight)
    s = active_gate(ACTIVATIONS[activation](F.linear(rows, gate_weight)), gate_threshold)
    if chosen != "cpu":
        output = gated_feedforward_reference(rows, s, up_weight, down_weight, output_threshold)
    elif (active := _few_active(s, backend)) is None:  # gate and up are whole, and perhaps few h are left of them
        output = _down(active_output(s * F.linear(rows, up_weight), output_threshold), down_weight, backend)
    else:
        from subquad.kernels.feedforward import cpu

        thresholds = rows.new_zeros(hidden) if output_threshold is None else output_threshold.to(rows.dtype)
        output = cpu.gated_sum(rows, s, up_weight, down_weight.mT, active, thresholds)
    return output.view(*x.shape[:-1], -1)


def sparse_down_projection(
    hidden: Tensor, down_weight: Tensor, *, threshold: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """``W_down h``, h being 0 where ``|h_i| < threshold_i``: reads the columns of the neurons that are left.

    For layers whose active neurons are known only before the last projection: those without a gate, and gated ones with
    an activation that is never zero.

    Args:
        hidden: ``(..., F)``.
        down_weight: ``(E, F)`` in the same dtype; see :func:`sparse_gated_feedforward` for its layout.
        threshold: ``(F,)``, not negative, or None.
        backend: as for :func:`sparse_gated_feedforward`.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, a negative threshold, or a backend that cannot run.

    Example:
        >>> sparse_down_projection(torch.tensor([[0.0, 2.0]]), torch.eye(2))
        tensor([[0., 2.]])
    """
    rows = _check_rows("hidden", hidden)
    _check_weight("down_weight", down_weight, hidden, rows.shape[1])
    _check_threshold("threshold", threshold, rows.shape[1])
    h = active_output(rows, threshold)
    on_cpu = _choose(backend, hidden, down_weight) == "cpu"
    output = _down(h, down_weight, backend) if on_cpu else F.linear(h, down_weight)
    return output.view(*hidden.shape[:-1], -1)


def _down(h: Tensor, down_weight: Tensor, backend: str) -> Tensor:
    active = _few_active(h, backend)
    if active is None:
        return F.linear(h, down_weight)
    from subquad.kernels.feedforward import cpu

    return cpu.down_sum(h, down_weight.mT, active)


def _few_active(values: Tensor, backend: str) -> Tensor | None:
    """The neurons that are not 0 for some token; None where a matrix product is the faster way to sum them."""
    asked = backend == "cpu"
    if len(values) > MOST_TOKENS and not asked:
        return None
    active = (values != 0).any(0).nonzero()[:, 0]
    return active if asked or len(active) <= LARGEST_SHARE * values.shape[1] else None


def _choose(backend: str, *tensors: Tensor) -> str:
    """The backend for these tensors, the last of which is the down-projection."""
    x, down = tensors[0], tensors[-1]
    unsupported = {"gpu": "there is no GPU kernel for sparse feed-forward layers; use 'chunked'"}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        unsupported["cpu"] = "it has no gradient; use 'chunked', or torch.no_grad()"
    elif x.dtype != torch.float32:
        unsupported["cpu"] = f"it reads float32 weights, not {x.dtype}; use 'chunked'"
    elif not down.mT.is_contiguous():
        unsupported["cpu"] = "the columns of the down-projection must be contiguous: down_weight.mT.contiguous().mT"
    elif torch.compiler.is_compiling():
        unsupported["cpu"] = "which neurons are active cannot be part of a compiled graph; use 'chunked'"
    return backends.resolve(backend, x.device, x.dtype, unsupported)


def _check_rows(name: str, x: Tensor) -> Tensor:
    """x as ``(N, width)``."""
    contract.check_tensor(name, x, getattr(x, "ndim", 2), "(..., width)")
    if x.ndim == 0:
        raise ValueError(f"{name} must be (..., width); it is a number")
    contract.check_not_empty(name, x)
    return x.reshape(-1, x.shape[-1])


def _check_weight(name: str, weight: Tensor, x: Tensor, columns: int) -> None:
    contract.check_tensor(name, weight, 2, "(outputs, inputs)")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(
            f"{name} must be {x.dtype} on {x.device} as the input is; it is {weight.dtype} on {weight.device}"
        )
    contract.check_not_empty(name, weight)
    if weight.shape[1] != columns:
        raise ValueError(f"{name} must have {columns} columns; its shape is {tuple(weight.shape)}")


def _check_threshold(name: str, threshold: float | Tensor | None, hidden: int) -> None:
    if threshold is None:
        return
    if isinstance(threshold, Tensor):
        contract.check_tensor(name, threshold, 1, "(neurons,)")
        if len(threshold) != hidden:
            raise ValueError(f"{name} must have one value per neuron, {hidden}; it has {len(threshold)}")
        least = float(threshold.min()) if contract.values_may_be_read(threshold) else 0.0
    elif isinstance(threshold, int | float):
        least = float(threshold)
    else:
        raise TypeError(f"{name} must be a number or a tensor of one value per neuron; got {type(threshold).__name__}")
    if not least >= 0:
        raise ValueError(f"{name} must not be negative; got {least}")
