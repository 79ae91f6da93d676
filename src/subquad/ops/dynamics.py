"""Ops as linear time-varying systems: what a state keeps, how it is written and read (Sieber et al. 2024).

Per head, with a state S (K, V), n updates per token and the values v as input::

    S_t = L_t S_{t-1} + sum_j B_tj v_tj^T        y_t = S_t^T C_t + D v_t

L_t is diagonal, or that followed by n rank-one erasures ``I - w_tj e_tj^T``. Nothing is kept dense.

While a :class:`Watch` is open the doors of the ops build their system, hand it over, and return what it gives token by
token in float64: a mixer run under a watch is rebuilt from its systems alone.
"""

from abc import ABC, abstractmethod
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

LARGEST_WEIGHTS = 1024  # tokens of an unrolled weight matrix


@dataclass(frozen=True)
class System(ABC):
    """An op on given inputs as a map that is linear in its values.

    Attributes:
        op: name of the op.
        values: ``(B, T, n, H, V)``, what is written: n updates per token.
    """

    op: str
    values: Tensor

    @abstractmethod
    def run(self, values: Tensor | None = None) -> Tensor:
        """The output ``(B, T, H, V)`` on ``values (B, T, n, H, .)``; by default on those that came."""

    @property
    @abstractmethod
    def transition(self) -> str:
        """What L is, in words."""

    @abstractmethod
    def state_size(self, tokens: int) -> int:
        """Numbers kept per head after so many tokens."""

    def weights(self) -> Tensor:
        """The unrolled weights a ``(B, H, T, T n)``: ``y_i = sum_j a_ij v_j``, the columns in the order of updates.

        Raises:
            ValueError: more than 1,024 tokens, whose table would not fit.
        """
        batch, time, updates, heads, _ = self.values.shape
        if time > LARGEST_WEIGHTS:
            raise ValueError(f"weights are a table of tokens by tokens: at most {LARGEST_WEIGHTS} of them; got {time}")
        unit = torch.eye(time * updates, dtype=torch.float64, device=self.values.device)
        unit = unit.unflatten(0, (time, updates))[None, :, :, None].expand(batch, -1, -1, heads, -1)
        return self.run(unit).movedim(1, 2)


