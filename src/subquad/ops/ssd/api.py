"""The door to Mamba-2's state space model."""

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops.gla import simple_gla
from subquad.ops.ssd.reference import ssd_reference


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's scan: N decaying states per channel, one decay for all of a head (Dao & Gu 2024, section 5).

    ``h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T``, ``y_t = h_t C_t + D x_t`` per head. It is
    :func:`~subquad.ops.simple_gla` of ``q = C``, ``k = B``, ``v = delta x``, ``log_decay = delta A`` and runs as that.

    Args:
        x: ``(B, T, H, P)``, one of float64, float32, bfloat16, float16.
        delta: ``(B, T, H)``, the steps, not negative: softplus, bias and limits come before. Give it in float32.
        A: ``(H,)``, at most 0; give it in float32.
        B, C: ``(B, T, N)``, or ``(B, T, G, N)`` where each of G is shared by H / G neighbouring heads.
        D: ``(H,)``, what of x reaches the output directly; None: nothing.
        initial_state: ``(B, H, P, N)``, the state before the first token; zeros if not given. Packed: one per sequence.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(sequences + 1,)`` int32 or int64, where packed sequences begin and end in a batch of one.
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        The output ``(B, T, H, P)`` in x's dtype, and the last state ``(B, H, P, N)`` or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example: half of the state is lost per step of 1, nothing in a step of 0.
        >>> x = torch.tensor([8.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> delta = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1)
        >>> A, one = torch.tensor([0.5]).log(), torch.ones(1, 3, 1)
        >>> ssd(x, delta, A, one, one)[0].flatten().round(decimals=4).tolist()
        [8.0, 4.0, 4.0]
    """
    B, C = _check(x, delta, A, B, C, D, initial_state, cu_seqlens)
    if contract.values_may_be_read(x):
        _check_values(A, delta)
    watch = dynamics.watching("ssd", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    if watch is not None:
        return watch.take(_system(x, delta, A, B, C, D))
    accumulate = contract.accumulation_dtype(x)
    wide, delta, A, B, C = (tensor.to(accumulate) for tensor in (x, delta, A, B, C))
    D = None if D is None else D.to(accumulate)
    if backends.resolve(backend, x.device, x.dtype) == "reference":
        if initial_state is None:
            shape = (contract.number_of_states(x, cu_seqlens), *x.shape[2:], B.shape[-1])
            initial_state = x.new_zeros(shape, dtype=accumulate)
        y, state = each_sequence(
            lambda x, delta, B, C, state: ssd_reference(x, delta, A, B, C, D, state),
            (wide, delta, B, C),
            initial_state.to(accumulate),
            cu_seqlens,
        )
        return y.to(x.dtype), state if return_state else None
    per_group = x.shape[2] // B.shape[2]
    B, C = (maps.repeat_interleave(per_group, dim=2) if per_group > 1 else maps for maps in (B, C))
    y, last = simple_gla(
        C,
        B,
        wide * delta[..., None],
        delta * A,
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.to(accumulate).mT,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )
    y = y if D is None else torch.addcmul(y, D[:, None], wide)
    return y.to(x.dtype), None if last is None else last.mT


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """B and C with their axis of groups."""
    contract.check_tensor("x", x, 4, "(batch, time, heads, head width)")
    contract.check_not_empty("x", x)
    batch, time, heads, width = x.shape
    contract.check_argument("delta", delta, x, (batch, time, heads), "(batch, time, heads)")
    if isinstance(A, Tensor) and A.ndim == 2:
        raise ValueError(f"A must be (heads,) = {(heads,)}; one rate per channel and state belongs to selective_scan")
    contract.check_argument("A", A, x, (heads,), "(heads,)")
    with_groups = []
    for name, maps in (("B", B), ("C", C)):
        if isinstance(maps, Tensor) and maps.ndim == 3:
            maps = maps[:, :, None]
        contract.check_tensor(name, maps, 4, "(batch, time, states) or (batch, time, groups, states)")
        contract.check_not_empty(name, maps)
        contract.check_argument(name, maps, x, (batch, time, *maps.shape[2:]), "(batch, time, groups, states)")
        contract.check_same_kind(name, maps, x)
        if heads % maps.shape[2]:
            raise ValueError(f"{name} has {maps.shape[2]} groups, which must divide the number of heads {heads}")
        with_groups.append(maps)
    B, C = with_groups
    if B.shape != C.shape:
        raise ValueError(
            f"B and C must have as many groups and states; got {tuple(B.shape[2:])} and {tuple(C.shape[2:])}"
        )
    if D is not None:
        contract.check_argument("D", D, x, (heads,), "(heads,)")
    contract.check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        shape = (contract.number_of_states(x, cu_seqlens), heads, width, B.shape[-1])
        contract.check_argument(
            "initial_state", initial_state, x, shape, "(batch or sequences, heads, head width, states)"
        )
    return B, C


def _check_values(A: Tensor, delta: Tensor) -> None:
    """Neither may be outside its range; NaN passes, it stays in its head."""
    if bool((A > 0).any()):
        raise ValueError(f"A must be at most 0: a state may not grow; its largest value is {float(A.max()):.4g}")
    if bool((delta < 0).any()):
        raise ValueError(
            f"delta must not be negative: it is a step in time; its least value is {float(delta.min()):.4g}"
        )


def _system(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> dynamics.RecurrentSystem:
    step = delta.double()[..., None]
    write, read = (maps.double().repeat_interleave(x.shape[2] // maps.shape[2], dim=2) for maps in (B, C))
    return dynamics.RecurrentSystem(
        "ssd",
        x[:, :, None],
        decay=(step * A.double()[:, None]).exp(),
        write=(step * write)[:, :, None],
        read=read,
        skip=None if D is None else D.double(),
    )
