"""What the recurrence's Triton kernels share: which rows a program works on, tiles of memory, decays inside a chunk.

Rows are updates: a token has ``UPDATES`` of them, the decay applies before its first, the query reads after its last.
A sequence is cut into chunks of ``CHUNK`` rows; every chunk owns a *slot*, the index of its state in the saved tensor.
Sums of log decays run over the tokens between two rows, all of one sign: nothing cancels, no exponent is positive.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_SIZES = (16, 32, 64)
MAX_KEY_WIDTH = 256
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def chunk_length(chunk_size: int, key_width: int) -> int:
    """The chunk length that the kernels have, nearest to ``chunk_size`` (the longer one when two are as near).

    Above 128 key channels at most 32: a chunk of 64 rows would not fit the registers beside the state.
    """
    length = min(CHUNK_SIZES, key=lambda length: (abs(length - chunk_size), -length))
    return length if key_width <= 128 else min(length, 32)


def tile_width(width: int, most: int) -> int:
    """The tile for ``width`` columns: a power of two, at least the 16 that ``tl.dot`` needs and at most ``most``."""
    return min(most, max(16, triton.next_power_of_2(width)))


@dataclass(frozen=True)
class Layout:
    """The sizes of one call, where its chunks lie, and the constants that select a kernel's variant."""

    rows: int
    tokens: int
    heads: int
    key_width: int
    value_width: int
    sequences: int
    updates: int
    chunk: int
    slots_per_sequence: int
    slots: int
    decay: str
    erase: bool
    dot_type: tl.dtype
    precision: str
    scale: float
    cu_seqlens: Tensor | None
    slot_bounds: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> "Layout":
        """Sizes are read from shapes; packed boundaries stay on their device, so that nothing waits for the GPU."""
        batch, tokens, heads, key_width = q.shape
        if key_width > MAX_KEY_WIDTH:
            raise ValueError(
                f"the gpu recurrence keeps all key channels of a head in one tile and takes at most {MAX_KEY_WIDTH}; "
                f'q and k have {key_width}. Use backend="chunked" for wider keys.'
            )
        chunk = chunk_length(chunk_size, key_width)
        rows = k.shape[1]
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        kinds = {None: "none", 1: "constant", 3: "scalar", 4: "vector"}
        slots = slot_count(batch, rows, sequences, chunk)
        updates = rows // tokens
        return cls(
            rows=rows,
            tokens=tokens,
            heads=heads,
            key_width=key_width,
            value_width=v.shape[-1],
            sequences=sequences,
            updates=updates,
            chunk=chunk,
            slots_per_sequence=slots // batch,
            slots=slots,
            decay=kinds[None if log_decay is None else log_decay.ndim],
            erase=beta is not None,
            # float16 would overflow where the state is an operand: its products run on tf32, as fine and wider.
            # With an erase, the updates that one key at beta = 2 leaves in a chunk alternate in sign and cancel in the
            # state and the outputs: rounded to bfloat16 they would be off by several percent.
            dot_type=tl.bfloat16 if q.dtype == torch.bfloat16 and beta is None else tl.float32,
            # three tf32 products together are as fine as float32; exact float32 products would not use the tensor cores
            precision="tf32x3" if q.dtype == torch.float32 else "tf32",
            scale=scale,
            cu_seqlens=cu_seqlens,
            slot_bounds=None if cu_seqlens is None else _slot_bounds(cu_seqlens * updates, slots, chunk),
        )

    @property
    def variant(self) -> dict[str, object]:
        """The compile-time arguments that every kernel takes."""
        return {
            "K": self.key_width,
            "CHUNK": self.chunk,
            "UPDATES": self.updates,
            "DECAY": self.decay,
            "DOT": self.dot_type,
            "PRECISION": self.precision,
        }

    def tile(self, width: int, most: int) -> int:
        """``tile_width`` for the operands of products; four bytes a number leave room for half as many columns."""
        return tile_width(width, most if self.dot_type == tl.bfloat16 else most // 2)

    @property
    def levels(self) -> int:
        """How often a chunk can be halved."""
        return int(math.log2(self.chunk))


def slot_count(batch: int, rows: int, sequences: int, chunk: int) -> int:
    """Chunk slots of a call. One row of a batch may be packed: then the count must hold for any boundaries.

    Sequence ``s`` that starts at row ``b`` owns the slots from ``b // chunk + s`` up to those of the next: as many as
    its chunks or one more, and known without looking at the other sequences.
    """
    return rows // chunk + sequences if batch == 1 else batch * triton.cdiv(rows, chunk)


def _slot_bounds(boundaries: Tensor, slots: int, chunk: int) -> Tensor:
    """``(slots, 2)`` int64: the first row of each slot's chunk, and the end of its sequence (first >= end: unused)."""
    sequences = boundaries.numel() - 1
    first_slot = boundaries // chunk + torch.arange(sequences + 1, device=boundaries.device)
    slot = torch.arange(slots, device=boundaries.device)
    sequence = (torch.searchsorted(first_slot, slot, right=True) - 1).clamp(max=sequences - 1)
    first = boundaries[sequence] + (slot - first_slot[sequence]) * chunk
    return torch.stack([first, boundaries[sequence + 1]], dim=1)


@triton.jit
def slot_rows(slot, slot_bounds, rows, slots_per_sequence, CHUNK: tl.constexpr):
    """First row of a slot's chunk and the end of its sequence, in rows of the whole batch; first >= end: unused."""
    if slot_bounds is None:
        sequence = (slot // slots_per_sequence).to(tl.int64)
        first = sequence * rows + (slot % slots_per_sequence) * CHUNK
        end = sequence * rows + rows
    else:
        first = tl.load(slot_bounds + 2 * slot)
        end = tl.load(slot_bounds + 2 * slot + 1)
    return first, end


@triton.jit
def sequence_rows(sequence, cu_seqlens, rows, slots_per_sequence, CHUNK: tl.constexpr, UPDATES: tl.constexpr):
    """First row and end of a sequence, its first slot, and the first slot after its own."""
    if cu_seqlens is None:
        begin = sequence.to(tl.int64) * rows
        end = begin + rows
        slot = sequence.to(tl.int64) * slots_per_sequence
        slot_end = slot + slots_per_sequence
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64) * UPDATES
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64) * UPDATES
        slot = begin // CHUNK + sequence
        slot_end = end // CHUNK + sequence + 1
    return begin, end, slot, slot_end


