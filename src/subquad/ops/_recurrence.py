"""The way from an op with a matrix state to the shared recurrence: dtypes, defaults, packing of the reference."""

from collections.abc import Callable

from torch import Tensor

from subquad.kernels import backends
from subquad.kernels.recurrence import checks, dispatch
from subquad.ops import _contract as contract
from subquad.ops import dynamics
from subquad.ops._packed import each_sequence

LARGEST_GPU_WIDTH = 256
Reference = Callable[..., tuple[Tensor, Tensor]]


def run_recurrence(
    reference: Reference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: dict[str, Tensor | None],
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Checks what all ops with a matrix state share, then runs the reference or the fastest backend.

    Args:
        reference: ``reference(q, k, v, **gates, scale=, initial_state=)``, the definition for one batch of sequences.
        q, k, v: checked by the caller; k and v ``(B, T n, H, .)`` hold n updates per token.
        gates: the op's own gate arguments, as the reference names them.
        log_decay, beta, value_log_decay: the same gates in the form of the shared recurrence.
    """
    contract.check_scale(scale)
    contract.check_chunk_size(chunk_size)
    contract.check_cu_seqlens(cu_seqlens, q)
    states, heads, width = contract.number_of_states(q, cu_seqlens), q.shape[2], q.shape[3]
    if initial_state is not None:
        contract.check_argument(
            "initial_state",
            initial_state,
            q,
            (states, heads, width, v.shape[-1]),
            "(batch or packed sequences, heads, key width, value width)",
        )
    op = reference.__name__.removesuffix("_reference")
    watch = dynamics.watching(op, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    if watch is not None:
        if value_log_decay is not None:
            raise ValueError("a decay over values gives every value channel weights of its own: it is not analysed")
        return watch.take(dynamics.matrix_system(op, q, k, v, scale=scale, log_decay=log_decay, beta=beta))
    unsupported = {}
    if width > LARGEST_GPU_WIDTH:
        unsupported["gpu"] = f"its tiles hold {LARGEST_GPU_WIDTH} key channels, not {width}; use backend='chunked'"
    if value_log_decay is not None:
        unsupported = dict.fromkeys(("cpu", "gpu"), "decay over values is computed by 'chunked' only")
    chosen = backends.resolve(backend, q.device, q.dtype, unsupported)

    accumulate = contract.accumulation_dtype(q)
    initial_state, log_decay, beta, value_log_decay = (
        None if x is None else x.to(accumulate) for x in (initial_state, log_decay, beta, value_log_decay)
    )
    if chosen in ("reference", "chunked") and contract.values_may_be_read(q):
        checks.check_gates(log_decay, beta, value_log_decay)
    if chosen == "reference":
        operands = [x.to(accumulate) for x in (q, k, v)]
        gates = {name: None if x is None else x.to(accumulate) for name, x in gates.items()}
        if initial_state is None:
            initial_state = q.new_zeros(states, heads, width, v.shape[-1], dtype=accumulate)
        absent = {name: None for name, x in gates.items() if x is None}
        present = {name: x for name, x in gates.items() if x is not None}

        def define(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            *own, state = rest
            return reference(q, k, v, **dict(zip(present, own)), **absent, scale=scale, initial_state=state)

        output, state = each_sequence(define, [*operands, *present.values()], initial_state, cu_seqlens)
        output = output.to(v.dtype)
    else:
        output, state = dispatch.run(
            q,
            k,
            v,
            log_decay,
            beta,
            initial_state,
            cu_seqlens,
            scale=float(scale),
            chunk_size=chunk_size,
            backend=chosen,
            value_log_decay=value_log_decay,
        )
    return output, state if return_state else None
