"""The recurrence in chunks of plain matrix products: any device, float64, differentiable any number of times.

Inside a chunk tokens meet directly, through ``M(x, y)_ij = sum_d x_id y_jd exp(G_id - G_jd)`` with G the decay summed
from the chunk's start; everything older is summed up in the state. With the delta rule the updates d of a chunk
solve one unit lower-triangular system (Yang et al. 2024b, section 3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

BOUND = 60.0  # nats of decay in a chunk up to which exp(G - m) exp(m - G), m = G_C / 2, loses nothing in float32
SUB_CHUNK = 16
FLOOR = -100.0  # a stronger decay is a reset in float32; -inf would meet -inf


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    value_log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens of a batch of sequences.

    Args:
        q: ``(B, T, H, K)``, float32 or float64 like all others.
        k, v: ``(B, T n, H, K)`` and ``(B, T n, H, V)``, n updates per token.
        log_decay: None, ``(H,)``, ``(B, T, H)`` or ``(B, T, H, K)``, at most 0; it acts before a token's first update.
        beta: ``(B, T n, H)``: the delta rule; None: nothing is erased.
        initial_state: ``(B, H, K, V)`` or None.
        value_log_decay: ``(B, T, H, V)`` or None; without beta only.

    Returns:
        ``(B, T, H, V)`` and the last state ``(B, H, K, V)``.
    """
    time = q.shape[1]
    updates = k.shape[1] // time
    chunk = min(chunk_size, time)
    padding = -time % chunk

    def chunks(x: Tensor, per_token: int = 1) -> Tensor:  # (B, T, H, *) -> (B, H, N, C, *)
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, padding * per_token))
        return x.unflatten(1, (-1, chunk * per_token)).movedim(3, 1)

    query, key, value = chunks(q) * scale, chunks(k, updates), chunks(v, updates)
    write = key if beta is None else key * chunks(beta, updates)[..., None]
    read_gate, update_gate = _gates(log_decay, chunks, time, updates, key)
    last = update_gate[..., -1:, :]

    attention = _pairs(query, write, read_gate, update_gate, _visible(chunk, updates, key.device, strict=False))
    query_from_start = query * read_gate.exp()
    write_to_end = write * (last - update_gate).exp()
    state_decay = last.mT.exp()

    if beta is not None:
        erase = _pairs(key, write, update_gate, update_gate, _visible(chunk * updates, 1, key.device, strict=True))
        eye = torch.eye(chunk * updates, dtype=key.dtype, device=key.device)
        from_values, from_state = torch.linalg.solve_triangular(
            erase + eye,
            torch.cat([value, (key * update_gate.exp()).expand_as(key)], dim=-1),
            upper=False,
            unitriangular=True,
        ).split([value.shape[-1], key.shape[-1]], dim=-1)
        state, states, written = _start(initial_state, key, value), [], []
        for n in range(key.shape[2]):
            states.append(state)
            written.append(from_values[:, :, n] - from_state[:, :, n] @ state)
            state = state_decay[:, :, n] * state + write_to_end[:, :, n].mT @ written[-1]
        output = query_from_start @ torch.stack(states, 2) + attention @ torch.stack(written, 2)
    else:
        value_gate = None if value_log_decay is None else chunks(value_log_decay.clamp(min=FLOOR)).cumsum(3)
        if value_gate is None:
            within, value_to_end, value_decay = attention @ value, value, torch.ones_like(state_decay[..., :1, :])
        else:
            value_last = value_gate[..., -1:, :]
            within = _weighted_values(attention, value, value_gate)
            value_to_end, value_decay = value * (value_last - value_gate).exp(), value_last.exp()
        added = write_to_end.mT @ value_to_end
        state, states = _start(initial_state, key, value), []
        for n in range(key.shape[2]):
            states.append(state)
            state = state_decay[:, :, n] * state * value_decay[:, :, n] + added[:, :, n]
        before = query_from_start @ torch.stack(states, 2)
        output = within + (before if value_gate is None else before * value_gate.exp())
    return output.movedim(1, 3).flatten(1, 2)[:, :time], state


