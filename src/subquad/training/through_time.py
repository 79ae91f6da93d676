"""Gradients of recurrent networks through time: truncated, exact and online, and how far they reach.

Williams and Zipser 1989 (real-time recurrent learning); Williams and Peng 1990 (truncation); Pascanu et al. 2013
(vanishing and exploding gradients).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subquad.layers.recurrent_cells import TorchCell
from subquad.mixers.contract import RecurrentMixer, map_state, named_leaves
from subquad.mixers.recurrent_networks import Elman

Loss = Callable[[Tensor, Tensor], Tensor]


class TruncatedBPTT:
    """Back-propagation through time that looks back a fixed number of steps.

    After every ``k1`` steps the loss of those steps is differentiated through the last ``k2``; the state of older steps
    is carried on, detached in all its tensors. With ``k2 > k1`` the steps before are run again, so that no graph is
    kept.

    Args:
        mixer: a recurrent mixer, or any module that is called as one.
        loss: of outputs ``(B, t, D)`` and their targets, a mean.
        k1, k2: steps between gradients, and steps that a gradient goes back; ``k2 >= k1``.

    Raises:
        ValueError: k1 below 1, or k2 below k1 (losses would lose their own inputs).
    """

    def __init__(self, mixer: nn.Module, loss: Loss, k1: int, k2: int) -> None:
        if k1 < 1 or k2 < k1:
            raise ValueError(f"k1 must be at least 1 and k2 at least k1; got k1={k1}, k2={k2}")
        self.mixer, self.loss, self.k1, self.k2 = mixer, loss, k1, k2

    def run(
        self, x: Tensor, targets: Tensor, *, state: Any = None, update: Callable[[], None] | None = None
    ) -> tuple[list[float], Any]:
        """One pass over ``x (B, T, D)``, gradients added to the parameters' ``grad``.

        Args:
            x, targets: of T steps.
            state: before x: that of the piece of text before it, or None at the start of a document.
            update: called after each gradient, for instance an optimizer's step followed by its ``zero_grad``.

        Returns:
            The losses, one per ``k1`` steps, and the detached state after x.

        Raises:
            ValueError: targets of another length.
        """
        if targets.shape[:2] != x.shape[:2]:
            raise ValueError(f"targets must have x's batch and time {tuple(x.shape[:2])}; got {tuple(targets.shape)}")
        states, losses = {0: _detached(state)}, []
        for begin in range(0, x.shape[1], self.k1):
            end = min(begin + self.k1, x.shape[1])
            first = max(0, end - self.k2)
            kept = max(t for t in states if t <= first)
            if kept < first:
                with torch.no_grad():
                    states[first] = self.mixer(x[:, kept:first], state=states[kept], use_state=True).state
            before = states[first]
            if first < begin:  # steps whose loss was taken before, through which this one goes back
                before = self.mixer(x[:, first:begin], state=before, use_state=True).state
            result = self.mixer(x[:, begin:end], state=before, use_state=True)
            value = self.loss(result.output, targets[:, begin:end])
            value.backward()
            losses.append(float(value.detach()))
            states[end] = _detached(result.state)
            oldest = max(t for t in states if t <= max(0, end + 1 - self.k2))
            states = {t: s for t, s in states.items() if t >= oldest}
            if update is not None:
                update()
        return losses, states[max(states)]


class RTRL:
    """Real-time recurrent learning of an Elman network: exact gradients online, without going back.

    It carries ``P_t = d h_t / d theta``, theta all weights and biases, ``P_t = D_t (U P_{t-1} + direct part)`` with
    ``D_t = diag(act')``: memory ``O(H x weights)`` and time ``O(H^2 x weights)`` per step, whatever the length. For
    small networks. Exact as long as the weights stay fixed during the sequence.

    Args:
        mixer: an :class:`.Elman` whose hidden width is D.
    """

    def __init__(self, mixer: Elman) -> None:
        if not isinstance(mixer, Elman) or not isinstance(mixer.o_proj, nn.Identity):
            raise TypeError(f"RTRL is written for Elman networks of hidden width D; got {type(mixer).__name__}")
        assert isinstance(mixer.cell, TorchCell)
        self.mixer, self.layer = mixer, mixer.cell.layer
        self.hidden: Tensor | None = None
        self.influence: Tensor | None = None

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """``x (B, D)`` -> ``h_t (B, H)``; the influence of the weights on it is carried along."""
        layer = self.layer
        width = layer.hidden_size
        if self.hidden is None or self.influence is None:
            self.hidden = x.new_zeros(x.shape[0], width)
            self.influence = x.new_zeros(x.shape[0], width, width, x.shape[1] + width + 2)
        one = x.new_ones(x.shape[0], 1)
        seen = torch.cat([x, self.hidden, one, one], 1)  # what row k of all weights is multiplied with
        direct = torch.einsum("ik,bm->bikm", torch.eye(width, dtype=x.dtype), seen)
        weights = torch.cat(
            [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0[:, None], layer.bias_hh_l0[:, None]], 1
        )
        before = seen @ weights.T
        slope = 1 - before.tanh().square() if self.mixer.activation == "tanh" else (before > 0).to(x.dtype)
        self.hidden = before.tanh() if self.mixer.activation == "tanh" else before.relu()
        carried = torch.einsum("ij,bjkm->bikm", layer.weight_hh_l0, self.influence)
        self.influence = slope[:, :, None, None] * (carried + direct)
        return self.hidden

    @torch.no_grad()
    def accumulate(self, grad_hidden: Tensor) -> None:
        """Adds the gradient of a loss at this step, given ``d loss / d h_t (B, H)``, to the parameters' ``grad``."""
        if self.influence is None:
            raise ValueError("accumulate follows a step: there is no h_t yet")
        gradient = torch.einsum("bi,bikm->km", grad_hidden, self.influence)
        layer = self.layer
        sizes = [layer.input_size, layer.hidden_size, 1, 1]
        for name, part in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), gradient.split(sizes, 1)):
            parameter = getattr(layer, name)
            part = part.reshape(parameter.shape)
            parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part

    def reset(self) -> None:
        """Forgets the sequence so far."""
        self.hidden = self.influence = None


