"""The doors to gated linear attention: a gate per key channel (``gla``) or per head (``simple_gla``)."""

from torch import Tensor

from subquad.ops import _contract as contract
from subquad.ops._recurrence import run_recurrence
from subquad.ops.gla.reference import gla_reference, simple_gla_reference


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    value_log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: every key channel forgets by its own gate (Yang et al. 2024, eq. 3).

    Args:
        q, k: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        v: ``(B, T, H, V)``.
        log_decay: ``(B, T, H, K)``, nats, <= 0; give it in float32, a slow decay rounds to none in bfloat16.
        value_log_decay: ``(B, T, H, V)``, the same over value channels; at least one of the two is needed.
        scale: factor of the output; None is ``K**-0.5``.
        initial_state: ``(B, H, K, V)``, the state before the first token; zeros if not given. Packed: ``(N, H, K, V)``.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> import torch
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> gla(q, k, v, torch.full((1, 3, 1, 1), 0.5).log())[0].flatten().round(decimals=4).tolist()
        [1.0, 1.5, 1.75]
    """
    contract.check_qkv(q, k, v)
    if log_decay is None and value_log_decay is None:
        raise ValueError("gla needs log_decay, value_log_decay or both; without decay use linear_attention")
    if log_decay is not None:
        if getattr(log_decay, "shape", None) == q.shape[:3]:
            raise ValueError(
                f"log_decay must be (batch, time, heads, key width) = {tuple(q.shape)}; "
                f"it has shape {tuple(q.shape[:3])}; one gate per head belongs to simple_gla"
            )
        contract.check_argument("log_decay", log_decay, q, q.shape, "(batch, time, heads, key width)")
    if value_log_decay is not None:
        contract.check_argument("value_log_decay", value_log_decay, q, v.shape, "(batch, time, heads, value width)")
    return run_recurrence(
        gla_reference,
        q,
        k,
        v,
        gates={"log_decay": log_decay, "value_log_decay": value_log_decay},
        log_decay=log_decay,
        value_log_decay=value_log_decay,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention whose state forgets by one gate per head and token: Mamba-2's scalar form, RetNet with gates.

    Args:
        log_decay: ``(B, T, H)``, nats, <= 0.

    All other arguments, results and errors are those of :func:`gla`; ``scale=None`` is ``K**-0.5``.

    Example:
        >>> import torch
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> simple_gla(q, k, v, torch.full((1, 3, 1), 0.5).log())[0].flatten().round(decimals=4).tolist()
        [1.0, 1.5, 1.75]
    """
    contract.check_qkv(q, k, v)
    if getattr(log_decay, "ndim", 0) == 4:
        raise ValueError(
            f"log_decay must be (batch, time, heads) = {tuple(q.shape[:3])}; it has shape {tuple(log_decay.shape)}; "
            "a gate per channel belongs to gla"
        )
    contract.check_argument("log_decay", log_decay, q, q.shape[:3], "(batch, time, heads)")
    return run_recurrence(
        simple_gla_reference,
        q,
        k,
        v,
        gates={"log_decay": log_decay},
        log_decay=log_decay,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )
