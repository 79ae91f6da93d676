"""The doors to the selective scan: the op, and the same with softplus, bias and gate in one pass, for mixers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.scan import chunked, dispatch
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops.selective_scan.reference import selective_scan_reference

LARGEST_GPU_STATES = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The scan of a selective state space model, S6: N decaying states per channel (Gu & Dao 2023, eq. 2).

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t h_t + D u_t`` per channel. Where A is one number for
    all states of a head's channels and delta one for its channels, this is ``simple_gla`` (Mamba-2): ``q = C``,
    ``k = B``, ``v = delta u``, ``log_decay = delta A``.

    Args:
        u: ``(B, T, D)``, one of float64, float32, bfloat16, float16.
        delta: ``(B, T, D)``, the steps, not negative: a step of 0 leaves the state as it is. May be float32 beside a
            narrower u.
        A: ``(D, N)``, at most 0; give it in float32.
        B, C: ``(B, T, N)``, or ``(B, T, G, N)`` where each of G is shared by D / G neighbouring channels.
        D: ``(D,)``, what of u reaches the output directly; None: nothing.
        initial_state: ``(B, D, N)``, the state before the first token; zeros if not given. Packed: one per sequence.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(sequences + 1,)`` int32 or int64, where packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        The output ``(B, T, D)`` in u's dtype, and the last state ``(B, D, N)`` or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example: half of the state is lost per step of 1, nothing in a step of 0.
        >>> u = torch.tensor([8.0, 0.0, 0.0]).view(1, 3, 1)
        >>> delta = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1)
        >>> A, one = torch.tensor([[0.5]]).log(), torch.ones(1, 3, 1)
        >>> selective_scan(u, delta, A, one, one)[0].flatten().round(decimals=4).tolist()
        [8.0, 4.0, 4.0]
    """
    B, C = _check(u, delta, A, B, C, D, initial_state, cu_seqlens)
    return _run(u, delta, A, B, C, D, None, None, initial_state, return_state, cu_seqlens, backend)


def gated_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor,
    gate: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """What surrounds the scan in Mamba's block, in its own pass over memory: softplus before, the gate after.

    ``SiLU(gate) * selective_scan(u, softplus(delta + delta_bias), A, B, C, D)``. A logit of -inf is a step of 0.

    Args:
        delta: ``(B, T, D)``, logits.
        delta_bias: ``(D,)``.
        gate: ``(B, T, D)``.

    All other arguments, results and errors are those of :func:`selective_scan`.
    """
    B, C = _check(u, delta, A, B, C, D, initial_state, cu_seqlens)
    contract.check_argument("delta_bias", delta_bias, u, u.shape[2:], "(channels,)")
    contract.check_argument("gate", gate, u, u.shape, "(batch, time, channels)")
    return _run(u, delta, A, B, C, D, delta_bias, gate, initial_state, return_state, cu_seqlens, backend)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """B and C with their axis of groups."""
    contract.check_tensor("u", u, 3, "(batch, time, channels)")
    contract.check_not_empty("u", u)
    contract.check_argument("delta", delta, u, u.shape, "(batch, time, channels)")
    if isinstance(A, Tensor) and A.is_complex():
        raise TypeError(f"A must be real; it is {A.dtype}. A complex diagonal is S4D's (Gu et al. 2022), a convolution")
    contract.check_tensor("A", A, 2, "(channels, states)")
    contract.check_not_empty("A", A)
    batch, time, channels = u.shape
    contract.check_argument("A", A, u, (channels, A.shape[1]), "(channels, states)")
    with_groups = []
    for name, x in (("B", B), ("C", C)):
        if isinstance(x, Tensor) and x.ndim == 3:
            x = x[:, :, None]
        contract.check_tensor(name, x, 4, "(batch, time, states) or (batch, time, groups, states)")
        contract.check_not_empty(name, x)
        groups = x.shape[2]
        if channels % groups:
            raise ValueError(f"{name} has {groups} groups, which must divide the number of channels {channels}")
        shape = (batch, time, groups, A.shape[1])
        contract.check_argument(name, x, u, shape, "(batch, time, groups, states)", hint="; states are A's columns")
        contract.check_same_kind(name, x, u)
        with_groups.append(x)
    if with_groups[0].shape != with_groups[1].shape:
        raise ValueError(
            f"B and C must have as many groups; got {with_groups[0].shape[2]} and {with_groups[1].shape[2]}"
        )
    if D is not None:
        contract.check_argument("D", D, u, (channels,), "(channels,)")
    contract.check_cu_seqlens(cu_seqlens, u)
    states = contract.number_of_states(u, cu_seqlens)
    if states * channels * A.shape[1] * 8 >= contract.LARGEST_STORAGE:
        raise ValueError(f"{channels} channels of {A.shape[1]} states make a state whose size in bytes overflows")
    if initial_state is not None:
        shape3 = (states, channels, A.shape[1])
        contract.check_argument("initial_state", initial_state, u, shape3, "(batch or sequences, channels, states)")
    return with_groups[0], with_groups[1]


