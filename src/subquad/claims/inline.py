"""18 InLine: linear attention falls short for two reasons, confused queries and no sense of place (Han et al. 2024).

Handwritten digits as 64 pixel tokens; beside InLine stand softmax attention, linear attention, and linear attention
with a plain 5 x 5 depthwise convolution of the values. The second part needs no training: which queries share their
weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from subquad.bench.distinct_queries import injectivity
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import Computed
from subquad.claims.networks import ACCURACY, Generated, SequenceNetwork, TrainedNetwork
from subquad.mixers import Mixer, build
from subquad.mixers.contract import MixerOutput, Request
from subquad.mixers.linear import LinearAttention
from subquad.ops.injective.reference import injective_weights
from subquad.tasks import digits
from subquad.training import Data
from subquad.training.data import Batch

DIM, HEADS, LAYERS, SIDE = 32, 2, 2, 8
NOISE, TESTED = 0.15, 1000
RAY_LINEAR, RAY_INLINE, NEAREST, COLLISION = (
    "linear attention: q against 2q",
    "InLine: q against 2q",
    "InLine: nearest of 100 queries, 64 keys",
    "InLine: a constructed pair, as many keys as the head is wide",
)
GLOBAL, FULL, SOFTMAX, WEIGHTS = "InLine, global part", "InLine", "softmax", "weights"
PLAIN = {"relu": "linear attention, relu", "elu+1": "linear attention, elu + 1"}
CONVOLVED = "linear attention, relu, and a plain 5x5 convolution"


def noisy_digits(split: str, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits of a split, drawn with replacement, as rows of 64 pixels with new noise."""
    images, labels = digits(split)
    chosen = torch.randint(len(labels), (rows,), generator=generator)
    pixels = images[chosen] + NOISE * torch.randn(rows, SIDE, SIDE, generator=generator)
    return pixels.flatten(1)[..., None], labels[chosen]


class NoisyDigits:
    """Digits to train on without end, and 1,000 of the others to test with."""

    def train(self, batch_size: int, seed: int) -> Data:
        return Generated(partial(noisy_digits, "train")).train(batch_size, seed)

    def test(self) -> Batch:
        return Generated(partial(noisy_digits, "test"), TESTED).test()


class PixelNetwork(SequenceNetwork):
    """Tokens are ``2 e(pixel) (1 + position) + position``: what a pixel says depends on where it lies."""

    def __init__(self, layers: Sequence[Mixer]) -> None:
        super().__init__(1, 10, layers, positions=SIDE**2, readout="mean", grid=(SIDE, SIDE))
        assert self.positions is not None
        nn.init.normal_(self.positions)

    def tokens(self, x: Tensor) -> Tensor:
        assert self.positions is not None
        return 2 * self.embed(x) * (1 + self.positions) + self.positions


class ConvolvedLinear(LinearAttention):
    """Linear attention and a 5 x 5 depthwise convolution of the values, the same for all images."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, causal=False, feature_map="relu")
        self.convolution = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        assert request.grid is not None
        q, k, v = self.project(x, x)
        o, _ = self.phi.attend(q, k, v, causal=False)
        image = v.flatten(-2).transpose(1, 2).unflatten(-1, request.grid)
        local = self.convolution(image).flatten(-2).transpose(1, 2)
        return MixerOutput(self.o_proj(o.flatten(-2) + local), None, {})


def _trained(make: Callable[[], Mixer]) -> TrainedNetwork:
    return TrainedNetwork(
        NoisyDigits(),
        lambda: PixelNetwork([make() for _ in range(LAYERS)]),
        steps=250,
        batch_size=32,
        learning_rate=4e-3,
    )


def _mixer(name: str, **options: object) -> Callable[[], Mixer]:
    return lambda: build(name, DIM, num_heads=HEADS, causal=False, **options)


def _weights(seed: int) -> dict[str, float]:
    """Distances between weights of different queries, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = build("linear", DIM, num_heads=HEADS, causal=False, feature_map="relu").double()
        inline = build("inline", DIM, num_heads=HEADS).double()
        width = DIM // HEADS
        q = torch.randn(1, 1, 1, width, dtype=torch.float64)
        k = torch.randn(1, width, 1, width, dtype=torch.float64)
    found = injectivity(inline, tokens=SIDE**2, seed=seed)
    centred = (k - k.mean(1, keepdim=True))[0, :, 0]
    unseen = torch.linalg.svd(centred)[2][-1]  # no centred key has a part in this direction
    pair = injective_weights(torch.cat([q, q + unseen], dim=1), k, scale=1.0)[0, 0]
    return {
        RAY_LINEAR: injectivity(linear, tokens=SIDE**2, seed=seed).ray_distance,
        RAY_INLINE: found.ray_distance,
        NEAREST: found.smallest_distance,
        COLLISION: float((pair[0] - pair[1]).abs().max()),
    }


APART = 1e-6  # far above the rounding of float64, 1e-16

CLAIM = Claim(
    number=18,
    slug="inline",
    claim="Weights that tell queries apart and a local residual lift linear attention above softmax attention.",
    measured=f"Digits as {SIDE**2} pixel tokens with noise {NOISE}, {LAYERS} layers, D {DIM}, {HEADS} heads, 250 steps "
    f"of 32, one learning rate for all; {TESTED:,} test images. Weights: float64, no training.",
    arms={
        FULL: _trained(_mixer("inline")),
        GLOBAL: _trained(_mixer("inline", local=False)),
        **{name: _trained(_mixer("linear", feature_map=phi)) for phi, name in PLAIN.items()},
        CONVOLVED: _trained(lambda: ConvolvedLinear(DIM, HEADS)),
        SOFTMAX: _trained(_mixer("softmax", rope_base=None)),
        WEIGHTS: Computed(_weights),
    },
    rules=(
        *(at_least(Term(GLOBAL, ACCURACY), Term(name, ACCURACY)) for name in PLAIN.values()),
        at_least(Term(FULL, ACCURACY), Term(GLOBAL, ACCURACY), plus=0.03),
        at_least(Term(FULL, ACCURACY), Term(SOFTMAX, ACCURACY)),
        at_most(Term(WEIGHTS, RAY_LINEAR), plus=0.0),
        at_least(Term(WEIGHTS, RAY_INLINE), plus=APART),
        at_least(Term(WEIGHTS, NEAREST), plus=APART),
        at_most(Term(WEIGHTS, COLLISION), plus=1e-12),
    ),
    remark="Every seed is judged by itself. The local residual, whose kernels have to be learnt, is behind the global "
    "part after 250 steps; four times as many close the gap and no more.",
)