@dataclass(frozen=True)
class RecurrentSystem(System):
    """A state of constant size.

    Attributes:
        decay: the diagonal, ``(B, T, H, 1 or K)`` float64, applied before a token's first update.
        write: B, before the erasures of later updates of the token, ``(B, T, n, H, K)``.
        erase: e ``(B, T, n, H, K)`` (w is ``write``); None: nothing is erased.
        read: C ``(B, T, H, K)``; a normaliser stands here.
        skip: D ``(H,)``, for n = 1; None: 0.
    """

    decay: Tensor
    write: Tensor
    read: Tensor
    erase: Tensor | None = None
    skip: Tensor | None = None

    @property
    def transition(self) -> str:
        if bool((self.decay == 1).all()):
            kind = "identity"
        elif self.decay.shape[-1] == 1:
            kind = "scalar"
        else:
            kind = "diagonal"
        return kind if self.erase is None else f"{kind} and low rank"

    def state_size(self, tokens: int) -> int:
        return self.write.shape[-1] * self.values.shape[-1]

    def run(self, values: Tensor | None = None) -> Tensor:
        values = (self.values if values is None else values).double()
        batch, _, updates, heads, width = values.shape
        state = values.new_zeros(batch, heads, self.write.shape[-1], width)
        outputs = []
        for t in range(values.shape[1]):
            state = self.decay[:, t, ..., None] * state
            for j in range(updates):
                write, value = self.write[:, t, j], values[:, t, j]
                if self.erase is not None:
                    value = value - torch.einsum("bhk,bhkv->bhv", self.erase[:, t, j], state)
                state = state + write[..., None] * value[..., None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", self.read[:, t], state))
        output = torch.stack(outputs, dim=1)
        return output if self.skip is None else output + self.skip[:, None] * values[:, :, 0]

    def matrices(self, t: int) -> Tensor:
        """L_t, dense: ``(B, H, K, K)``."""
        batch, _, updates, heads, width = self.write.shape
        result = torch.diag_embed(self.decay[:, t].expand(batch, heads, width))
        for j in range(updates):
            if self.erase is not None:
                erased = torch.einsum("bhk,bhkm->bhm", self.erase[:, t, j], result)
                result = result - self.write[:, t, j, ..., None] * erased[..., None, :]
        return result

    def scaled(self, factors: Tensor) -> "RecurrentSystem":
        """The same map on the state ``f_t S_t``, factors ``(B, T, H)`` positive: another L, B and C, equal weights."""
        if self.erase is not None:
            raise ValueError("a state that erases is read by its own updates: its scale cannot be changed alone")
        factors = factors.double()
        change = torch.cat([torch.ones_like(factors[:, :1]), factors[:, 1:] / factors[:, :-1]], dim=1)[..., None]
        return RecurrentSystem(
            self.op,
            self.values,
            self.decay * change,
            self.write * factors[:, :, None, :, None],
            self.read / factors[..., None],
            None,
            self.skip,
        )

    def normal_form(self) -> "RecurrentSystem":
        """The same map with every read of unit length: what L, B and C of two systems can be compared in."""
        return self.scaled(self.read.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class KeptTokens(System):
    """Softmax attention: every token is kept, and the weights follow from all of them.

    Attributes:
        table: a ``(B, H, T, T)``.
        key_width: K.
        limit: most tokens that are kept (a window and its sinks); None: all.
        besides: numbers per head that are kept beside the tokens.
    """

    table: Tensor
    key_width: int
    limit: int | None = None
    besides: int = 0

    @property
    def transition(self) -> str:
        kept = "keeps every token" if self.limit is None else f"keeps {self.limit} tokens"
        return f"{kept} and sums" if self.besides else kept

    def state_size(self, tokens: int) -> int:
        kept = tokens if self.limit is None else min(tokens, self.limit)
        return kept * (self.key_width + self.values.shape[-1]) + self.besides

    def run(self, values: Tensor | None = None) -> Tensor:
        values = (self.values if values is None else values).double()
        return torch.einsum("bhij,bjhv->bihv", self.table, values[:, :, 0])


class Watch:
    """Collects the systems of all ops that are called while it is open, in order, and answers in their place.

    Attributes:
        systems: what was called.
        outside: what mixes tokens and is no system: short convolutions, by name.

    Example:
        >>> from subquad.ops import gla
        >>> x = torch.ones(1, 3, 1, 1, dtype=torch.float64)
        >>> with Watch() as watch:
        ...     output, _ = gla(x, x, x, (0.5 * x).log())
        >>> output.flatten().tolist(), watch.systems[0].weights()[0, 0, 2].round(decimals=6).tolist()
        ([1.0, 1.5, 1.75], [0.25, 0.5, 1.0])
    """

    def __init__(self) -> None:
        self.systems: list[System] = []
        self.outside: list[str] = []
        self._token: Token[Watch | None] | None = None

    def __enter__(self) -> Self:
        self._token = _active.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _active.reset(self._token)

    def take(self, system: System) -> tuple[Tensor, None]:
        """The system's output in its values' dtype, and no state."""
        self.systems.append(system)
        return system.run().to(system.values.dtype), None


_active: ContextVar[Watch | None] = ContextVar("watch", default=None)


def _opened() -> Watch | None:
    """The open watch; in a compiled graph there is none, for a context variable cannot be traced."""
    return None if torch.compiler.is_compiling() else _active.get()


def watching(op: str, *, initial_state: object, return_state: bool, cu_seqlens: Tensor | None) -> Watch | None:
    """The open watch, if any. A system is analysed on whole sequences from the empty state.

    Raises:
        ValueError: a state or packed sequences under a watch.
    """
    watch = _opened()
    if watch is not None and (initial_state is not None or return_state or cu_seqlens is not None):
        raise ValueError(
            f"{op} is analysed on whole sequences: without initial_state, return_state (use_state) and cu_seqlens"
        )
    return watch


def note_outside(what: str) -> None:
    """Tells an open watch of something that mixes tokens beside the systems."""
    watch = _opened()
    if watch is not None:
        watch.outside.append(what)


def refuse_nonlinear(op: str, why: str) -> None:
    """Raises under a watch: an op whose output is not linear in its values has no such system."""
    if _opened() is not None:
        raise ValueError(f"{op} is no linear system: {why}; subquad.bench.systems.linearized looks at it nearby")


def matrix_system(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalizer_eps: float | None = None,
) -> RecurrentSystem:
    """The system of the shared recurrence (``kernels/recurrence``), its arguments as they come to it.

    Args:
        q: ``(B, T, H, K)``; k ``(B, T n, H, K)``, v ``(B, T n, H, V)``: n updates per token.
        scale: of the output.
        log_decay: None, ``(H,)``, ``(B, T, H)`` or ``(B, T, H, K)``.
        beta: ``(B, T n, H)`` of the delta rule; None: nothing is erased.
        normalizer_eps: divide the output by ``q . sum of keys + eps``; None: do not.
    """
    batch, time, heads, _ = q.shape
    query, key = q.double(), k.double().unflatten(1, (time, -1))
    if log_decay is None:
        log_decay = query.new_zeros(heads)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(batch, time, heads)
    decay = log_decay.double().exp()
    decay = decay if decay.ndim == 4 else decay[..., None]
    read = scale * query
    if normalizer_eps is not None:
        total = torch.einsum("bthk,bthk->bth", query, key.sum(2).cumsum(1)) + normalizer_eps
        read = read / total[..., None]
    write, erase = key, None
    if beta is not None:
        write, erase = key * beta.double().unflatten(1, (time, -1))[..., None], key
    return RecurrentSystem(op, v.unflatten(1, (time, -1)), decay, write, read, erase)
