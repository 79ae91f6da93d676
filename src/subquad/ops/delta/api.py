"""The doors to the delta rule: plain, gated per head, gated per channel (``kda``), and several updates per token."""

import torch
from torch import Tensor

from subquad.ops import _contract as contract
from subquad.ops._recurrence import run_recurrence
from subquad.ops.delta.reference import delta_rule_reference


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T`` (Yang et al. 2024, eq. 2).

    With unit keys the state's transition has the eigenvalue ``1 - beta`` along the key: beta in [0, 1] forgets, beta
    above 1 flips the sign, which state tracking needs (Grazzi et al. 2025). Keys longer than 1 make it expand.

    Args:
        q, k: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16; k of unit length.
        v: ``(B, T, H, V)``.
        beta: ``(B, T, H)`` in [0, 2], the strength of writing.
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

    Example: the second write under one key replaces the first.
        >>> k = torch.ones(1, 2, 1, 1)
        >>> v = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
        >>> delta_rule(k, k, v, torch.ones(1, 2, 1))[0].flatten().tolist()
        [3.0, 5.0]
    """
    contract.check_qkv(q, k, v)
    contract.check_argument("beta", beta, q, q.shape[:3], "(batch, time, heads)")
    return _delta(q, k, v, beta, None, scale, initial_state, return_state, cu_seqlens, chunk_size, backend)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule on a state that first decays by one gate per head (Yang et al. 2025, eq. 10).

    Args:
        log_decay: ``(B, T, H)``, nats, <= 0; zero everywhere is :func:`delta_rule`.
        beta: ``(B, T, H)`` in [0, 2].

    All other arguments, results and errors are those of :func:`delta_rule`.

    Example:
        >>> k = torch.ones(1, 2, 1, 1)
        >>> v = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1)
        >>> half = torch.full((1, 2, 1), 0.5)
        >>> gated_delta_rule(k, k, v, half.log(), half)[0].flatten().round(decimals=4).tolist()
        [2.0, 0.5]
    """
    contract.check_qkv(q, k, v)
    if getattr(log_decay, "ndim", 0) == 4:
        raise ValueError(
            f"log_decay must be (batch, time, heads) = {tuple(q.shape[:3])}; it has shape {tuple(log_decay.shape)}; "
            "a gate per channel belongs to kda"
        )
    contract.check_argument("log_decay", log_decay, q, q.shape[:3], "(batch, time, heads)")
    contract.check_argument("beta", beta, q, q.shape[:3], "(batch, time, heads)")
    return _delta(q, k, v, beta, log_decay, scale, initial_state, return_state, cu_seqlens, chunk_size, backend)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention: the delta rule on a state whose every key channel decays by its own gate (Kimi Team 2025).

    Args:
        log_decay: ``(B, T, H, K)``, nats, <= 0; equal over channels it is :func:`gated_delta_rule`.
        beta: ``(B, T, H)`` in [0, 2].

    All other arguments, results and errors are those of :func:`delta_rule`.

    Example:
        >>> k = torch.ones(1, 2, 1, 1)
        >>> kda(k, k, k, torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1))[0].flatten().tolist()
        [1.0, 1.0]
    """
    contract.check_qkv(q, k, v)
    contract.check_argument("log_decay", log_decay, q, q.shape, "(batch, time, heads, key width)")
    contract.check_argument("beta", beta, q, q.shape[:3], "(batch, time, heads)")
    return _delta(q, k, v, beta, log_decay, scale, initial_state, return_state, cu_seqlens, chunk_size, backend)


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Several delta updates per token, so that the state turns by a product of reflections (Siems et al. 2025, eq. 6).

    Args:
        q: ``(B, T, H, K)``.
        k, v: ``(B, T, n, H, K)`` and ``(B, T, n, H, V)``, n >= 1 updates per token in their order.
        beta: ``(B, T, n, H)`` in [0, 2].
        log_decay: ``(B, T, H)``, applied once, before a token's first update; None: no decay.

    All other arguments, results and errors are those of :func:`delta_rule`; n = 1 is :func:`delta_rule` itself.

    Example: two updates, the second replaces the first; the token reads after both.
        >>> k = torch.ones(1, 1, 2, 1, 1)
        >>> v = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1, 1)
        >>> delta_product(torch.ones(1, 1, 1, 1), k, v, torch.ones(1, 1, 2, 1))[0].item()
        5.0
    """
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_tensor("k", k, 5, "(batch, time, updates, heads, key width)")
    contract.check_tensor("v", v, 5, "(batch, time, updates, heads, value width)")
    contract.check_not_empty("k", k)
    contract.check_not_empty("v", v)
    batch, time, _, heads, width = k.shape
    contract.check_same_kind("k", k, q)
    contract.check_same_kind("v", v, q)
    if tuple(q.shape) != (batch, time, heads, width) or v.shape[:4] != k.shape[:4]:
        raise ValueError(
            "q, k, v must be (B, T, H, K), (B, T, n, H, K), (B, T, n, H, V); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    contract.check_state_size(q, v)
    contract.check_argument("beta", beta, q, k.shape[:4], "(batch, time, updates, heads)")
    if log_decay is not None:
        contract.check_argument("log_decay", log_decay, q, q.shape[:3], "(batch, time, heads)")
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    return _delta(q, k, v, beta, log_decay, scale, initial_state, return_state, cu_seqlens, chunk_size, backend)


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    return run_recurrence(
        delta_rule_reference,
        q,
        k,
        v,
        gates={"beta": beta, "log_decay": log_decay},
        log_decay=log_decay,
        beta=beta,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


def delta_attention_matrix(q: Tensor, k: Tensor, beta: Tensor, *, scale: float | None = None) -> Tensor:
    """The matrix A ``(B, H, T, T)`` with ``output = A v`` of the delta rule: whose value each token still reads.

    For analysis: it costs T^2 memory (Yang et al. 2024, section 3.2). Shapes as in :func:`delta_rule`.

    Example: after a second write under the same key, nothing is left of the first.
        >>> k = torch.ones(1, 2, 1, 1)
        >>> delta_attention_matrix(k, k, torch.ones(1, 2, 1))[0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    contract.check_qkv(q, k, k)
    contract.check_argument("beta", beta, q, q.shape[:3], "(batch, time, heads)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    accumulate = contract.accumulation_dtype(q)
    query, key = (x.to(accumulate).transpose(1, 2) for x in (q, k))
    write = key * beta.to(accumulate).transpose(1, 2)[..., None]
    erase = (key @ write.mT).tril(-1) + torch.eye(q.shape[1], dtype=accumulate, device=q.device)
    reads = (scale * query @ write.mT).tril()
    return torch.linalg.solve_triangular(erase, reads, upper=False, left=False, unitriangular=True)
