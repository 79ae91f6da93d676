"""The door to the diagonal scan."""

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.scan import chunked, diagonal
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops.diagonal_scan.reference import diagonal_scan_reference


def diagonal_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``h_t = decay_t h_{t-1} + x_t`` per channel: a linear recurrence with diagonal transitions (Martin & Cundy 2018).

    Args:
        decay: ``(B, T, D)``, one of float64, float32, bfloat16, float16: the factor itself, of any sign, not its
            logarithm. May be float32 beside a narrower x: a slow decay rounds to none in bfloat16.
        x: ``(B, T, D)``.
        initial_state: ``(B, D)``, the state before the first token; zeros if not given. Packed: one per sequence.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(sequences + 1,)`` int32 or int64, where packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        All states ``(B, T, D)`` in x's dtype, and the last ``(B, D)`` or None.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit; the message says what is needed.

    Example:
        >>> half, x = torch.full((1, 3, 1), 0.5), torch.tensor([8.0, 0.0, 1.0]).view(1, 3, 1)
        >>> diagonal_scan(half, x)[0].flatten().tolist()
        [8.0, 4.0, 3.0]
    """
    contract.check_tensor("x", x, 3, "(batch, time, channels)")
    contract.check_not_empty("x", x)
    contract.check_argument("decay", decay, x, x.shape, "(batch, time, channels)")
    contract.check_cu_seqlens(cu_seqlens, x)
    shape = (contract.number_of_states(x, cu_seqlens), x.shape[2])
    if initial_state is not None:
        contract.check_argument("initial_state", initial_state, x, shape, "(batch or sequences, channels)")
    watch = dynamics.watching(
        "diagonal_scan", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None:
        one = torch.ones_like(x, dtype=torch.float64)[..., None]  # a channel is a head with one number of state
        system = dynamics.RecurrentSystem(
            "diagonal_scan", x[:, :, None, :, None], decay=decay.double()[..., None], write=one[:, :, None], read=one
        )
        h, _ = watch.take(system)
        return h[..., 0], None
    chosen = backends.resolve(backend, x.device, x.dtype)
    accumulate = contract.accumulation_dtype(x)
    if initial_state is None:
        initial_state = x.new_zeros(shape, dtype=accumulate)
    initial_state = initial_state.to(accumulate)
    if chosen in ("cpu", "gpu"):
        if decay.dtype == torch.float64:
            decay = decay.float()
        h, state = diagonal.run(decay, x, initial_state, cu_seqlens, backend=chosen)
        return h, state if return_state else None
    decay, wide = decay.to(accumulate), x.to(accumulate)
    if chosen == "reference":
        h, state = each_sequence(diagonal_scan_reference, (decay, wide), initial_state, cu_seqlens)
    elif cu_seqlens is None:
        h, state = chunked.linear_scan(decay, wide, initial_state)
    else:
        h, state = chunked.packed_linear_scan(decay, wide, initial_state, cu_seqlens)
    return h.to(x.dtype), state if return_state else None
