"""64 Negative eigenvalues: parity by a linear RNN whose transitions may reflect (Grazzi et al. 2025, section 5.1)."""

from subquad import tasks
from subquad.bench.trials import TaskTrial
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import SMALL_MODEL, Trained

TRIAL = TaskTrial(
    fields={
        **SMALL_MODEL,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    task=tasks.get("parity"),
    steps=400,
    batch_size=64,
    learning_rate=5e-3,
    weight_decay=0.0,
    length=40,
    growing=True,
    test_lengths=(40, 256),
    test_batches=8,
)
OURS, BASELINE = "DeltaNet, eigenvalues in (-1, 1)", "DeltaNet, eigenvalues in (0, 1)"
FAR = "accuracy at 256"


def _delta_net(low: int) -> Trained:
    return Trained(TRIAL, {"mixers": {"name": "delta_net", "eigenvalues": [low, 1]}})


CLAIM = Claim(
    number=64,
    slug="negative_eigenvalues",
    claim="Linear RNNs whose state transitions have eigenvalues in (-1, 1) learn parity and carry it to longer "
    "sequences; with eigenvalues in (0, 1) they cannot.",
    measured="Running parity, target at every position; 1 layer, D 32, 2 heads, short convolutions, batch 64, 400 "
    "steps; the training length grows to 40 over the first half, the test length is 256; chance is 0.5.",
    arms={OURS: _delta_net(-1), BASELINE: _delta_net(0)},
    rules=(at_least(Term(OURS, FAR), plus=0.9), at_most(Term(BASELINE, FAR), plus=0.65)),
    remark="Targets at every position are far easier than one at the end, which the paper trains 20,000 steps for.",
)
