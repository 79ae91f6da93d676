"""The door to xLSTM's matrix memory: gated linear attention over what the largest exponent leaves."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.ops import _contract as contract
from subquad.ops._packed import each_sequence
from subquad.ops.gla import simple_gla
from subquad.ops.mlstm.reference import State, mlstm_reference

GONE = -1e4  # nats: below it a factor is 0 in every dtype


class MLSTMState(NamedTuple):
    """The memory after the tokens so far; matrix and normaliser are divided by ``e^maximum``."""

    state: Tensor  # (B, H, K, V) float32
    normalizer: Tensor  # (B, H, K)
    maximum: Tensor  # (B, H), the largest exponent


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState | None]:
    """xLSTM's matrix memory: linear attention with an exponential input and a sigmoid forget gate (Beck et al. 2024).

    ``C_t = f_t C_{t-1} + i_t k_t v_t^T``, ``n_t = f_t n_{t-1} + i_t k_t``, ``h_t = C_t^T q_t / max(|n_t . q_t|, 1)``
    with ``f = sigmoid(forget_gate)`` and ``i = exp(input_gate)``, all kept over ``e^m``, m the largest exponent so far,
    which starts from 0. The divisor is ``max(|n . q|, e^{-m}) + eps`` there, as the authors have it.

    Args:
        q, k: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        v: ``(B, T, H, V)``.
        input_gate, forget_gate: ``(B, T, H)``, logits; give them in float32.
        scale: of the queries; None is ``K**-0.5``.
        eps: added to the divisor.
        initial_state: matrix ``(B, H, K, V)``, normaliser ``(B, H, K)`` and maximum ``(B, H)``, as transformers keeps
            them; zeros if not given. Packed: one row per sequence.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        chunk_size: tokens per chunk; changes speed, not the result.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. The maxima are
            plain torch, the memory is :func:`simple_gla`.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example:
        >>> one, gate = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1)
        >>> mlstm(one, one, one * 3, gate, gate + 30, eps=0.0)[0].flatten().tolist()
        [3.0, 3.0]
    """
    contract.check_qkv(q, k, v)
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        contract.check_argument(name, gate, q, q.shape[:3], "(batch, time, heads)")
    contract.check_scale(scale)
    contract.check_chunk_size(chunk_size)
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps must be a number >= 0; got {eps!r}")
    contract.check_cu_seqlens(cu_seqlens, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    accumulate = contract.accumulation_dtype(q)
    start = _start(initial_state, q, v, cu_seqlens, accumulate)
    query, key, value, added, forget = (x.to(accumulate) for x in (q, k, v, input_gate, forget_gate))
    log_forget = F.logsigmoid(forget)
    one_token = q.shape[1] == 1 and cu_seqlens is None  # the definition has no loop left
    if backends.resolve(backend, q.device, q.dtype) == "reference" or one_token:
        h, last = each_sequence(
            lambda *tokens: mlstm_reference(*tokens[:-1], scale=scale, eps=eps, state=tokens[-1]),
            (query, key, value, added, log_forget),
            start,
            cu_seqlens,
        )
        return h.to(v.dtype), MLSTMState(*last) if return_state else None

    first, ends = _sequences(start[2], q.shape[1], cu_seqlens)
    maximum = running_maxima(log_forget.double(), added.double(), first.double())
    before = torch.where(first.isnan(), maximum.roll(1, dims=1), first.double())
    log_decay = log_forget.double() + before - maximum
    log_decay = (log_decay - log_decay.clamp(min=0).detach()).clamp(min=GONE)  # rounding may leave it above 0
    write = torch.exp(added.double() - maximum).to(accumulate)
    joined, state = simple_gla(
        query,
        write[..., None] * key,
        torch.cat([value, value.new_ones(1).expand(*value.shape[:3], 1)], dim=-1),  # one more column: the normaliser
        log_decay.to(accumulate),
        scale=scale,
        initial_state=None if initial_state is None else torch.cat([start[0], start[1][..., None]], dim=-1),
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
    )
    divisor = torch.maximum(joined[..., -1:].abs(), torch.exp(-maximum[..., None]).to(accumulate)) + eps
    h = (joined[..., :-1] / divisor).to(v.dtype)
    if state is None:
        return h, None
    last_maximum = maximum[:, -1] if ends is None else maximum[0, ends.clamp(min=1) - 1]
    if ends is not None:  # an empty sequence keeps what it had
        last_maximum = torch.where(_sizes(cu_seqlens)[:, None] > 0, last_maximum, start[2].double())
    return h, MLSTMState(state[..., :-1], state[..., -1], last_maximum.to(accumulate))


def running_maxima(log_forget: Tensor, input_gate: Tensor, first: Tensor) -> Tensor:
    """``m_t = max(log_forget_t + m_{t-1}, input_gate_t)``, all ``(B, T, H)``, by doubling: log2 T steps over all.

    Where a sequence begins, ``first`` holds what m was before it; NaN elsewhere.
    """
    inside = first.isnan()
    best = torch.maximum(input_gate, torch.where(inside, -torch.inf, log_forget + first.nan_to_num()))
    reach = log_forget.where(inside, -torch.inf)  # what lies before a beginning never gets past it
    step, time = 1, best.shape[1]
    while step < time:
        best = torch.cat([best[:, :step], torch.maximum(best[:, step:], reach[:, step:] + best[:, :-step])], dim=1)
        reach = torch.cat([reach[:, :step], reach[:, step:] + reach[:, :-step]], dim=1)
        step *= 2
    return best


def _sequences(maximum: Tensor, time: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``first`` of :func:`running_maxima` from the maxima of the states, and where packed sequences end."""
    if cu_seqlens is None:
        rest = maximum.new_full((maximum.shape[0], time - 1, maximum.shape[1]), torch.nan)
        return torch.cat([maximum[:, None], rest], dim=1), None
    sequence, place, _ = packing.locate(cu_seqlens, time)
    first = torch.where((place == 0)[:, None], maximum[sequence], torch.nan)
    return first[None], cu_seqlens[1:].to(torch.int64)


def _sizes(cu_seqlens: Tensor | None) -> Tensor:
    assert cu_seqlens is not None
    return cu_seqlens.diff()


def _start(given: object, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> State:
    rows, heads, width = contract.number_of_states(q, cu_seqlens), q.shape[2], q.shape[3]
    shapes = (rows, heads, width, v.shape[3]), (rows, heads, width), (rows, heads)
    if given is None:
        return tuple(q.new_zeros(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise TypeError("initial_state must be three tensors: matrix, normaliser, maximum")
    axes = "(batch or packed sequences, heads, ...)"
    for name, x, shape in zip(MLSTMState._fields, given, shapes):
        contract.check_argument(f"initial_state.{name}", x, q, shape, axes)
    return tuple(x.to(dtype) for x in given)
