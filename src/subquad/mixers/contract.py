"""What every token mixer is: ``mixer(x, context, ...) -> MixerOutput(output, state, losses)``, and the uses it serves.

The checks that all mixers share live in :meth:`Mixer.forward`; a mixer itself writes :meth:`Mixer.mix`. Mixers whose
state is a recurrence derive from :class:`RecurrentMixer`, which takes padding and positions off their hands.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.kernels.steps import plan
from subquad.ops._contract import check_cu_seqlens
from subquad.ops.dynamics import System, Watch

State = Any  # a NamedTuple of tensors whose first axis is the batch; each mixer has its own


class Pattern(StrEnum):
    """A use of a mixer. Prefix-causal: in both directions over each row's prefix, causal after it."""

    CAUSAL_SELF = "causal self-attention"
    FULL_SELF = "non-causal self-attention"
    CAUSAL_CROSS = "causal cross-attention"
    FULL_CROSS = "non-causal cross-attention"
    PREFIX_SELF = "prefix-causal self-attention"


class PooledLoss(Protocol):
    """What one layer contributes to an auxiliary loss that is taken over the tokens of all layers together."""

    @classmethod
    def pooled(cls, parts: Sequence[Self]) -> Tensor:
        """The loss, a scalar, from the contributions of all layers."""
        ...


class MixerOutput(NamedTuple):
    """Output ``(B, T, D)``, the state after the last token (None unless asked for), and auxiliary losses by name.

    A loss is a scalar, to which those of other layers are added, or a :class:`PooledLoss`.
    """

    output: Tensor
    state: State | None
    losses: dict[str, Any]


def total_loss(layers: Iterable[Mapping[str, Any]]) -> Tensor | None:
    """The sum of all layers' auxiliary losses, each kind of :class:`PooledLoss` taken once; None: there are none."""
    losses: list[Tensor] = []
    pooled: dict[tuple[str, Any], list[Any]] = {}
    for name, loss in (item for layer in layers for item in layer.items()):
        if isinstance(loss, Tensor):
            losses.append(loss)
        else:
            pooled.setdefault((name, type(loss)), []).append(loss)
    losses += [kind.pooled(parts) for (_, kind), parts in pooled.items()]
    return torch.stack(losses).sum() if losses else None


class MatrixState(NamedTuple):
    """The state of mixers that carry one matrix per head and nothing else."""

    state: Tensor  # (B, H, K, V) float32


class PositionedState(NamedTuple):
    """A matrix per head, and how many tokens it has seen: for mixers whose encoding counts positions."""

    state: Tensor  # (B, H, K, V) float32
    seen: Tensor  # (B,) int64


class Dynamics(NamedTuple):
    """A mixer on given inputs as systems: one per op, in order."""

    systems: tuple[System, ...]
    outside: tuple[str, ...]  # what else mixes tokens: short convolutions before the systems
    output: Tensor  # (B, T, D), rebuilt from the systems


class Request(NamedTuple):
    """The arguments of one call besides x and context, checked."""

    mask: Tensor | None = None
    positions: Tensor | None = None
    prefix_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    grid: tuple[int, ...] | None = None
    state: State | None = None
    use_state: bool = False


