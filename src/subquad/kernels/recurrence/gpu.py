"""The recurrence on a GPU by Triton: S_t = diag(e^g) S - erase + w d^T, o = scale S^T q, forward, step and backward.

Chunked form of Yang et al. 2024 ("Gated Linear Attention Transformers", section 4, and "Parallelizing Linear
Transformers with the Delta Rule over Sequence Length", section 3), with no decay, one per head, per token, or per
channel, with or without the delta rule's erase, and any number of updates per token. Kernels and their launches are in
:mod:`.gpu_forward` and :mod:`.gpu_backward`. Tile sizes and warps come from small static tables, chosen from what the
compiler reports for an H100 (registers, shared memory), not from timings.

Products take bfloat16 operands for bfloat16 inputs, tf32 ones for float16 inputs (as fine, and no overflow in the
state), and three tf32 products for float32 inputs. The erase takes at least tf32 whatever the inputs, and solves in
float32. States, sums and gates are float32 always.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything runs on CPU tensors, slowly.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from subquad.kernels.recurrence.gpu_backward import backward
from subquad.kernels.recurrence.gpu_forward import chunk_outputs, chunk_states, scores_and_inverse, step_kernel
from subquad.kernels.recurrence.gpu_tiles import Layout, chunk_length, slot_count, tile_width

__all__ = ["backward", "forward", "saved_shapes", "step"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output ``(B, T, H, V)`` in v's dtype, final state ``(N, H, K, V)`` float32, and what :func:`backward` wants.

    ``q (B, T, H, K)``; ``k (B, T n, H, K)``, ``v (B, T n, H, V)`` of one dtype, contiguous, ``n`` updates per token;
    ``log_decay`` float32, None, ``(H,)``, ``(B, T, H)`` or ``(B, T, H, K)``, at most 0 (below -100 counts as -100);
    ``beta (B, T n, H)`` float32, or None for no erase; ``initial_state (N, H, K, V)`` float32 or None;
    ``cu_seqlens (N + 1,)`` int64 with B = 1, or None (then N = B). Chunks have 16, 32 or 64 rows, the length nearest to
    ``chunk_size``. The last two results are empty unless ``save``: the state before each chunk, and with an erase the
    updates d.

    Raises ValueError for more than 256 key channels.
    """
    layout = Layout.of(q, k, v, log_decay, beta, cu_seqlens, scale, chunk_size)
    with torch.cuda.device_of(q):
        scores, inverse = scores_and_inverse(q, k, log_decay, beta, layout)
        states, updates, final_state = chunk_states(k, v, log_decay, beta, inverse, initial_state, layout)
        del inverse
        o = chunk_outputs(q, v if updates is None else updates, log_decay, scores, states, v.dtype, layout)
    nothing = final_state.new_empty(0)
    return o, final_state, states if save else nothing, updates if save and updates is not None else nothing.clone()


def saved_shapes(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_width: int,
    log_decay_ndim: int | None,
    has_beta: bool,
    N: int,
    chunk_size: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two saved tensors of :func:`forward` with ``save=True``, for ``N`` sequences."""
    batch, rows, heads, key_width = k_shape
    states = (slot_count(batch, rows, N, chunk_length(chunk_size, key_width)), heads, key_width, v_width)
    return states, (batch, rows, heads, v_width) if has_beta else (0,)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token: output ``(B, H, V)`` in v's dtype and the new state, a fresh tensor.

    ``q (B, H, K)``, ``k (B, n, H, K)``, ``v (B, n, H, V)``, ``log_decay`` None, ``(H,)``, ``(B, H)`` or ``(B, H, K)``,
    ``beta (B, n, H)`` or None, ``state (B, H, K, V)`` float32. Raises ValueError for more than 256 key channels.
    """
    per_token = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, None]
    layout = Layout.of(q[:, None], k, v, per_token, beta, None, scale, 16)
    o = torch.empty(*q.shape[:2], layout.value_width, dtype=v.dtype, device=v.device)
    new_state = torch.empty_like(state)
    block_k = tile_width(layout.key_width, 256)
    block_v = tile_width(layout.value_width, 4096 // block_k)
    with torch.cuda.device_of(q):
        step_kernel[(layout.sequences * layout.heads, triton.cdiv(layout.value_width, block_v))](
            q,
            k,
            v,
            log_decay,
            beta,
            state,
            o,
            new_state,
            layout.heads,
            scale,
            layout.value_width,
            K=layout.key_width,
            UPDATES=layout.updates,
            DECAY=layout.decay,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
        )
    return o, new_state
