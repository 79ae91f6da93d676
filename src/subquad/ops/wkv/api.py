"""The door to RWKV-4's weighted average."""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.scan.wkv import OPERATORS, chunked, maxima, packed_chunked
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence
from subquad.ops.wkv.reference import State, wkv_reference

EMPTY = -1e38  # the maximum before any token, as in the authors' code: finite, and below whatever comes


class WKVState(NamedTuple):
    """Sums over the tokens so far, both divided by ``e^maximum``."""

    numerator: Tensor  # (B, D) float32, of e^k v
    denominator: Tensor  # (B, D), of e^k
    maximum: Tensor  # (B, D), the largest exponent


def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    initial_state: WKVState | tuple[Tensor, Tensor, Tensor] | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WKVState | None]:
    """RWKV-4's average of values under decaying exponential keys, per channel (Peng et al. 2023, eq. 16).

    ``o_t = (sum_{j<t} e^{-(t-1-j) w + k_j} v_j + e^{u + k_t} v_t) / (the same without v)`` with ``w = e^time_decay``
    and ``u = time_first``; every exponent is taken over the largest.

    Args:
        k, v: ``(B, T, D)``, one of float64, float32, bfloat16, float16.
        time_decay: ``(D,)``, the logarithm of the rate w, as the model's parameter is.
        time_first: ``(D,)``, what is added to the key of the token itself.
        initial_state: numerator, denominator and maximum, each ``(B, D)``, as transformers keeps them; none if not
            given. Packed: one row per sequence.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning.

    Returns:
        The average ``(B, T, D)`` in v's dtype, and the last state or None.

    Raises:
        ValueError, TypeError: a shape, dtype or name that does not fit; the message says what is needed.

    Example:
        >>> k, v, zero = torch.zeros(1, 3, 1), torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1), torch.zeros(1)
        >>> wkv(k, v, torch.full((1,), -torch.inf), zero)[0].flatten().tolist()  # no decay: means so far
        [1.0, 2.0, 4.0]
    """
    contract.check_tensor("k", k, 3, "(batch, time, channels)")
    contract.check_not_empty("k", k)
    contract.check_argument("v", v, k, k.shape, "(batch, time, channels)")
    contract.check_same_kind("v", v, k)
    channels = k.shape[2]
    contract.check_argument("time_decay", time_decay, k, (channels,), "(channels,)")
    contract.check_argument("time_first", time_first, k, (channels,), "(channels,)")
    contract.check_cu_seqlens(cu_seqlens, k)
    accumulate = contract.accumulation_dtype(k)
    state = _start(initial_state, k, (contract.number_of_states(k, cu_seqlens), channels), accumulate)
    log_decay, first = -torch.exp(time_decay.to(accumulate)), time_first.to(accumulate)
    watch = dynamics.watching("wkv", initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    if watch is not None:
        h, _ = watch.take(_system(k, v, log_decay, first, state))
        return h[..., 0], None
    chosen = backends.resolve(backend, k.device, k.dtype)
    one_token = k.shape[1] == 1 and cu_seqlens is None  # the definition has no loop left, and costs less than a kernel
    if chosen in OPERATORS and not one_token:
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        o, *last = OPERATORS[chosen](k, v, log_decay, first, *state, offsets)
        return o, WKVState(*last) if return_state else None
    key, value = k.to(accumulate), v.to(accumulate)
    if chosen == "reference" or one_token:
        o, final = each_sequence(
            lambda k, v, state: wkv_reference(k, v, log_decay, first, state), (key, value), state, cu_seqlens
        )
    elif cu_seqlens is None:
        o, final = chunked(key, value, log_decay, first, state)
    else:
        o, final = packed_chunked(key, value, log_decay, first, state, cu_seqlens)
    return o.to(v.dtype), WKVState(*final) if return_state else None


def _start(given: object, k: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> State:
    if given is None:
        zero = k.new_zeros(shape, dtype=dtype)
        return zero, zero.clone(), torch.full_like(zero, EMPTY)
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise TypeError("initial_state must be three tensors: numerator, denominator, maximum")
    for name, x in zip(WKVState._fields, given):
        contract.check_argument(f"initial_state.{name}", x, k, shape, "(batch or packed sequences, channels)")
    return tuple(x.to(dtype) for x in given)


def _system(k: Tensor, v: Tensor, log_decay: Tensor, time_first: Tensor, state: State) -> dynamics.RecurrentSystem:
    """A channel is a head with two numbers of state: the sum of the past, and the token itself, which has a weight of
    its own and is gone at the next one."""
    key, decay, first = k.double(), log_decay.double(), time_first.double()
    steps = torch.arange(1, k.shape[1] + 1, device=k.device, dtype=torch.float64)[None, :, None]
    top = maxima(key, decay, state[2], steps)
    before = torch.cat([state[2].double()[:, None], top[:, :-1]], dim=1)
    kept, added = torch.exp(decay + before - top), torch.exp(key - top)
    mass = torch.stack(_masses(kept, added), dim=1)  # before each token
    largest = torch.maximum(before, first + key)
    past, now = torch.exp(before - largest), torch.exp(first + key - largest)
    whole = past * mass + now
    some = before > EMPTY / 2
    back = torch.exp((top - largest - decay).where(some, -torch.inf)) / whole  # reads the sum before this token's decay
    read = torch.stack([back, now / whole - back * added], dim=-1)
    write = torch.stack([added, torch.ones_like(added)], dim=-1)
    return dynamics.RecurrentSystem(
        "wkv",
        v[:, :, None, :, None],
        decay=torch.stack([kept, torch.zeros_like(kept)], dim=-1),
        write=write[:, :, None],
        read=read,
    )


def _masses(kept: Tensor, added: Tensor) -> list[Tensor]:
    masses = [torch.zeros_like(added[:, 0])]
    for kept_t, added_t in zip(kept.unbind(1)[:-1], added.unbind(1)[:-1]):
        masses.append(kept_t * masses[-1] + added_t)
    return masses
