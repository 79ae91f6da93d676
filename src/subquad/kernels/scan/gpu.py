"""The selective scan on a GPU by Triton: one program per sequence and block of channels, walking over the tokens.

Forward, backward and one token, after Gu and Dao 2023, algorithm 2 and section 3.3.2: the states of a program's
channels stay in registers, ``(channels, states)``, and never reach memory but every ``CHUNK`` tokens, from where the
backward pass computes them anew into a scratch of one chunk. Sums over channels (dB, dC) are taken per block and added
up by torch, so that results do not depend on the order in which programs run. Everything is summed in float32.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything runs on CPU tensors, slowly.
"""

import torch
from torch import Tensor

from subquad.kernels.scan.gpu_tiles import CHUNK, Grid, sequence_places
from subquad.kernels.scan.gpu_walks import backward_kernel, forward_kernel

__all__ = ["backward", "forward", "saved_shape", "step"]


def saved_shape(batch: int, time: int, channels: int, states: int, sequences: int) -> tuple[int, ...]:
    """Shape of what ``forward`` keeps for ``backward``: the state before every chunk but the first."""
    return batch * ((time - 1) // CHUNK), channels, states


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y (B, T, D)`` in u's dtype, the last state float32, and kept states if ``save``; as :func:`.cpu.forward`."""
    batch, time, channels = u.shape
    states, groups = A.shape[1], B.shape[2]
    starts, kept_starts = sequence_places(batch, time, cu_seqlens, u.device)
    sequences = len(starts) - 1
    y = u.new_empty(u.shape)
    last = u.new_empty(sequences, channels, states, dtype=torch.float32)
    shape = saved_shape(batch, time, channels, states, sequences) if save else (0, 0, 0)
    saved = u.new_zeros(shape, dtype=torch.float32)
    grid = Grid.of(channels, states, groups)
    with torch.cuda.device_of(u):
        forward_kernel[(sequences * groups * grid.blocks,)](
            *(x if x is None else x.contiguous() for x in (u, delta, A, B, C, D, delta_bias, gate, initial_state)),
            starts,
            kept_starts,
            y,
            last,
            saved if save else None,
            channels,
            states,
            groups,
            grid.blocks,
            CHUNK=CHUNK,
            BLOCK_D=grid.block_d,
            BLOCK_N=grid.block_n,
            num_warps=grid.warps,
        )
    return y, last, saved


def step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: ``y (B, 1, D)`` and the state after it, a fresh tensor. The walk of one token is its own kernel."""
    y, last, _ = forward(u, delta, A, B, C, D, delta_bias, gate, state, None, False)
    return y, last


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias, gate and the initial state; empty for what is absent."""
    batch, time, channels = u.shape
    states, groups = A.shape[1], B.shape[2]
    starts, kept_starts = sequence_places(batch, time, cu_seqlens, u.device)
    sequences, grid = len(starts) - 1, Grid.of(channels, states, groups)
    programs = sequences * groups * grid.blocks

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    grad_gate = None if gate is None else gate.new_empty(gate.shape)
    grad_a, grad_initial = empty(sequences, channels, states), empty(sequences, channels, states)
    grad_channels = empty(2, sequences, channels)  # of D and of the bias
    grad_shared = empty(2, grid.blocks, batch * time, groups, states)  # of B and of C
    scratch = empty(programs, CHUNK, grid.block_d, grid.block_n)
    with torch.cuda.device_of(u):
        backward_kernel[(programs,)](
            grad_y.contiguous(),
            grad_state.contiguous(),
            *(x if x is None else x.contiguous() for x in (u, delta, A, B, C, D, delta_bias, gate, initial_state)),
            starts,
            kept_starts,
            saved,
            scratch,
            grad_u,
            grad_delta,
            grad_gate,
            grad_a,
            grad_channels,
            grad_shared,
            grad_initial,
            sequences,
            batch * time,
            channels,
            states,
            groups,
            grid.blocks,
            CHUNK=CHUNK,
            BLOCK_D=grid.block_d,
            BLOCK_N=grid.block_n,
            num_warps=grid.warps,
        )
    by_channel, shared = grad_channels.sum(1), grad_shared.sum(1)
    return (
        grad_u,
        grad_delta,
        grad_a.sum(0).to(A.dtype),
        shared[0].view(B.shape).to(B.dtype, copy=True),
        shared[1].view(C.shape).to(C.dtype, copy=True),
        u.new_empty(0) if D is None else by_channel[0].to(D.dtype, copy=True),
        u.new_empty(0) if delta_bias is None else by_channel[1].to(delta_bias.dtype, copy=True),
        u.new_empty(0) if grad_gate is None else grad_gate,
        u.new_empty(0) if initial_state is None else grad_initial,
    )