def gradient_flow(mixer: RecurrentMixer, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How much of a gradient at the end is left further back: ``|d loss_T / d state_t|`` by lag.

    Args:
        mixer: any recurrent mixer.
        x: ``(B, T, D)``.
        loss: of the last state's first tensor (the hidden units of an LSTM); None: its sum.

    Returns:
        ``(T,)``: at index l the norm over all tensors of the state after token T - l, l = 0 the last one. What falls
        off geometrically vanishes; what grows explodes.

    Example:
        >>> from subquad import mixers
        >>> flow = gradient_flow(mixers.build("elman", 4), torch.randn(2, 30, 4))
        >>> flow.shape, bool(flow[-1] < flow[0])
        (torch.Size([30]), True)
    """
    state, leaves = mixer.init_state(x.shape[0], x.dtype, x.device), []
    for token in x.split(1, 1):
        state = mixer(token, state=state, use_state=True).state
        leaves.append([leaf for _, leaf in named_leaves(state) if leaf.requires_grad])
    last = next(leaf for _, leaf in named_leaves(state))
    flat = [leaf for kept in leaves for leaf in kept]
    found = iter(torch.autograd.grad(last.sum() if loss is None else loss(last), flat, allow_unused=True))
    norms = []
    for kept in leaves:
        squares = [g.double().square().sum() for g in (next(found) for _ in kept) if g is not None]
        norms.append(torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64))
    return torch.stack(norms[::-1]).to(x.dtype)


def _detached(state: Any) -> Any:
    return None if state is None else map_state(lambda leaf: leaf.detach(), state)
