"""The doors to the neural memory: learning while reading, and reading alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels import backends, packing
from subquad.kernels.recurrence.checks import check_offsets
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops.neural_memory.chunked import neural_memory_chunked
from subquad.ops.neural_memory.network import Descent, MemoryNetwork
from subquad.ops.neural_memory.reference import neural_memory_reference

NO_KERNEL = dict.fromkeys(("cpu", "gpu"), "the neural memory is matrix products in plain torch; use 'chunked'")


class NeuralMemoryState(NamedTuple):
    """What a neural memory carries. The weights of all layers of a head lie one after another in N values."""

    weights: Tensor  # (B, H, N) float32, the network
    surprise: Tensor  # (B, H, N) float32, the momentum of its updates
    start: Tensor  # (B, H, N) float32, the network before the first token of the open chunk
    filled: Tensor  # (B,) int64, tokens in the open chunk


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_residual: bool = False,
    max_grad_norm: float | None = None,
    lengths: Tensor | None = None,
    initial_state: NeuralMemoryState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, NeuralMemoryState | None]:
    """A network M that learns ``M(k_t) = v_t`` by a step of descent per token, then answers q_t (Behrouz et al. 2025)::

        S_t = momentum_t S_{t-1} - step_t grad |M(k_t) - v_t|^2
        M_t = (1 - forget_t) M_{t-1} + S_t
        o_t = M_t(q_t)

    M is L linear layers with GELU between them. Gradients are taken at the weights before the first token of the
    token's chunk: ``chunk_size`` is part of the meaning, and 1 is the paper's recurrence (equations 13 and 14).

    Args:
        q, k: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16; k of unit length keeps steps comparable.
        v: ``(B, T, H, V)``.
        forget, momentum: ``(B, T, H)`` in [0, 1].
        step: ``(B, T, H)``, at least 0. C equal tokens in a chunk step at once: above 1 / C they overshoot.
        weights: of the layers, L >= 1 tensors ``(H, K, d_1), (H, d_1, d_2), ..., (H, d_{L-1}, V)``: M before any token.
        norm_residual: ``x + LayerNorm(M(x))`` in place of ``M(x)``; needs K = V.
        max_grad_norm: longer gradients of a token are shortened to this length; None: none is.
        lengths: ``(B,)`` integers, how many first tokens of a row are real; the others change nothing and give zero.
        initial_state: of the tokens before the first one, in place of ``weights``. Packed: N rows.
        return_state: whether to return the state after the last token, float32.
        cu_seqlens: ``(N + 1,)`` int32 or int64, where N packed sequences begin and end in a batch of one. A grid of
            chunks begins with each.
        chunk_size: C.
        backend: ``auto``, ``reference`` or ``chunked``; there is no kernel of its own for CPU or GPU.

    Returns:
        The output ``(B, T, H, V)`` in v's dtype, and the last state or None. Learning goes on at inference: the state
        of one call is the ``initial_state`` of the next.

    Raises:
        ValueError, TypeError: a shape, dtype, range or name that does not fit; the message says what is needed.

    Example: a linear memory is told 4 under the key 1; half a step towards it is ``2 * step * (4 - 0)``.
        >>> k = torch.ones(1, 2, 1, 1)
        >>> zero = torch.zeros(1, 2, 1)
        >>> step = torch.tensor([0.25, 0.0]).view(1, 2, 1)
        >>> neural_memory(k, k, 4 * k, zero, zero, step, [torch.zeros(1, 1, 1)])[0].flatten().tolist()
        [2.0, 2.0]
    """
    contract.check_qkv(q, k, v)
    network = _checked_network(q, v, weights, norm_residual)
    dynamics.refuse_nonlinear("neural_memory", "what it learns depends on what it already answers")
    for name, gate in (("forget", forget), ("momentum", momentum), ("step", step)):
        contract.check_argument(name, gate, q, q.shape[:3], "(batch, time, heads)")
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None; got {max_grad_norm!r}")
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point():
            raise TypeError(
                f"lengths must be an integer tensor (batch,); got {getattr(lengths, 'dtype', type(lengths))}"
            )
        if cu_seqlens is not None or tuple(lengths.shape) != (q.shape[0],):
            raise ValueError(f"lengths must be (batch,) = {(q.shape[0],)} integers, and not given with cu_seqlens")
    rows, heads = contract.number_of_states(q, cu_seqlens), q.shape[2]
    if initial_state is not None:
        _check_state(initial_state, q, (rows, heads, network.num_weights), chunk_size)
    chosen = backends.resolve(backend, q.device, q.dtype, NO_KERNEL)
    if contract.values_may_be_read(q):
        _check_gates(forget, momentum, step)

    descent = Descent(network, chunk_size, max_grad_norm)
    accumulate = contract.accumulation_dtype(q)
    from_start = initial_state is None or (
        contract.values_may_be_read(q) and not bool(initial_state.filled.any())  # all chunks begin with the first token
    )
    state = _first_state(weights, rows, accumulate) if initial_state is None else initial_state
    state = NeuralMemoryState(
        state.weights.to(accumulate),
        state.surprise.to(accumulate),
        state.start.to(accumulate),
        state.filled.to(torch.int64),
    )
    operands = [x.to(accumulate) for x in (q, k, v, forget, momentum, step)]
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            output, last = _rows(operands, state, lengths, descent, chosen, from_start, return_state)
        else:
            output, last = _packed(operands, state, cu_seqlens, descent, chosen, from_start, return_state)
    return output.to(v.dtype), last if return_state else None


def neural_memory_read(
    q: Tensor, weights: Tensor, widths: Sequence[int], *, norm_residual: bool = False
) -> tuple[Tensor, None]:
    """``M(q)`` without learning (Behrouz et al. 2025, eq. 15).

    Args:
        q: ``(B, T, H, K)``, one of float64, float32, bfloat16, float16.
        weights: ``(B, H, N)``, those of a :class:`NeuralMemoryState`.
        widths: ``(K, d_1, ..., V)``, of the layers.
        norm_residual: see :func:`neural_memory`.

    Returns:
        The output ``(B, T, H, V)`` in q's dtype, and None: nothing is carried.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit; the message says what is needed.

    Example:
        >>> neural_memory_read(torch.ones(1, 1, 1, 2), torch.tensor([[[3.0, 4.0]]]), (2, 1))[0].item()
        7.0
    """
    contract.check_tensor("q", q, 4, "(batch, time, heads, key width)")
    contract.check_not_empty("q", q)
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1 or widths[0] != q.shape[3]:
        raise ValueError(f"widths must be two or more, the first that of q, {q.shape[3]}; got {widths}")
    _check_residual(widths, norm_residual)
    network = MemoryNetwork(widths, norm_residual)
    shape = (q.shape[0], q.shape[2], network.num_weights)
    contract.check_argument("weights", weights, q, shape, "(batch, heads, weights)")
    accumulate = torch.promote_types(contract.accumulation_dtype(q), weights.dtype)
    with torch.autocast(q.device.type, enabled=False):
        layers = network.layers(weights.to(accumulate))
        output = network.output(layers, q.to(accumulate).transpose(1, 2)).transpose(1, 2)
    return output.to(q.dtype), None


def _checked_network(q: Tensor, v: Tensor, weights: Sequence[Tensor], norm_residual: bool) -> MemoryNetwork:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(
            "weights must be a list of one or more tensors (heads, width in, width out), one per layer; "
            f"got {type(weights).__name__}"
        )
    heads, width = q.shape[2:]
    widths = [width]
    for number, layer in enumerate(weights):
        contract.check_tensor(f"weights[{number}]", layer, 3, "(heads, width in, width out)")
        contract.check_not_empty(f"weights[{number}]", layer)
        out = v.shape[3] if number == len(weights) - 1 else layer.shape[2]
        contract.check_argument(
            f"weights[{number}]", layer, q, (heads, widths[-1], out), "(heads, width in, width out)"
        )
        widths.append(out)
    _check_residual(tuple(widths), norm_residual)
    return MemoryNetwork(tuple(widths), norm_residual)


def _check_residual(widths: tuple[int, ...], norm_residual: bool) -> None:
    if norm_residual and widths[0] != widths[-1]:
        raise ValueError(f"norm_residual adds the input to the output: K must equal V; got {widths[0]}, {widths[-1]}")


def _check_state(state: NeuralMemoryState, q: Tensor, shape: tuple[int, int, int], chunk_size: int) -> None:
    if not isinstance(state, NeuralMemoryState):
        raise TypeError(f"initial_state must be a NeuralMemoryState; got {type(state).__name__}")
    axes = "(batch or packed sequences, heads, weights)"
    for name, leaf in zip(state._fields[:3], state[:3]):
        contract.check_argument(f"initial_state.{name}", leaf, q, shape, axes)
    filled = state.filled
    if tuple(filled.shape) != shape[:1] or filled.is_floating_point() or filled.device != q.device:
        raise ValueError(f"initial_state.filled must be integers of shape {shape[:1]} on {q.device}")
    if contract.values_may_be_read(q) and bool(((filled < 0) | (filled >= chunk_size)).any()):
        raise ValueError(
            f"initial_state.filled must lie in [0, chunk_size {chunk_size}): a state belongs to the chunk size that "
            f"made it; got {filled.tolist()}"
        )


def _check_gates(forget: Tensor, momentum: Tensor, step: Tensor) -> None:
    for name, gate, low, high in (("forget", forget, 0, 1), ("momentum", momentum, 0, 1), ("step", step, 0, None)):
        outside = gate < low
        if high is not None:
            outside = outside | (gate > high)
        if bool(outside.any()):
            smallest, largest = (float(x) for x in gate.nan_to_num(0.0).aminmax())
            wanted = "be at least 0" if high is None else f"lie in [{low}, {high}]"
            raise ValueError(f"{name} must {wanted}; it ranges over [{smallest:.4g}, {largest:.4g}]")


def _first_state(weights: Sequence[Tensor], rows: int, dtype: torch.dtype) -> NeuralMemoryState:
    flat = torch.cat([layer.to(dtype).flatten(1) for layer in weights], dim=-1).expand(rows, -1, -1)
    filled = torch.zeros(rows, dtype=torch.int64, device=flat.device)
    return NeuralMemoryState(flat, torch.zeros_like(flat), flat, filled)


def _rows(
    operands: list[Tensor],
    state: NeuralMemoryState,
    lengths: Tensor | None,
    descent: Descent,
    backend: str,
    from_start: bool,
    return_state: bool,
) -> tuple[Tensor, NeuralMemoryState]:
    if backend == "reference":
        rows, time = operands[0].shape[:2]
        real = torch.full((rows,), time, device=operands[0].device) if lengths is None else lengths
        output, last = neural_memory_reference(*operands, state=state, lengths=real, descent=descent)
    else:
        output, last = neural_memory_chunked(
            *operands, state=state, lengths=lengths, from_start=from_start, return_state=return_state, descent=descent
        )
    return output, NeuralMemoryState(*last)


def _packed(
    operands: list[Tensor],
    state: NeuralMemoryState,
    cu_seqlens: Tensor,
    descent: Descent,
    backend: str,
    from_start: bool,
    return_state: bool,
) -> tuple[Tensor, NeuralMemoryState]:
    """Sequences of similar length as the rows of a batch; empty ones keep their state."""
    q, v = operands[0], operands[2]
    output = q.new_zeros(*q.shape[:3], v.shape[3])
    last = state
    for group in packing.by_length(check_offsets(cu_seqlens, q.shape[1]), q.device):
        own = NeuralMemoryState(*(x[group.sequences] for x in state))
        lengths = None if bool(group.real.all()) else group.real.sum(1)
        pieces = [packing.take(x, group) for x in operands]
        o, after = _rows(pieces, own, lengths, descent, backend, from_start, return_state)
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        last = NeuralMemoryState(*(x.index_put((group.sequences,), y) for x, y in zip(last, after)))
    return output, last
