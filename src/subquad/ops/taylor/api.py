"""The door to Taylor linear attention: causal or not, self or cross, with or without a normaliser."""

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.kernels.taylor import chunked
from subquad.kernels.taylor.dispatch import taylor_cpu
from subquad.kernels.taylor.features import feature_width, read_features, sum_features, taylor_features
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops._recurrence import LARGEST_GPU_WIDTH, run_recurrence
from subquad.ops.linear.api import NormalizedState, _check_cross
from subquad.ops.linear.reference import linear_attention_reference
from subquad.ops.taylor.reference import full_taylor_attention_reference, taylor_attention_reference

LARGEST_WIDTH = 32  # of q and k: 561 features


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    normalize: bool = True,
    eps: float = 1e-12,
    scale: float | None = None,
    mask: Tensor | None = None,
    initial_state: Tensor | NormalizedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
    allow_large_state: bool = False,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """``o_t = sum_j w_tj v_j / sum_j w_tj`` with ``w = 1 + s + s^2 / 2``, ``s = scale q_t . k_j`` (Arora et al. 2024).

    The weight is the second-order Taylor series of ``exp(s)``, at least 1/2 everywhere, so that what attention keeps of
    all earlier tokens is one matrix of F = 1 + d + d (d + 1) / 2 rows. It grows again for s < -1: keep s moderate.

    Args:
        q: ``(B, T, H, d)``, one of float64, float32, bfloat16, float16: the features are built here, in float32 or
            above, for a few tokens at a time.
        k, v: ``(B, S, H, d)`` and ``(B, S, H, V)``; S = T if causal, any S >= 1 (cross-attention) if not.
        causal: whether token t sees the keys up to t only.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        scale: of the scores, above 0; None is ``d**-0.5``. It is part of the state's meaning.
        mask: ``(B, S)`` bool, True = a real key; a padded one weighs nothing (a zero key would weigh 1).
        initial_state: of earlier tokens, a pair ``(state (B, H, F, V), normalizer (B, H, F))``, or the first of them
            without ``normalize``. Features lie as :func:`subquad.ops.taylor_features` gives them.
        return_state: whether to return that state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one (self only).
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. ``gpu`` runs the
            shared recurrence on explicit features (d up to 20); the non-causal form is plain torch everywhere.
        allow_large_state: permit d above 32.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None; with ``normalize`` that is a
        :class:`NormalizedState`.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> q = k = torch.zeros(1, 3, 1, 4)
        >>> v = torch.tensor([2.0, 4.0, 9.0]).view(1, 3, 1, 1)
        >>> taylor_linear_attention(q, k, v)[0].flatten().tolist()  # equal scores: the mean so far
        [2.0, 3.0, 5.0]
    """
    if causal:
        contract.check_qkv(q, k, v)
    else:
        _check_cross(q, k, v, cu_seqlens)
    contract.check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:
        raise ValueError(f"scale must be above 0: features take its root; got {scale}")
    if q.shape[-1] > LARGEST_WIDTH and not allow_large_state:
        raise ValueError(
            f"q and k must be at most {LARGEST_WIDTH} wide, for {feature_width(LARGEST_WIDTH)} features; they are "
            f"{q.shape[-1]} wide, which makes {feature_width(q.shape[-1])} (allow_large_state=True permits it)"
        )
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0; got {eps!r}")
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    _check_mask(mask, k, cu_seqlens)
    state, normalizer = _unpack(initial_state, q, v, normalize, cu_seqlens)
    unsupported = {}
    if feature_width(q.shape[-1]) > LARGEST_GPU_WIDTH:
        unsupported["gpu"] = f"its tiles hold {LARGEST_GPU_WIDTH} features; use backend='chunked'"
    chosen = backends.resolve(backend, q.device, q.dtype, unsupported)

    watch = dynamics.watching(
        "taylor_linear_attention", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )
    if watch is not None and causal:
        if mask is not None:
            raise ValueError("taylor_linear_attention is analysed on whole sequences: without a mask")
        query, key = (taylor_features(x.double(), scale) for x in (q, k))
        eps_or_none = eps if normalize else None
        op = "taylor_linear_attention"
        return watch.take(dynamics.matrix_system(op, query, key, v, scale=1.0, normalizer_eps=eps_or_none))
    if _is_step(chosen, q, k, v, state, normalizer, causal, mask, cu_seqlens):
        return _step(q, k, v, state, normalizer, scale, eps, return_state)  # type: ignore[arg-type]
    accumulate = contract.accumulation_dtype(v)
    values = v if mask is None else v.where(mask[..., None, None], 0)
    if normalize:  # one more value channel, 1 for a real key, carries the denominator through the same sums
        ones = values.new_ones(1).expand(*v.shape[:3], 1)
        ones = ones if mask is None else ones.where(mask[..., None, None], 0)
        values = torch.cat([values, ones], dim=-1)
        if state is not None and normalizer is not None:
            state = torch.cat([state, normalizer[..., None]], dim=-1)
    values = values.to(accumulate)
    if state is None:
        rows = contract.number_of_states(q, cu_seqlens)
        state = values.new_zeros(rows, q.shape[2], feature_width(q.shape[3]), values.shape[3])
    state = state.to(accumulate)
    run = _run_causal if causal else _run_full
    output, last = run(q, k, values, state, scale, cu_seqlens, chunk_size, chosen)
    if not normalize:
        return output.to(v.dtype), last if return_state else None
    output = (output[..., :-1] / (output[..., -1:] + eps)).to(v.dtype)
    return output, NormalizedState(last[..., :-1], last[..., -1]) if return_state else None