def _start(initial_state: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state
    return key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])


def _visible(tokens: int, updates: int, device: torch.device, *, strict: bool) -> Tensor:
    """``(tokens, tokens * updates)``: the updates a token sees, up to its own last one (strict: before its own)."""
    column = torch.arange(tokens * updates, device=device)
    end = torch.arange(tokens, device=device)[:, None] * updates + (0 if strict else updates)
    return column < end


def _gates(
    log_decay: Tensor | None, chunks: Callable[[Tensor], Tensor], time: int, updates: int, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Decay summed from the chunk's start: at each read ``(B, H, N, C, 1 or K)``, at each update ``(..., C n, .)``."""
    if log_decay is None:
        zero = key.new_zeros(1, 1, key.shape[2], key.shape[3], 1)
        return zero[..., : key.shape[3] // updates, :], zero
    gate = log_decay.clamp(min=FLOOR)
    if gate.ndim == 1:  # constant: the padded tail of the last chunk must not decay
        gate = gate.expand(1, time, -1)
    if gate.ndim == 3:
        gate = gate[..., None]
    total = chunks(gate).cumsum(3)
    return total, total.repeat_interleave(updates, dim=3) if updates > 1 else total


def _pairs(x: Tensor, y: Tensor, x_gate: Tensor, y_gate: Tensor, visible: Tensor) -> Tensor:
    """M(x, y): ``sum_d x_id y_jd exp(x_gate_id - y_gate_jd)`` where visible, else 0."""
    if x_gate.shape[-1] == 1:  # one decay for all channels: masked before exp, the other half would overflow
        difference = (x_gate - y_gate.mT).where(visible, -torch.inf)
        return (x @ y.mT) * difference.exp()
    if is_bounded(y_gate):
        middle = y_gate[..., -1:, :] / 2
        scores = (x * (x_gate - middle).exp()) @ (y * (middle - y_gate).exp()).mT
        return scores.where(visible, 0)
    rows = []
    ratio = y.shape[-2] // x.shape[-2]
    for start in range(0, x.shape[-2], SUB_CHUNK):
        stop = min(start + SUB_CHUNK, x.shape[-2])
        first = start * ratio
        row, row_gate = x[..., start:stop, :], x_gate[..., start:stop, :]
        difference = row_gate[..., :, None, :] - y_gate[..., None, first : stop * ratio, :]
        near_visible = visible[start:stop, first : stop * ratio]
        difference = difference.where(near_visible[..., None], -torch.inf)
        near = torch.einsum("...ik,...jk,...ijk->...ij", row, y[..., first : stop * ratio, :], difference.exp())
        # tokens before the sub-chunk meet at the decay just before it: both exponents are at most 0
        parts = [near, near.new_zeros(*near.shape[:-1], y.shape[-2] - stop * ratio)]
        if start:
            meeting = y_gate[..., first - 1 : first, :]
            earlier = y[..., :first, :] * (meeting - y_gate[..., :first, :]).exp()
            parts.insert(0, (row * (row_gate - meeting).exp()) @ earlier.mT)
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows, dim=-2)


def _weighted_values(attention: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """``sum_j attention_ij value_jv exp(gate_iv - gate_jv)``: values that fade channel by channel."""
    if is_bounded(gate):
        middle = gate[..., -1:, :] / 2
        return (attention @ (value * (middle - gate).exp())) * (gate - middle).exp()
    length = value.shape[-2]
    visible = torch.ones(length, length, dtype=torch.bool, device=value.device).tril()
    outputs = []
    for i in range(length):  # row by row: the exact sum would hold C x C x V numbers per chunk
        difference = (gate[..., i : i + 1, :] - gate).where(visible[i, :, None], -torch.inf)
        outputs.append(torch.einsum("...j,...jv->...v", attention[..., i, :], value * difference.exp()))
    return torch.stack(outputs, dim=-2)


def is_bounded(gate: Tensor) -> bool:
    """Whether one matrix product is exact enough; while a graph is being traced no value can be read, so no."""
    return not torch.compiler.is_compiling() and bool(gate[..., -1, :].min() > -BOUND)
