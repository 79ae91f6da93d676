"""ProSparse's penalty: its schedule, what it adds to the loss, and that it makes neurons idle."""

from itertools import pairwise

import pytest
import torch
from rich.console import Console

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.evaluation import sparsity
from subquad.training import Batch, TrainingOptions, train
from subquad.training.objectives import next_token
from subquad.training.progressive_l1 import HiddenValues, PenaltyStage, ProgressiveL1

STAGES = [PenaltyStage(0.1, 10), PenaltyStage(0.4, 30), PenaltyStage(0.4, 40), PenaltyStage(1.0, 50)]


def test_the_factor_meets_its_peaks_and_is_smooth():
    penalty = ProgressiveL1(STAGES)
    assert [penalty.factor(step) for step in (1, 10, 30, 35, 40, 50, 99)] == pytest.approx(
        [0.1, 0.1, 0.4, 0.4, 0.4, 1.0, 1.0]
    )
    steps = [penalty.factor(step) for step in range(10, 31)]
    slopes = [b - a for a, b in pairwise(steps)]
    assert min(slopes) > 0
    assert max(slopes[0], slopes[-1]) < 0.1 * max(slopes)  # flat at both ends


@pytest.mark.parametrize("stages", [[], [(-1.0, 5)], [(0.5, 5), (0.1, 10)], [(0.5, 5), (0.6, 5)], [(0.5, 1.5)]])
def test_bad_stages_are_refused(stages):
    with pytest.raises(ValueError, match=r"stage|peak|steps"):
        ProgressiveL1(stages)


def model():
    torch.manual_seed(0)
    fields = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SubquadForCausalLM(SubquadConfig(feedforward="reglu", **fields))


class Counting:
    def batch(self, index):
        tokens = (torch.arange(17) + torch.arange(index, index + 4)[:, None]) % 16
        return Batch(tokens[:, :-1], tokens[:, 1:])


def test_the_penalty_is_the_norm_over_real_tokens():
    network, penalty = model(), ProgressiveL1([PenaltyStage(0.5, 10)])
    batch = Counting().batch(0)
    labels = batch.labels.clone()
    labels[1:] = -100
    loss, metrics = penalty(network, Batch(batch.inputs, labels))
    with HiddenValues(network) as hidden:
        plain, _ = next_token(network, Batch(batch.inputs, labels))
    norm = sum(h[0].abs().sum(-1).mean() for h in hidden.values)
    torch.testing.assert_close(loss, plain + 0.5 * norm)
    assert metrics["penalty factor"] == 0.5


def run(stages, steps=30, out=None, resume=False):
    network = model()
    options = TrainingOptions(steps=steps, batch_size=4, learning_rate=3e-3, warmup_steps=0, save_every=10)
    train(network, Counting(), options, out=out, resume=resume, objective=stages, console=Console(quiet=True))
    return network


def test_no_penalty_is_the_plain_run_bit_for_bit():
    with_zero, plain = run(ProgressiveL1([PenaltyStage(0.0, 30)])), run(next_token)
    for a, b in zip(with_zero.parameters(), plain.parameters()):
        assert torch.equal(a, b)


def test_a_huge_penalty_leaves_hardly_a_neuron():
    network = run(ProgressiveL1([PenaltyStage(30.0, 200)]), steps=200)
    assert sparsity.measure(network, [Counting().batch(0).inputs]).ratio < 0.01


def test_a_resumed_run_takes_up_the_schedule(tmp_path, monkeypatch):
    stages = [PenaltyStage(0.0, 5), PenaltyStage(0.5, 30)]
    whole = run(ProgressiveL1(stages))
    calls = {"n": 0}
    original = ProgressiveL1.__call__

    def failing(self, *args):
        calls["n"] += 1
        if calls["n"] == 17:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(ProgressiveL1, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(ProgressiveL1(stages), out=tmp_path)
    monkeypatch.undo()
    resumed = run(ProgressiveL1(stages), out=tmp_path, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