class Mixer(nn.Module):
    """A token mixer over ``dim`` channels in ``num_heads`` heads.

    Args:
        dim: D, the width of x.
        num_heads: H.
        causal: whether token t depends on tokens up to t only.
        layer_index, num_layers: the mixer's place in its model, for methods that depend on it.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset()
    uses_positions: ClassVar[bool] = False
    constant_state: ClassVar[bool] = True  # whether the state's size does not grow with the context

    def __init__(
        self, dim: int, num_heads: int, *, causal: bool = True, layer_index: int = 0, num_layers: int = 1
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("num_layers", num_layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
        if not 0 <= layer_index < num_layers:
            raise ValueError(f"layer_index must lie in [0, num_layers); got {layer_index} of {num_layers}")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.layer_index, self.num_layers = layer_index, num_layers
        self._steps = plan.StepCache()
        if not any(p in self.patterns for p in self._patterns_when(causal)):
            raise ValueError(f"{type(self).__name__} with causal={causal} serves no use; it serves {self.served()}")

    def served(self) -> str:
        """The uses that it serves, as built."""
        return ", ".join(sorted(self.patterns))

    @staticmethod
    def _patterns_when(causal: bool) -> tuple[Pattern, ...]:
        if causal:
            return (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS, Pattern.PREFIX_SELF)
        return (Pattern.FULL_SELF, Pattern.FULL_CROSS)

    def head_width(self, total: int, name: str = "dim", heads: int | None = None) -> int:
        """``total / heads``, refused where it does not divide."""
        heads = self.num_heads if heads is None else heads
        if total % heads:
            raise ValueError(f"{name} must be a multiple of the number of heads {heads}; got {total}")
        return total // heads

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: State | None = None,
        use_state: bool = False,
    ) -> MixerOutput:
        """Mixes the tokens of ``x``, or reads ``context`` with them.

        Args:
            x: ``(B, T, D)``.
            context: ``(B, S, D)`` to read from (cross-attention); None: x itself.
            mask: ``(B, S)`` bool over the current keys (those of x, or of context), True = keep. A padded token changes
                neither output nor state; its own output is zero.
            positions: ``(B, T)`` integers, for mixers that declare ``uses_positions``; by default tokens are counted,
                padding left out, on from the state.
            prefix_lengths: ``(B,)``, for prefix-causal use.
            cu_seqlens: ``(N + 1,)`` where N packed sequences begin and end; B is then 1.
            grid: the shape in which x's tokens are laid out, for spatial mixers.
            state: of the tokens before x, as returned by an earlier call or :meth:`init_state`.
            use_state: whether to return the state after x.

        Raises:
            ValueError, TypeError: a wrong shape, or a use that this mixer does not serve (the message names those it
                does).
        """
        if (
            use_state
            and state is not None
            and context is None
            and mask is None
            and prefix_lengths is None
            and cu_seqlens is None
            and grid is None
        ):
            stepped = self.step(x, state, positions)
            if stepped is not None:
                return stepped
        self._check(x, context, mask, positions, prefix_lengths, cu_seqlens, state, use_state)
        request = Request(mask, positions, prefix_lengths, cu_seqlens, grid, state, use_state)
        return self.mix(x, context, request)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        raise NotImplementedError(f"{type(self).__name__} must define mix")

    def dynamics(self, x: Tensor) -> "Dynamics":
        """Its ops on x as linear time-varying systems, and its output rebuilt from them (Sieber et al. 2024).

        Args:
            x: ``(B, T, D)``, of a causal self-mixer.

        Raises:
            ValueError: a mixer without such an op, or one whose op is not linear in its values.
        """
        self._require(Pattern.CAUSAL_SELF)
        with Watch() as watch, torch.no_grad():
            output = self(x).output
        if not watch.systems:
            raise ValueError(f"{type(self).__name__} mixes tokens by no op that is a linear system")
        return Dynamics(tuple(watch.systems), tuple(watch.outside), output)

    def step(self, x: Tensor, state: State, positions: Tensor | None) -> MixerOutput | None:
        """One token ``(B, 1, D)`` in one kernel, equal to :meth:`mix`; None where no kernel serves this call.

        The arguments are not checked yet: whatever is unusual is left to the ordinary way, which names what is wrong.
        """
        return None

    def _read_layer(self, read: plan.Reading) -> Any:
        """What the kernel of :meth:`step` takes as its layer, everything that it depends on read through ``read``."""
        raise NotImplementedError(f"{type(self).__name__} has no one-token kernel")

    def _step_layer(self, x: Tensor) -> Any:
        """The layer as the kernel takes it; None where the kernel cannot serve ``x``."""
        return self._steps.layer(self._read_layer, x.shape[0]) if plan.serves(x, self.dim) else None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # moved weights leave their old memory
        self._steps.clear()
        return super()._apply(*args, **kwargs)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The state before any token."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state; it serves {self.served()}")

    def _check(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        prefix_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: State | None,
        use_state: bool,
    ) -> None:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.dim or 0 in x.shape:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be (batch, time, {self.dim}), nothing empty; got {shape}")
        if context is not None and (context.ndim != 3 or context.shape[0] != x.shape[0] or 0 in context.shape):
            raise ValueError(
                f"context must be (batch, context time, width) with batch {x.shape[0]}; got {tuple(context.shape)}"
            )
        self._require(self._pattern(context, prefix_lengths))
        keys = x if context is None else context
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, True = keep; it is {mask.dtype}")
            if mask.shape != keys.shape[:2]:
                raise ValueError(
                    f"mask must be (batch, keys) = {tuple(keys.shape[:2])}; it has shape {tuple(mask.shape)}"
                )
            if cu_seqlens is not None:
                raise ValueError("packed sequences have no padding: give cu_seqlens or mask, not both")
        check_cu_seqlens(cu_seqlens, x)
        if positions is not None:
            if not self.uses_positions:
                raise ValueError(f"{type(self).__name__} uses no positions; embedding positions belong to the model")
            if positions.shape != x.shape[:2]:
                raise ValueError(
                    f"positions must be (batch, time) = {tuple(x.shape[:2])}; got {tuple(positions.shape)}"
                )
        if (state is not None or use_state) and not self.causal:
            raise ValueError("a state belongs to causal use; this mixer was built with causal=False")
        if state is not None:
            rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            self._check_state(state, rows)

    def _pattern(self, context: Tensor | None, prefix_lengths: Tensor | None) -> Pattern:
        if context is not None:
            return Pattern.CAUSAL_CROSS if self.causal else Pattern.FULL_CROSS
        if prefix_lengths is not None:
            return Pattern.PREFIX_SELF
        return Pattern.CAUSAL_SELF if self.causal else Pattern.FULL_SELF

    def _require(self, pattern: Pattern) -> None:
        if pattern not in self.patterns:
            raise ValueError(f"{type(self).__name__} does not serve {pattern}; it serves {self.served()}")

    def _check_state(self, state: State, rows: int) -> None:
        for name, leaf in named_leaves(state):
            if leaf.shape[0] != rows:
                raise ValueError(f"state.{name} has {leaf.shape[0]} rows; this call has {rows}")


class RecurrentMixer(Mixer):
    """A causal self-mixer with a constant-size state. It defines :meth:`recur` on rows whose padding lies at the end.

    With a mask the tokens of each row are first moved so that padding comes last, whatever its place: then padding can
    change nothing, not even a short convolution or a block border. Outputs go back to their places.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if request.mask is None:
            output, state = self.recur(x, None, request)
            return MixerOutput(output, state if request.use_state else None, {})
        mask = request.mask
        order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
        lengths = mask.sum(dim=1)
        at = order[..., None].expand(-1, -1, self.dim)
        positions = None if request.positions is None else request.positions.gather(1, order)
        output, state = self.recur(x.gather(1, at), lengths, request._replace(positions=positions))
        output = torch.zeros_like(output).scatter(1, at, output).where(mask[..., None], 0)
        return MixerOutput(output, state if request.use_state else None, {})

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, State]:
        """``x (B, T, D)`` whose row b holds ``lengths[b]`` real tokens, then padding -> output and state after them."""
        raise NotImplementedError(f"{type(self).__name__} must define recur")


