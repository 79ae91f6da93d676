"""The classical recurrent networks as mixers: Elman, Jordan, LSTM, GRU, echo state (Lipton et al. 2015, 2 to 4).

Where the definition is torch's, torch's fused layer computes it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.layers.recurrent_cells import (
    ACTIVATIONS,
    JordanCell,
    LongShortTermCell,
    ResetBeforeCell,
    StepCell,
    TorchCell,
    wide,
)
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import RecurrentMixer, Request

INITS = ("uniform", "orthogonal", "identity")


class HiddenState(NamedTuple):
    """The hidden units."""

    hidden: Tensor  # (B, hidden) float32


class MemoryState(NamedTuple):
    """The hidden units and the memory cells of an LSTM."""

    hidden: Tensor  # (B, hidden) float32
    cell: Tensor  # (B, hidden) float32


class ContextState(NamedTuple):
    """The context units of a Jordan network."""

    context: Tensor  # (B, D) float32


class RecurrentNetwork(RecurrentMixer):
    """What the recurrent networks share: padded rows, packed sequences, and the way back to D channels.

    A subclass sets ``cell`` and ``state_type``. There are no heads, but D must divide into ``num_heads`` as in the
    layers beside it.
    """

    cell: TorchCell | StepCell
    state_type: type

    def __init__(
        self, dim: int, num_heads: int, hidden_size: int | None, *, causal: bool, layer_index: int, num_layers: int
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_width(dim)
        self.hidden_size = dim if hidden_size is None else hidden_size
        if not isinstance(self.hidden_size, int) or self.hidden_size < 1:
            raise ValueError(f"hidden_size must be an integer >= 1 or None; got {hidden_size!r}")
        self.o_proj = nn.Identity() if self.hidden_size == dim else nn.Linear(self.hidden_size, dim)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, NamedTuple]:
        hidden, state = self._hidden(x, lengths, request)
        return self.o_proj(hidden), state

    def _hidden(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, NamedTuple]:
        """Outputs of the cell ``(B, T, .)`` in x's dtype, and the state after them."""
        rows, places = x, None
        if request.cu_seqlens is not None:
            places = locate(request.cu_seqlens, x.shape[1])
            lengths = places.sizes
            shape = (len(lengths), int(lengths.max()), self.dim)
            rows = x.new_zeros(shape).index_put((places.sequence, places.place), x[0])
        dtype = torch.promote_types(x.dtype, torch.float32)
        past = self.init_state(rows.shape[0], x.dtype, x.device) if request.state is None else request.state
        outputs, state = self.cell.scan(rows, lengths, tuple(leaf.to(dtype) for leaf in past))
        if places is not None:
            outputs = outputs[places.sequence, places.place][None]
        return outputs.to(x.dtype), self.state_type(*state)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> NamedTuple:
        leaves = (torch.zeros(batch, width, device=device) for width in self.cell.widths)
        state: NamedTuple = self.state_type(*leaves)
        return state


class Elman(RecurrentNetwork):
    """``h_t = act(W x_t + U h_{t-1} + b)`` (Elman 1990): torch's ``nn.RNN``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads.
        hidden_size: width of h; None is D, without a projection after it.
        activation: ``"tanh"`` or ``"relu"``.
        recurrent_init: how U starts: ``"uniform"`` (torch's), ``"orthogonal"``, or ``"identity"`` (Le et al. 2015, with
            ReLU).
    """

    state_type = HiddenState

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        hidden_size: int | None = None,
        activation: str = "tanh",
        recurrent_init: str = "uniform",
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, hidden_size, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if recurrent_init not in INITS:
            raise unknown_name("recurrent_init", recurrent_init, INITS)
        self.activation, self.recurrent_init = activation, recurrent_init
        self.cell = TorchCell(nn.RNN(dim, self.hidden_size, nonlinearity=activation, batch_first=True))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        assert isinstance(self.cell, TorchCell)
        weight = self.cell.layer.get_parameter("weight_hh_l0")
        if self.recurrent_init == "orthogonal":
            nn.init.orthogonal_(weight)
        elif self.recurrent_init == "identity":
            nn.init.eye_(weight)


