"""The door to lightning attention (one constant decay per head), and the rules for its slopes."""

import math

import torch
from torch import Tensor

from subquad.ops import _contract as contract
from subquad.ops._recurrence import run_recurrence
from subquad.ops.lightning.reference import lightning_attention_reference


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a constant decay ``exp(-slope)`` per head and token (Qin et al. 2024, section 3).

    Retention (Sun et al. 2023) is the same operation with ``scale=K**-0.5``.

    Args:
        q, k: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        v: ``(B, T, H, V)``.
        slope: ``(H,)``, nats forgotten per token, >= 0; zero is plain linear attention. See :func:`lightning_slopes`.
        scale: factor of the output; None is 1 (the paper has no ``K**-0.5``).
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
        >>> q = k = v = torch.ones(1, 3, 1, 1)
        >>> lightning_attention(q, k, v, torch.zeros(1))[0].flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    contract.check_qkv(q, k, v)
    contract.check_argument("slope", slope, q, (q.shape[2],), "(heads,)")
    return run_recurrence(
        lightning_attention_reference,
        q,
        k,
        v,
        gates={"slope": slope},
        log_decay=-slope,
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )


def lightning_slopes(num_heads: int, layer: int = 0, num_layers: int = 1, *, rule: str = "alibi") -> Tensor:
    """Slopes ``(H,)`` of one layer, float32 (TransNormerLLM, Qin et al. 2023, section 3.1).

    Args:
        num_heads: H >= 1.
        layer, num_layers: the layer's place from 0; deeper layers forget less, the last hardly at all.
        rule: ``"alibi"``: ``2^(-8 (h+1) / H)`` times ``1 - layer / (num_layers - 1) + 1e-5``, what the released models
            use (a number of heads that is no power of two interleaves two such lists); ``"paper"``:
            ``exp(-8 h / H * (1 - layer / num_layers))`` is the decay's slope as printed in the papers.

    Raises:
        ValueError: an unknown rule, or a layer outside the model.

    Example:
        >>> lightning_slopes(8)[:3].tolist()
        [0.5, 0.25, 0.125]
    """
    if num_heads < 1 or not 0 <= layer < num_layers:
        raise ValueError(
            f"need num_heads >= 1 and 0 <= layer < num_layers; got num_heads={num_heads}, layer={layer} of {num_layers}"
        )
    if rule == "alibi":
        depth = 1 - layer / (num_layers - 1) + 1e-5 if num_layers > 1 else 1.0
        return torch.tensor(_alibi_slopes(num_heads)) * depth
    if rule == "paper":
        head = torch.arange(num_heads, dtype=torch.float32)
        return 8 * head / num_heads * (1 - layer / num_layers)
    raise ValueError(f"rule must be 'alibi' or 'paper'; got {rule!r}")


def window_slopes(num_heads: int, shortest: float = 2.0, longest: float = 256.0) -> Tensor:
    """Slopes ``(H,)`` whose windows ``1 / slope`` run from ``shortest`` to ``longest`` tokens, evenly in the log.

    Example:
        >>> window_slopes(3, 4, 64).tolist()
        [0.25, 0.0625, 0.015625]
    """
    if num_heads < 1 or not 0 < shortest <= longest:
        raise ValueError(f"need num_heads >= 1 and 0 < shortest <= longest; got {num_heads}, {shortest}, {longest}")
    return torch.logspace(-math.log2(shortest), -math.log2(longest), num_heads, base=2.0)


def retention_slopes(num_heads: int) -> Tensor:
    """RetNet's slopes ``(H,)``: the decay of head h is ``1 - 2^(-5-h)`` (Sun et al. 2023, eq. 8).

    Example:
        >>> torch.exp(-retention_slopes(2)).tolist()
        [0.96875, 0.984375]
    """
    return -torch.log1p(-(2.0 ** (-5.0 - torch.arange(num_heads))))


def _alibi_slopes(num_heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += _alibi_slopes(2 * power)[::2][: num_heads - power]
    return slopes
