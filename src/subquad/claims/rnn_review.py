"""68 RNN review: what gated and bidirectional networks learn that simple ones cannot (Lipton et al. 2015)."""

from collections.abc import Callable

import torch
from torch import Tensor

from subquad import mixers
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import Computed
from subquad.claims.networks import ACCURACY, ERROR, Generated, MixerNetwork, TrainedNetwork
from subquad.mixers import Bidirectional, Mixer
from subquad.training import RTRL
from subquad.training.data import IGNORED

LAG, WIDTH = 40, 64
SYMBOLS, NEIGHBOURS_LENGTH = 4, 24
FLOW_LENGTH = 60
ADAM = (0.9, 0.999)
FLOW = "{}: |d out / d x_1| over |d out / d x_60|"
ONLINE, DIFFERENCE = "RTRL", "largest difference to BPTT"


def adding(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1] and a mark on one in each half; the target is the sum of the marked two (variance 1/6)."""
    values = torch.rand(rows, LAG, generator=generator)
    marks = torch.zeros(rows, LAG)
    for start in (0, LAG // 2):
        place = start + torch.randint(LAG // 2, (rows, 1), generator=generator)
        marks.scatter_(1, place, 1.0)
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True)


def neighbours(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, one-hot; at each place whether the one before is smaller than the one after. The ends are not asked."""
    symbols = torch.randint(SYMBOLS, (rows, NEIGHBOURS_LENGTH), generator=generator)
    labels = torch.full_like(symbols, IGNORED)
    labels[:, 1:-1] = (symbols[:, :-2] < symbols[:, 2:]).long()
    return torch.nn.functional.one_hot(symbols, SYMBOLS).float(), labels


def _adding(name: str, steps: int) -> TrainedNetwork:
    return TrainedNetwork(
        Generated(adding),
        lambda: MixerNetwork(mixers.build(name, 2, hidden_size=WIDTH), 1),
        steps=steps,
        batch_size=64,
        learning_rate=6e-3,
        weight_decay=0.0,
        final_learning_rate=6e-4,
        betas=ADAM,
    )


def _neighbours(build: Callable[[], Mixer]) -> TrainedNetwork:
    return TrainedNetwork(
        Generated(neighbours),
        lambda: MixerNetwork(build(), 2, readout="every"),
        steps=300,
        batch_size=32,
        learning_rate=4e-3,
        weight_decay=0.0,
        final_learning_rate=4e-4,
        betas=ADAM,
    )


def _reach(seed: int) -> dict[str, float]:
    """At the start of training: how much of the first input's gradient is left beside the last one's."""
    candidates = {
        "Elman": ("elman", {}),
        "LSTM, forget bias 0": ("lstm", {"forget_bias": 0.0}),
        "LSTM, forget bias 2": ("lstm", {"forget_bias": 2.0}),
        "GRU": ("gru", {}),
    }
    figures = {}
    for label, (name, options) in candidates.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = mixers.build(name, WIDTH, **options).double()
            x = torch.randn(8, FLOW_LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(mixer(x).output[:, -1].sum(), x)
        sizes = gradient.norm(dim=-1).mean(0)
        figures[FLOW.format(label)] = float(sizes[0] / sizes[-1])
    return figures


def _online(seed: int) -> dict[str, float]:
    """The gradient of a loss at every step, by real-time recurrent learning and by back-propagation through time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = mixers.build("elman", 6).double()
        x, weight = torch.randn(2, 3, 20, 6, dtype=torch.float64)
    (mixer(x).output * weight).sum().backward()
    expected = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    learner = RTRL(mixer)
    for x_t, weight_t in zip(x.unbind(1), weight.unbind(1)):
        learner.step(x_t)
        learner.accumulate(weight_t)
    found = [p.grad for p in mixer.parameters()]
    return {DIFFERENCE: max(float((a - b).abs().max()) for a, b in zip(found, expected))}


CLAIM = Claim(
    number=68,
    slug="rnn_review",
    claim="Gated networks learn over long lags, and bidirectional ones from both contexts, what simple recurrent "
    "networks cannot.",
    measured=f"The adding problem over {LAG} steps, 64 units, batch 64, 500 steps (LSTM and Elman 700), squared error "
    "(0.167 for the mean); whether the symbol before is smaller than the one after, 300 steps of 32, against one "
    "direction's ceiling of 0.75; the gradient's reach at the start; RTRL against BPTT.",
    arms={
        "adding: GRU": _adding("gru", 500),
        "adding: LSTM": _adding("lstm", 700),
        "adding: Elman": _adding("elman", 700),
        "neighbours: bidirectional LSTM": _neighbours(
            lambda: Bidirectional(*(mixers.build("lstm", SYMBOLS, hidden_size=40) for _ in range(2)))
        ),
        "neighbours: LSTM": _neighbours(lambda: mixers.build("lstm", SYMBOLS, hidden_size=64)),
        "gradient at the start": Computed(_reach),
        ONLINE: Computed(_online),
    },
    rules=(
        at_most(Term("adding: GRU", ERROR), plus=0.02),
        at_least(Term("adding: Elman", ERROR), plus=0.12),
        at_least(Term("neighbours: bidirectional LSTM", ACCURACY), plus=0.99),
        at_most(Term("neighbours: LSTM", ACCURACY), plus=0.78),
        at_most(Term(ONLINE, DIFFERENCE), plus=1e-9),
    ),
    remark="The LSTM's error on the adding problem is shown, not judged. The recipe is Adam, its rate falling to a "
    "tenth. Behind a learnt embedding of the two inputs Elman networks do learn this lag (0.07 and 0.01).",
)
