"""Recurrent cells over padded rows: torch's own where they are the method, and the ones that torch does not have.

Every cell is a module with ``scan(x, lengths, state) -> (outputs, state)``: ``x (N, T, D)`` holds ``lengths[n]`` real
tokens and then padding (None: no padding), a state is a tuple of ``(N, width)`` tensors, and padding changes none. All
compute in float32 at least.

Notation of Lipton, Berkowitz and Elkan 2015, "A Critical Review of Recurrent Neural Networks".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, ...]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def wide(x: Tensor) -> Tensor:
    """x in float32 or above."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TorchCell(nn.Module):
    """One of torch's fused layers (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``), one layer deep and in one direction."""

    layer: nn.RNNBase

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the state's tensors."""
        return (self.layer.hidden_size,) * (2 if isinstance(self.layer, nn.LSTM) else 1)

    def scan(self, x: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Rows without a token are left out: torch packs none."""
        rows = wide(x)
        # copies lie where torch puts them: how the product of a single row is rounded depends on the weights' place
        weights = {name: wide(p).clone() for name, p in self.layer.named_parameters()}
        if lengths is None:
            return self._run(weights, rows, state)
        real = (lengths > 0).nonzero().flatten()
        some = tuple(leaf[real] for leaf in state)
        packed = pack_padded_sequence(rows[real], lengths[real].cpu(), batch_first=True, enforce_sorted=False)
        found, after = self._run(weights, packed, some)
        padded, _ = pad_packed_sequence(found, batch_first=True, total_length=x.shape[1])
        outputs = padded.new_zeros(*x.shape[:2], padded.shape[2]).index_copy(0, real, padded)
        return outputs, tuple(leaf.index_copy(0, real, new) for leaf, new in zip(state, after))

    def _run(self, weights: dict[str, Tensor], rows: object, state: State) -> tuple[object, State]:
        first = tuple(leaf[None].contiguous() for leaf in state)
        passed = first if isinstance(self.layer, nn.LSTM) else first[0]
        outputs, after = torch.func.functional_call(self.layer, weights, (rows, passed))
        return outputs, tuple(leaf[0] for leaf in (after if isinstance(after, tuple) else (after,)))


class StepCell(nn.Module):
    """A cell that is defined by one step: the inputs' share of all gates is one product, then token after token."""

    widths: tuple[int, ...]
    input: nn.Linear

    def step(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        """The inputs' share of a token's gates ``(N, G)`` and the state before -> output and state after."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def scan(self, x: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        bias = None if self.input.bias is None else wide(self.input.bias)
        return self.walk(F.linear(wide(x), wide(self.input.weight), bias), lengths, state)

    def walk(self, gates: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Token after token, given the inputs' share of all gates ``(N, T, G)``."""
        outputs = []
        for t, own in enumerate(gates.unbind(1)):
            output, after = self.step(own, state)
            if lengths is not None:
                keep = (t < lengths)[:, None]
                output = output.where(keep, 0)
                after = tuple(new.where(keep, old) for new, old in zip(after, state))
            outputs.append(output)
            state = after
        return torch.stack(outputs, 1), state


class LongShortTermCell(StepCell):
    """The memory cell of 1997, without or with the forget gate of 2000 and the peepholes of 2002::

    s_t = f * s_{t-1} + i * tanh(g)        h_t = o * tanh(s_t)

    Without a forget gate f = 1. With peepholes i and f also see ``p * s_{t-1}``, and o sees ``p * s_t``. Gates in the
    order i, f, g, o, as torch's.
    """

    def __init__(self, dim: int, hidden: int, *, forget_gate: bool, peephole: bool) -> None:
        super().__init__()
        self.widths, self.forget_gate = (hidden, hidden), forget_gate
        gates = 4 if forget_gate else 3
        self.input = nn.Linear(dim, gates * hidden)
        self.recurrent = nn.Linear(hidden, gates * hidden, bias=False)
        self.peepholes = nn.Parameter(torch.zeros(gates - 1, hidden)) if peephole else None

    def step(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        h, s = state
        parts = list((gates + F.linear(h, wide(self.recurrent.weight))).chunk(4 if self.forget_gate else 3, -1))
        if not self.forget_gate:
            parts.insert(1, torch.zeros_like(parts[0]))
        i, f, g, o = parts
        if self.peepholes is not None:
            i = i + wide(self.peepholes[0]) * s
            f = f + wide(self.peepholes[1]) * s if self.forget_gate else f
        kept = torch.sigmoid(f) * s if self.forget_gate else s
        s = kept + torch.sigmoid(i) * torch.tanh(g)
        if self.peepholes is not None:
            o = o + wide(self.peepholes[-1]) * s
        h = torch.sigmoid(o) * torch.tanh(s)
        return h, (h, s)


class ResetBeforeCell(StepCell):
    """The gated unit as first published (Cho et al. 2014): the reset gate acts before the recurrent product::

    n = tanh(W x + U (r * h))        h <- (1 - z) * n + z * h
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widths = (hidden,)
        self.input = nn.Linear(dim, 3 * hidden)
        self.gates = nn.Linear(hidden, 2 * hidden, bias=False)
        self.candidate = nn.Linear(hidden, hidden, bias=False)

    def step(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        r, z, n = gates.chunk(3, -1)
        from_h = F.linear(h, wide(self.gates.weight)).chunk(2, -1)
        r, z = torch.sigmoid(r + from_h[0]), torch.sigmoid(z + from_h[1])
        n = torch.tanh(n + F.linear(r * h, wide(self.candidate.weight)))
        h = (1 - z) * n + z * h
        return h, (h,)


class JordanCell(StepCell):
    """The network of Jordan 1986: context units hold the previous outputs, with a link to themselves::

    c_t = a c_{t-1} + y_{t-1}        h_t = act(W x_t + R c_t + b)        y_t = V h_t + d

    The state is the next context, ``a c_t + y_t``.
    """

    def __init__(self, dim: int, hidden: int, outputs: int, *, self_link: float, activation: str) -> None:
        super().__init__()
        self.widths, self.self_link, self.activation = (outputs,), self_link, ACTIVATIONS[activation]
        self.input = nn.Linear(dim, hidden)
        self.context = nn.Linear(outputs, hidden, bias=False)
        self.output = nn.Linear(hidden, outputs)

    def step(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        (context,) = state
        h = self.activation(gates + F.linear(context, wide(self.context.weight)))
        y = F.linear(h, wide(self.output.weight), wide(self.output.bias))
        return y, (self.self_link * context + y,)