def _check_mask(mask: Tensor | None, k: Tensor, cu_seqlens: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = a real key; got {getattr(mask, 'dtype', type(mask))}")
    if mask.shape != k.shape[:2] or mask.device != k.device:
        raise ValueError(f"mask must be (batch, keys) = {tuple(k.shape[:2])} on {k.device}; got {tuple(mask.shape)}")
    if cu_seqlens is not None:
        raise ValueError("packed sequences have no padding: give cu_seqlens or mask, not both")


def _unpack(
    initial_state: Tensor | NormalizedState | None, q: Tensor, v: Tensor, normalize: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The two parts of an initial state, their shapes checked."""
    if initial_state is None:
        return None, None
    shape = (contract.number_of_states(q, cu_seqlens), q.shape[2], feature_width(q.shape[3]), v.shape[3])
    axes = "(batch or packed sequences, heads, features, value width)"
    if not normalize:
        if isinstance(initial_state, tuple):
            raise TypeError("initial_state must be one tensor; a pair belongs to normalize=True")
        contract.check_argument("initial_state", initial_state, q, shape, axes)
        return initial_state, None
    if not isinstance(initial_state, tuple) or len(initial_state) != 2:
        raise TypeError("with normalize=True initial_state must be a pair (state, normalizer)")
    state, normalizer = initial_state
    contract.check_argument("initial_state.state", state, q, shape, axes)
    contract.check_argument("initial_state.normalizer", normalizer, q, shape[:3], axes.replace(", value width", ""))
    return state, normalizer


def _is_step(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    normalizer: Tensor | None,
    causal: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> bool:
    """Whether this is one token of decoding, for which the CPU has a kernel of its own."""
    if backend != "cpu" or q.shape[1] != 1 or not causal or mask is not None or cu_seqlens is not None:
        return False
    tensors = (q, k, v, state, normalizer)
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return plain and not wanted and not torch.compiler.is_compiling()


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    normalizer: Tensor,
    scale: float,
    eps: float,
    return_state: bool,
) -> tuple[Tensor, NormalizedState | None]:
    output, total, after, after_normalizer = taylor_cpu.module.step(q[:, 0], k[:, 0], v[:, 0], state, normalizer, scale)
    output = (output / (total[..., None] + eps)).to(v.dtype)[:, None]
    return output, NormalizedState(after, after_normalizer) if return_state else None


def _run_causal(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpu":
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        operands = (x.contiguous() for x in (q, k, values, state))
        output, last = taylor_cpu(*operands, offsets, scale)
        return output, last
    if backend == "gpu":
        output, found = run_recurrence(
            linear_attention_reference,
            taylor_features(q, scale),
            taylor_features(k, scale),
            values,
            gates={},
            scale=1.0,
            initial_state=state,
            return_state=True,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend=backend,
        )
        assert found is not None
        return output, found
    query, key = q.to(values.dtype), k.to(values.dtype)
    if backend == "chunked":
        if cu_seqlens is None:
            return chunked.taylor_attention(query, key, values, state, scale, chunk_size)
        return chunked.packed_taylor_attention(query, key, values, state, cu_seqlens, scale, chunk_size)
    return each_sequence(
        lambda q, k, v, state: taylor_attention_reference(q, k, v, scale=scale, initial_state=state),
        (query, key, values),
        state,
        cu_seqlens,
    )


def _run_full(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    query, key = q.to(values.dtype), k.to(values.dtype)

    def attend(query: Tensor, key: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if backend == "reference":
            return full_taylor_attention_reference(query, key, values, scale=scale, initial_state=state)
        last = state + sum_features(key, values, scale)
        return read_features(query, last, scale), last

    if cu_seqlens is None:
        return attend(query, key, values, state)
    output = torch.zeros_like(values)
    for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
        own_query, own_key, own_values = (packing.take(x, group) for x in (query, key, values))
        o, last = attend(own_query, own_key, own_values, state[group.sequences])
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        state = state.index_put((group.sequences,), last)
    return output, state