@triton.jit
def tile_pointers(tensor, rows, head, heads, columns, width):
    """Addresses of ``columns`` in ``rows`` of one head of a (rows, heads, width) tensor; 64-bit, as rows are."""
    return tensor + (rows * heads + head)[:, None] * width + columns[None, :]


@triton.jit
def load_tile(tensor, rows, row_mask, head, heads, columns, width):
    """A (rows, columns) tile of one head in the tensor's own dtype; zero where masked or past the width."""
    mask = row_mask[:, None] & (columns < width)[None, :]
    return tl.load(tile_pointers(tensor, rows, head, heads, columns, width), mask=mask, other=0.0)


@triton.jit
def store_tile(tensor, tile, rows, row_mask, head, heads, columns, width):
    """The counterpart of ``load_tile``; rounds to the tensor's dtype."""
    mask = row_mask[:, None] & (columns < width)[None, :]
    pointers = tile_pointers(tensor, rows, head, heads, columns, width)
    tl.store(pointers, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def load_lower(matrix, rows, row_mask, head, heads, CHUNK: tl.constexpr):
    """The lower triangle of a chunk's (CHUNK, CHUNK) matrix, whose rows lie beside the tokens; zeros above it."""
    index = tl.arange(0, CHUNK)
    mask = row_mask[:, None] & (index[:, None] >= index[None, :])
    return tl.load(tile_pointers(matrix, rows, head, heads, index, CHUNK), mask=mask, other=0.0)


@triton.jit
def load_beta(beta, rows, end, head, heads):
    """The write strength of each row as float32, 1 without an erase; 0 past the end."""
    inside = rows < end
    if beta is None:
        strength = tl.where(inside, 1.0, 0.0)
    else:
        strength = tl.load(beta + rows * heads + head, mask=inside, other=0.0)
    return strength


@triton.jit
def state_pointers(states, index, head, heads, channels, values, K: tl.constexpr, V: tl.constexpr):
    """Addresses of a (channels, values) tile of state ``index`` in a (states, heads, K, V) tensor."""
    offset = (index.to(tl.int64) * heads + head) * K * V
    return states + offset + channels[:, None] * V + values[None, :]


@triton.jit
def matmul(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` with operands rounded to ``DOT``, accumulated in float32."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:  # which multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_log_decay(
    log_decay, rows, end, head, heads, channels, K: tl.constexpr, UPDATES: tl.constexpr, DECAY: tl.constexpr
):
    """Log decay that applies before each row: (rows, 1), or (rows, channels) if a vector; 0 past the end."""
    applies = (rows < end) & (rows % UPDATES == 0)
    if DECAY == "none":
        log = tl.zeros((rows.shape[0], 1), tl.float32)
    elif DECAY == "constant":
        log = tl.where(applies, tl.load(log_decay + head), 0.0)[:, None]
    elif DECAY == "scalar":
        log = tl.load(log_decay + (rows // UPDATES) * heads + head, mask=applies, other=0.0)[:, None]
    else:
        log = load_tile(log_decay, rows // UPDATES, applies, head, heads, channels, K)
    return tl.where(log < -100.0, -100.0, log)  # a comparison, so that NaN stays NaN


@triton.jit
def chunk_decays(
    log_decay,
    first,
    end,
    head,
    heads,
    channels,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
):
    """Decay since the chunk's start (own row included), until its end (own row excluded), and over all of it.

    Shapes (CHUNK, 1 or channels), the same, and (1 or channels,).
    """
    rows = first + tl.arange(0, CHUNK)
    if DECAY == "none":
        one = tl.full((CHUNK, 1), 1.0, tl.float32)
        return one, one, tl.full((1,), 1.0, tl.float32)
    end = tl.minimum(end, first + CHUNK)
    log = load_log_decay(log_decay, rows, end, head, heads, channels, K, UPDATES, DECAY)
    following = load_log_decay(log_decay, rows + 1, end, head, heads, channels, K, UPDATES, DECAY)
    since_start = tl.exp(tl.cumsum(log, axis=0))
    until_end = tl.exp(tl.cumsum(following, axis=0, reverse=True))
    return since_start, until_end, tl.exp(tl.sum(log, axis=0))


@triton.jit
def pair_decays(
    log_decay,
    first,
    end,
    head,
    heads,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
):
    """(CHUNK, CHUNK): decay from row j to row i for one decay per row; 1 on and above the diagonal."""
    index = tl.arange(0, CHUNK)
    log = load_log_decay(log_decay, first + index, end, head, heads, tl.arange(0, 1), K, UPDATES, DECAY)
    after = tl.where(index[:, None] > index[None, :], log, 0.0)
    return tl.exp(tl.cumsum(after, axis=0))


@triton.jit
def separated(level: tl.constexpr, CHUNK: tl.constexpr):
    """Which pairs i > j part at ``level``: they share a block of 2^(level+1) rows and lie in different halves of it.

    Every pair parts at exactly one level, and the border between the halves is its reference point for channel-wise
    decay: sum_d x_id y_jd e^(G_id - G_jd) is a product of x times the decay since there and y times that until there.
    """
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    return ((row ^ column) >> level == 1) & (row > column)


@triton.jit
def widen(since_start, until_end, level: tl.constexpr, CHUNK: tl.constexpr):
    """Decays since the start and until the end of blocks of 2^level rows -> the same for blocks twice as long."""
    half: tl.constexpr = 1 << level
    row = tl.arange(0, CHUNK)
    sibling_end = ((row // half) ^ 1) * half + half - 1
    sibling = tl.gather(since_start, tl.broadcast_to(sibling_end[:, None], since_start.shape), axis=0)
    upper = ((row // half) % 2 == 1)[:, None]
    return tl.where(upper, since_start * sibling, since_start), tl.where(upper, until_end, until_end * sibling)