class LSTM(RecurrentNetwork):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000): torch's ``nn.LSTM``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads.
        hidden_size: width of h; None is D, without a projection after it.
        forget_gate: False gives the cell of 1997, whose memory only adds up.
        peephole: gates also see the memory, through one weight per unit (Gers and Schmidhuber 2002).
        forget_bias: of the forget gate at the start; torch's second bias of it is then 0.
    """

    state_type = MemoryState

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        hidden_size: int | None = None,
        forget_gate: bool = True,
        peephole: bool = False,
        forget_bias: float = 1.0,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, hidden_size, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.forget_gate, self.forget_bias = forget_gate, forget_bias
        if forget_gate and not peephole:
            self.cell = TorchCell(nn.LSTM(dim, self.hidden_size, batch_first=True))
        else:
            self.cell = LongShortTermCell(dim, self.hidden_size, forget_gate=forget_gate, peephole=peephole)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.forget_gate:
            return
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        if isinstance(self.cell, TorchCell):
            self.cell.layer.get_parameter("bias_ih_l0")[forget] = self.forget_bias
            self.cell.layer.get_parameter("bias_hh_l0")[forget] = 0.0
        else:
            self.cell.input.bias[forget] = self.forget_bias


class GRU(RecurrentNetwork):
    """The gated recurrent unit (Cho et al. 2014): torch's ``nn.GRU``, whose z keeps the old state.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads.
        hidden_size: width of h; None is D, without a projection after it.
        reset_after: the reset gate multiplies U h, as in torch; False: h, before the product, as first published.
    """

    state_type = HiddenState

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        hidden_size: int | None = None,
        reset_after: bool = True,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, hidden_size, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if reset_after:
            self.cell = TorchCell(nn.GRU(dim, self.hidden_size, batch_first=True))
        else:
            self.cell = ResetBeforeCell(dim, self.hidden_size)


class Jordan(RecurrentNetwork):
    """``h_t = act(W x_t + R c_t + b)``, ``y_t = V h_t + d``, the context ``c_t = a c_{t-1} + y_{t-1}`` (Jordan 1986).

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads.
        hidden_size: width of h; None is D. The output y has D channels always.
        self_link: a, in [0, 1).
        activation: ``"tanh"`` or ``"relu"``.
    """

    state_type = ContextState

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        hidden_size: int | None = None,
        self_link: float = 0.5,
        activation: str = "tanh",
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, hidden_size, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if not 0 <= self_link < 1:
            raise ValueError(f"self_link must lie in [0, 1); got {self_link}")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.o_proj = nn.Identity()
        self.cell = JordanCell(dim, self.hidden_size, dim, self_link=self_link, activation=activation)


class Reservoir(StepCell):
    """``h_t = (1 - a) h_{t-1} + a tanh(W_in x_t + W h_{t-1})`` with fixed random weights.

    Args:
        dim, hidden: of input and reservoir.
        spectral_radius: largest absolute eigenvalue of W, after scaling.
        leak: a.
        density: share of W's entries that are not 0.
    """

    def __init__(self, dim: int, hidden: int, spectral_radius: float, leak: float, density: float) -> None:
        super().__init__()
        self.widths, self.spectral_radius, self.leak, self.density = (hidden,), spectral_radius, leak, density
        self.input_weight: Tensor
        self.recurrent_weight: Tensor
        self.register_buffer("input_weight", torch.empty(hidden, dim))
        self.register_buffer("recurrent_weight", torch.empty(hidden, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.input_weight.uniform_(-0.5, 0.5)
        weight = torch.rand_like(self.recurrent_weight) - 0.5
        weight = weight.where(torch.rand_like(weight) < self.density, 0)
        radius = torch.linalg.eigvals(wide(weight)).abs().max()
        # so sparse that it may be nilpotent: then there is nothing to scale
        self.recurrent_weight.copy_(weight * (self.spectral_radius / radius.where(radius > 0, 1)))

    def scan(self, x: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.walk(F.linear(wide(x), wide(self.input_weight)), lengths, state)

    def step(self, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        h = (1 - self.leak) * h + self.leak * torch.tanh(gates + F.linear(h, wide(self.recurrent_weight)))
        return h, (h,)


class EchoState(RecurrentNetwork):
    """An echo state network (Jaeger 2001): a fixed random reservoir; only the readout of ``[1, x, h]`` is trained.

    Train it by gradient like any layer, or in one go by :meth:`fit`.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads.
        hidden_size: width of the reservoir; None is D.
        spectral_radius: of the recurrent weights; below 1 for echoes that fade.
        leak: a of the leaky units, in (0, 1].
        density: share of the recurrent weights that are not 0.
    """

    state_type = HiddenState

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        hidden_size: int | None = None,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        density: float = 0.1,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, hidden_size, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if not spectral_radius > 0:
            raise ValueError(f"spectral_radius must be above 0; got {spectral_radius}")
        if not 0 < leak <= 1 or not 0 < density <= 1:
            raise ValueError(f"leak and density must lie in (0, 1]; got {leak} and {density}")
        self.cell = Reservoir(dim, self.hidden_size, spectral_radius, leak, density)
        self.o_proj = nn.Linear(dim + self.hidden_size, dim)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, NamedTuple]:
        hidden, state = self._hidden(x, lengths, request)
        return self.o_proj(torch.cat([x, hidden], -1)), state

    @torch.no_grad()
    def fit(self, x: Tensor, targets: Tensor, *, ridge: float = 1e-6, washout: int = 100) -> float:
        """Sets the readout to the ridge regression of targets on ``[1, x, h]``, in float64.

        Args:
            x, targets: ``(B, T, D)``.
            ridge: weight of the squared readout, relative to the mean square of the regressors; above 0, since the
                states of a reservoir are nearly collinear.
            washout: first tokens of each row that are left out, while the reservoir forgets its start.

        Returns:
            The mean squared error over the tokens that were fitted.

        Raises:
            ValueError: shapes that do not fit, a washout that leaves nothing, a ridge that is not above 0.
        """
        if targets.shape != x.shape or x.ndim != 3:
            raise ValueError(
                f"x and targets must both be (batch, time, {self.dim}); got {tuple(x.shape)}, {tuple(targets.shape)}"
            )
        if not ridge > 0 or not 0 <= washout < x.shape[1]:
            raise ValueError(f"ridge must be above 0 and washout in [0, {x.shape[1]}); got {ridge} and {washout}")
        hidden, _ = self._hidden(x, None, Request())
        seen = torch.cat([x, hidden], -1)[:, washout:].flatten(0, 1).double()
        wanted = targets[:, washout:].flatten(0, 1).double()
        mean, wanted_mean = seen.mean(0), wanted.mean(0)
        centred = seen - mean
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean().clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (wanted - wanted_mean))
        assert isinstance(self.o_proj, nn.Linear)
        self.o_proj.weight.copy_(weight.T)
        self.o_proj.bias.copy_(wanted_mean - mean @ weight)
        return float((seen @ weight + wanted_mean - mean @ weight - wanted).square().mean())
