"""31 Aaren: attention with a learnt query in constant memory, beside Transformers (Feng et al. 2024, section 4).

Series to forecast, digits to classify row by row and pixel by pixel: the same small network with causal softmax
attention, with Aaren, and a GRU of torch in its place.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from subquad import mixers
from subquad.bench.constant_speed import Preparation, Step, attention_preparation
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import Computed, Timed, milliseconds_at, op_forward
from subquad.claims.networks import (
    ACCURACY,
    ERROR,
    Arrays,
    Generated,
    RecurrentNetwork,
    SequenceNetwork,
    SequenceTask,
    TrainedNetwork,
)
from subquad.mixers import Mixer
from subquad.ops import prefix_attention
from subquad.tasks import digits

DIM, HEADS, LAYERS = 32, 4, 2
PAST, FUTURE, CHANNELS = 48, 24, 3
SEASONS = (24, 168)
PERIODS = (12, 30)
NOISE = 0.3
LENGTHS = (1024, 4096, 16_384)
OP_HEADS, OP_WIDTH = 8, 32
STATE_BYTES = "state bytes after {:,}"
SPEED, SPEED_OF_SOFTMAX, STATE = "the op", "torch's attention", "the layer's state"


def seasons(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of one long series: in each channel a day's and a week's sine and noise. 48 values, and the 24 after.

    Returns:
        ``(rows, 48, 3)`` and ``(rows, 72)``.
    """
    fixed = torch.Generator().manual_seed(0)
    size, phase = _sines((CHANNELS, len(SEASONS)), fixed)
    start = torch.randint(SEASONS[-1], (rows, 1, 1, 1), generator=generator)
    return _window(start, size, phase, SEASONS, generator)


def drawn_sines(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As :func:`seasons`, but every example has sines of its own sizes and phases: twelve numbers to be read off."""
    size, phase = _sines((rows, 1, CHANNELS, len(PERIODS)), generator)
    return _window(torch.zeros(1, 1, 1, 1), size, phase, PERIODS, generator)


def _sines(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return 0.5 + torch.rand(shape, generator=generator), 2 * math.pi * torch.rand(shape, generator=generator)


def _window(
    start: Tensor, size: Tensor, phase: Tensor, periods: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    step = start + torch.arange(PAST + FUTURE)[None, :, None, None]
    values = (size * (2 * math.pi * step / torch.tensor(periods) + phase).sin()).sum(-1)
    values = values + NOISE * torch.randn(values.shape, generator=generator)
    return values[:, :PAST], values[:, PAST:].flatten(1)


def rows_of_digits(split: str) -> tuple[Tensor, Tensor]:
    """A digit is eight tokens of eight pixels."""
    found = digits(split)
    return found.images, found.labels


def pixels_of_digits(split: str) -> tuple[Tensor, Tensor]:
    """A digit is 64 tokens of one pixel."""
    found = digits(split)
    return found.images.flatten(1)[..., None], found.labels


def _mixer(name: str, layer: int) -> Mixer:
    own = {"softmax": {"rope_base": None, "bias": True}}.get(name, {})
    return mixers.build(name, DIM, num_heads=HEADS, layer_index=layer, num_layers=LAYERS, **own)


def _network(name: str, channels: int, outputs: int, length: int) -> SequenceNetwork:
    return SequenceNetwork(channels, outputs, [_mixer(name, i) for i in range(LAYERS)], positions=length)


def _arms(
    label: str, task: SequenceTask, channels: int, outputs: int, length: int, width: int
) -> dict[str, TrainedNetwork]:
    def trained(build: Callable[[], nn.Module]) -> TrainedNetwork:
        return TrainedNetwork(task, build, steps=300, batch_size=32, learning_rate=3e-3)

    return {
        f"{label}: Aaren": trained(lambda: _network("aaren", channels, outputs, length)),
        f"{label}: softmax": trained(lambda: _network("softmax", channels, outputs, length)),
        f"{label}: GRU {width}": trained(lambda: RecurrentNetwork(nn.GRU(channels, width, batch_first=True), outputs)),
    }


def _op(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, length, OP_HEADS, generator=generator)
        values = torch.randn(batch, length, OP_HEADS, OP_WIDTH, generator=generator)
        return op_forward(lambda: prefix_attention(scores, values))

    return prepare


def _state_bytes(seed: int) -> dict[str, float]:
    mixer = _mixer("aaren", 0)
    sizes = {}
    for length in (16, 1024):
        state = mixer(torch.zeros(1, length, DIM), use_state=True).state
        sizes[STATE_BYTES.format(length)] = float(sum(leaf.numel() * leaf.element_size() for leaf in state))
    return sizes


CLAIM = Claim(
    number=31,
    slug="aaren",
    claim="Attention with one learnt query per layer is as good as a Transformer, with a state of constant size and a "
    "cost that grows linearly.",
    measured="Two pre-norm layers, D 32, 4 heads, learnt positions, read at the last token; 300 steps of 32, one "
    "learning rate: windows of 48 x 3 values of a series with two seasons, the next 24 forecast; digits as 8 rows and "
    "as 64 pixels; the op's forward time, 8 heads of 32, beside torch's causal attention.",
    arms={
        **_arms("series", Generated(seasons), CHANNELS, CHANNELS * FUTURE, PAST, 64),
        **_arms("drawn sines", Generated(drawn_sines), CHANNELS, CHANNELS * FUTURE, PAST, 64),
        **_arms("rows", Arrays(rows_of_digits), 8, 10, 8, 64),
        **_arms("pixels", Arrays(pixels_of_digits), 1, 10, 64, 96),
        STATE: Computed(_state_bytes),
        SPEED: Timed(_op, LENGTHS, tokens=None),
        SPEED_OF_SOFTMAX: Timed(lambda seed: attention_preparation(OP_HEADS, OP_WIDTH, False, seed), LENGTHS, None, 1),
    },
    rules=(
        at_most(Term("series: Aaren", ERROR), Term("series: softmax", ERROR), plus=0.03),
        at_most(Term("series: Aaren", ERROR), Term("series: GRU 64", ERROR)),
        at_least(Term("rows: Aaren", ACCURACY), Term("rows: softmax", ACCURACY), plus=-0.03),
        at_most(Term(STATE, STATE_BYTES.format(1024)), Term(STATE, STATE_BYTES.format(16))),
        at_most(Term(SPEED, milliseconds_at(16_384)), Term(SPEED, milliseconds_at(4096)), times=5),
        at_most(Term(SPEED, milliseconds_at(16_384)), Term(SPEED_OF_SOFTMAX, milliseconds_at(16_384))),
    ),
    remark="Shown, not judged: series that have sines of their own each, and digits pixel by pixel. Aaren's query does "
    "not depend on the token, so no step can ask for one; a GRU or softmax attention can be far ahead there.",
)