def _run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    watch = dynamics.watching(
        "selective_scan", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None:
        y, _ = watch.take(_system(u, delta, A, B, C, D, delta_bias))
        y = y[..., 0] if gate is None else y[..., 0] * F.silu(gate)
        return y, None
    unsupported = {}
    if A.shape[1] > LARGEST_GPU_STATES:
        unsupported["gpu"] = f"it holds up to {LARGEST_GPU_STATES} states, not {A.shape[1]}; use backend='chunked'"
    chosen = backends.resolve(backend, u.device, u.dtype, unsupported)
    if contract.values_may_be_read(u):
        _check_values(A, delta if delta_bias is None and chosen != "cpu" else None)  # 'cpu' looks at steps itself
    accumulate = contract.accumulation_dtype(u)
    A, D, delta_bias, initial_state = (  # type: ignore[assignment]
        None if x is None else x.to(accumulate) for x in (A, D, delta_bias, initial_state)
    )
    if chosen in ("cpu", "gpu"):
        if delta.dtype == torch.float64:
            delta = delta.float()
        y, state = dispatch.run(u, delta, A, B, C, D, delta_bias, gate, initial_state, cu_seqlens, backend=chosen)
        return y, state if return_state else None
    tokens = [x.to(accumulate) for x in (u, delta, B, C)]
    if delta_bias is not None:
        tokens[1] = F.softplus(tokens[1] + delta_bias)
    if initial_state is None:
        initial_state = u.new_zeros(contract.number_of_states(u, cu_seqlens), *A.shape, dtype=accumulate)
    if chosen == "reference":
        y, state = each_sequence(
            lambda u, delta, B, C, state: selective_scan_reference(u, delta, A, B, C, D, state),
            tokens,
            initial_state,
            cu_seqlens,
        )
    else:
        u_wide, step, B, C = tokens
        if cu_seqlens is None:
            y, state = chunked.selective_scan(u_wide, step, A, B, C, initial_state)
        else:
            y, state = chunked.packed_selective_scan(u_wide, step, A, B, C, initial_state, cu_seqlens)
        y = y if D is None else torch.addcmul(y, D, u_wide)
    if gate is not None:
        y = y * F.silu(gate.to(accumulate))
    return y.to(u.dtype), state if return_state else None


def _system(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> dynamics.RecurrentSystem:
    """Each channel as a head with N numbers of state and one value."""
    step = (delta if delta_bias is None else F.softplus(delta.double() + delta_bias.double())).double()[..., None]
    write, read = (x.double().repeat_interleave(u.shape[2] // x.shape[2], dim=2) for x in (B, C))
    return dynamics.RecurrentSystem(
        "selective_scan",
        u[:, :, None, :, None],
        decay=(step * A.double()).exp(),
        write=(step * write)[:, :, None],
        read=read,
        skip=None if D is None else D.double(),
    )


def _check_values(A: Tensor, delta: Tensor | None) -> None:
    """Neither may be above its range; NaN passes, it stays in its channel."""
    if bool((A > 0).any()):
        raise ValueError(f"A must be at most 0: a state may not grow; its largest value is {float(A.max()):.4g}")
    if delta is not None and bool((delta < 0).any()):
        raise ValueError(
            f"delta must not be negative: it is a step in time; its least value is {float(delta.min()):.4g}"
        )