def keep_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """``(B, T)`` bool, True for real tokens; None where all are."""
    if lengths is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def silence(keep: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``(B, T, ...)``, zero at padding: a zero key writes nothing, a zero log decay forgets nothing."""
    if keep is None:
        return tensors
    return tuple(x.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), 0) for x in tensors)


def wide(x: Tensor) -> Tensor:
    """x in float32 or above: gates near 1, norms and solves do not survive bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def count_tokens(x: Tensor, lengths: Tensor | None, request: Request, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions ``(B, T)`` of x's tokens and the number of tokens seen after them ``(B or N,)``, both int64.

    ``seen`` is the number before x. With packed sequences each counts from its own.
    """
    if request.cu_seqlens is not None:
        sequence, place, sizes = locate(request.cu_seqlens, x.shape[1])
        before = torch.zeros_like(sizes) if seen is None else seen
        counted = (place + before[sequence])[None]
    else:
        sizes = torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths
        before = torch.zeros_like(sizes) if seen is None else seen
        counted = before[:, None] + torch.arange(x.shape[1], device=x.device)
    positions = counted if request.positions is None else request.positions
    return positions, before + sizes


def named_leaves(state: State, prefix: str = "") -> Iterable[tuple[str, Tensor]]:
    """The tensors of a state, nested NamedTuples included, with their dotted names."""
    for name, leaf in zip(state._fields, state):
        if isinstance(leaf, Tensor):
            yield prefix + name, leaf
        elif leaf is not None:
            yield from named_leaves(leaf, f"{prefix}{name}.")


def map_state(function: Any, state: State) -> State:
    """The state with ``function`` applied to each tensor."""
    return type(state)(
        *(
            function(leaf) if isinstance(leaf, Tensor) else None if leaf is None else map_state(function, leaf)
            for leaf in state
        )
    )
