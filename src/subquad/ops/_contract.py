"""What every op asks of its arguments, stated once. Messages say what came and what is needed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.recurrence.checks import check_offsets

LARGEST_STORAGE = 2**62  # bytes; beyond it torch's own size arithmetic overflows


def check_tensor(name: str, x: object, ndim: int, axes: str) -> None:
    """A strided floating-point tensor of ``ndim`` axes whose bytes can be counted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}; got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor; its layout is {x.layout}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point; it is {x.dtype}")
    if x.dtype.itemsize < 2:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; it is {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes {axes}; it has shape {tuple(x.shape)}")
    if math.prod(x.shape) * 8 >= LARGEST_STORAGE:
        raise ValueError(f"{name} of shape {tuple(x.shape)} is too large: its size in bytes overflows")


def check_same_kind(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise TypeError(
            f"q, k, v must share dtype and device; q is {q.dtype} on {q.device}, {name} is {x.dtype} on {x.device}"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k ``(B, T, H, K)``, v ``(B, T, H, V)``: one dtype, one device, nothing empty."""
    check_tensor("q", q, 4, "(batch, time, heads, key width)")
    check_tensor("k", k, 4, "(batch, time, heads, key width)")
    check_tensor("v", v, 4, "(batch, time, heads, value width)")
    check_same_kind("k", k, q)
    check_same_kind("v", v, q)
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must have one shape, and v the same batch, time and heads; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_not_empty("q", q)
    check_not_empty("v", v)
    check_state_size(q, v)


def check_not_empty(name: str, x: Tensor) -> None:
    if 0 in x.shape:
        raise ValueError(f"{name} is empty: every axis must be at least 1; its shape is {tuple(x.shape)}")


def check_state_size(k: Tensor, v: Tensor) -> None:
    """The state ``(batch, heads, key width, value width)`` must be countable too."""
    size = k.shape[0] * k.shape[-2] * k.shape[-1] * v.shape[-1]
    if size * 8 >= LARGEST_STORAGE:
        raise ValueError(
            f"key width {k.shape[-1]} by value width {v.shape[-1]} make a state whose size in bytes overflows"
        )


def check_argument(name: str, x: Tensor, like: Tensor, shape: Sequence[int], axes: str, *, hint: str = "") -> None:
    """A floating-point tensor of an exact shape on the device of ``like``."""
    check_tensor(name, x, len(shape), axes)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}; it has shape {tuple(x.shape)}{hint}")
    if x.device != like.device:
        raise TypeError(f"{name} must be on q's device {like.device}; it is on {x.device}")


def check_scale(scale: float | None) -> None:
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None; got {scale!r}")


def check_chunk_size(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size must be an integer; got {chunk_size!r}")
    if not 1 <= chunk_size <= 1024:
        raise ValueError(f"chunk_size must be between 1 and 1024; got {chunk_size}")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """``(N + 1,)`` int32 or int64 offsets into a batch of one, from 0 to its length, where values may be read.

    q is any tensor ``(B, T, ...)`` of the packed tokens.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor; got {kind}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) offsets that start with 0; it has shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise TypeError(f"cu_seqlens must be on q's device {q.device}; it is on {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1; q has batch {q.shape[0]}")
    if values_may_be_read(q):
        check_offsets(cu_seqlens, q.shape[1])


def values_may_be_read(q: Tensor) -> bool:
    """True outside of traced graphs on a CPU, and on a GPU where ``SUBQUAD_CHECK=1`` asks for it."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return False
    return q.device.type == "cpu" or backends.check_values()


def number_of_states(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for everything below it, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
