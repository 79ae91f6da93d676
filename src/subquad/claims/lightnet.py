"""04 LightNet: one pass over a picture in the place of several scans (Qin et al. 2024, sections 3 and 4).

The baseline is gated decay (GLA) over the same tokens in the same network with the same positions, scanned in raster
order, in both directions, or along rows and columns in both; projections are shared and outputs are summed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import mixers
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.networks import ACCURACY, MILLISECONDS, Arrays, SequenceNetwork, TimedNetwork, TrainedNetwork
from subquad.mixers import Mixer, MixerOutput, Pattern
from subquad.mixers.contract import Request, wide
from subquad.ops import gla
from subquad.positions.md_lrpe import grid_coordinates
from subquad.tasks import digits

DIM, HEADS, LAYERS, GRID = 48, 2, 2, (8, 8)
BATCH, EPOCHS, EXAMPLES = 50, 22, 1400
OURS, ONE, TWO, FOUR = "LightNet, one pass", "gated, 1 scan", "gated, 2 scans", "gated, 4 scans"
TIME = "{}: a training step"


class ScannedDecay(Mixer):
    """LightNet's layer around gated decay in ``scans`` orders over a grid: raster, backwards, and by columns."""

    patterns = frozenset({Pattern.FULL_SELF})
    temperature = 16.0

    def __init__(self, dim: int, num_heads: int, scans: int) -> None:
        super().__init__(dim, num_heads, causal=False)
        self.layer = mixers.build("lightnet", dim, num_heads=num_heads, causal=False, lrpe_dims=len(GRID))
        self.decay_proj = nn.Linear(dim, dim)
        self.scans = scans

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        layer, grid = self.layer, request.grid
        q, k, v = layer._heads(layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
        coordinates = grid_coordinates(grid, device=x.device)
        q, k = layer.lrpe(q, coordinates), layer.lrpe(F.silu(k), coordinates)
        log_decay = F.logsigmoid(wide(self.decay_proj(x))).unflatten(-1, (self.num_heads, -1)) / self.temperature
        log_decay = torch.cat([log_decay, log_decay], -1)
        raster = torch.arange(x.shape[1], device=x.device)
        columns = raster.view(grid).T.flatten()
        total = torch.zeros_like(v)
        for order in (raster, raster.flip(0), columns, columns.flip(0))[: self.scans]:
            o, _ = gla(*(t[:, order] for t in (q, k, v, log_decay)))
            total = total + o[:, order.argsort()]
        return MixerOutput(layer._output(total, x), None, {})


def _pixels(split: str) -> tuple[Tensor, Tensor]:
    found = digits(split)
    return found.images.flatten(1)[..., None], found.labels


TASK = Arrays(_pixels)


def _lightnet() -> Mixer:
    return mixers.build("lightnet", DIM, num_heads=HEADS, causal=False, lrpe_dims=len(GRID))


def _network(make: Callable[[], Mixer]) -> SequenceNetwork:
    made = [make() for _ in range(LAYERS)]
    return SequenceNetwork(1, 10, made, readout="mean", grid=GRID, feedforward_name="swiglu", norm="rms")


BUILD: dict[str, Callable[[], SequenceNetwork]] = {
    OURS: lambda: _network(_lightnet),
    TWO: lambda: _network(lambda: ScannedDecay(DIM, HEADS, 2)),
    FOUR: lambda: _network(lambda: ScannedDecay(DIM, HEADS, 4)),
    ONE: lambda: _network(lambda: ScannedDecay(DIM, HEADS, 1)),
}

CLAIM = Claim(
    number=4,
    slug="lightnet",
    claim="One pass of an additive recurrence over all dimensions is as accurate as several scans, and cheaper.",
    measured="Digits as 64 tokens of one pixel on an 8 x 8 grid; 2 layers, D 48, 2 heads, MD-LRPE in every row, mean "
    "pooling, 22 epochs of batches of 50, one learning rate; the time of a training step.",
    arms={
        **{
            name: TrainedNetwork(
                TASK,
                build,
                steps=EPOCHS * (EXAMPLES // BATCH),
                batch_size=BATCH,
                learning_rate=4e-3,
                weight_decay=0.05,
            )
            for name, build in BUILD.items()
        },
        **{TIME.format(name): TimedNetwork(TASK, build, BATCH) for name, build in BUILD.items()},
    },
    rules=(
        at_least(Term(OURS, ACCURACY), Term(TWO, ACCURACY), plus=-0.03),
        at_most(Term(TIME.format(OURS), MILLISECONDS), Term(TIME.format(TWO), MILLISECONDS), times=0.6),
        at_most(Term(TIME.format(OURS), MILLISECONDS), Term(TIME.format(FOUR), MILLISECONDS), times=0.35),
    ),
    remark="Beside them one causal scan with the same positions, which several scans are meant to better. Learning "
    "rates were not swept.",
)
