"""Small runs: pure functions of their seed, scored on text and tasks as defined."""

import math
from dataclasses import replace

import pytest
import torch

from subquad import tasks
from subquad.bench.trials import BITS, GrowingLength, TaskTrial, TextTrial, bits_at, bits_per_token

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "positions": "none"}
TEXT = TextTrial(
    fields=FIELDS, steps=8, batch_size=2, learning_rate=1e-2, length=16, test_lengths=(16,), size="tiny", test_bytes=512
)
PARITY = TaskTrial(
    fields=FIELDS, task=tasks.get("parity"), steps=8, batch_size=4, learning_rate=1e-2, length=8, test_lengths=(8, 12)
)


class Uniform(torch.nn.Module):
    device = torch.device("cpu")

    def loss_from_labels(self, inputs, labels):
        return torch.tensor(math.log(256.0))


def test_uniform_bytes_cost_eight_bits():
    windows = tasks.source_text("tiny").eval_windows("test", 64, 4)
    assert bits_per_token(Uniform(), windows) == pytest.approx(8)
    with pytest.raises(ValueError, match="no label"):
        bits_per_token(Uniform(), [])


def test_bits_are_the_mean_over_labels_of_batches_of_any_size():
    model = TEXT.build({"mixers": "gla"}, seed=0).eval()
    windows = list(tasks.source_text("tiny").eval_windows("test", 32, 5, batch_size=2))
    assert [len(batch.inputs) for batch in windows] == [2, 2, 1]
    whole = list(tasks.source_text("tiny").eval_windows("test", 32, 5, batch_size=5))
    assert bits_per_token(model, windows) == pytest.approx(bits_per_token(model, whole), rel=1e-5)


def test_a_run_is_a_pure_function_of_its_seed():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = TEXT.run({"mixers": "gla"}, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(first) == [BITS]
    torch.manual_seed(6)
    assert TEXT.run({"mixers": "gla"}, seed=0) == first
    assert TEXT.run({"mixers": "gla"}, seed=1) != first


def test_several_lengths_are_several_measures():
    scores = replace(TEXT, test_lengths=(16, 32)).run({"mixers": "gla"}, seed=0)
    assert list(scores) == [bits_at(16), bits_at(32)]


def test_training_lowers_the_loss():
    untrained = TEXT.score(TEXT.build({"mixers": "gla"}, seed=0).eval())
    trained = replace(TEXT, steps=60, batch_size=8).run({"mixers": "gla"}, seed=0)
    assert trained[BITS] < untrained[BITS] - 1


def test_accuracy_of_a_model_that_knows_the_answer():
    class Oracle:
        device = torch.device("cpu")

        def __call__(self, input_ids):
            parity = input_ids.cumsum(1) % 2
            wrong = parity.clone()
            wrong[:, 0] = 1 - wrong[:, 0]
            return type("Output", (), {"logits": torch.nn.functional.one_hot(wrong, 2).float()})()

    scores = PARITY.score(Oracle())
    assert scores == {
        "accuracy at 8": pytest.approx(7 / 8),
        "last accuracy at 8": 1.0,
        "accuracy at 12": pytest.approx(11 / 12),
        "last accuracy at 12": 1.0,
    }


def test_the_last_label_is_where_one_is_asked():
    """Overwriting asks at every second place; a model that always answers token 0 is never right."""
    trial = TaskTrial(fields=FIELDS, task=tasks.get("overwriting"), steps=8, batch_size=4, learning_rate=1e-2)

    class Zero:
        device = torch.device("cpu")

        def __call__(self, input_ids):
            logits = torch.zeros(*input_ids.shape, trial.vocab_size)
            logits[..., 0] = 1
            return type("Output", (), {"logits": logits})()

    assert trial.score(Zero()) == {"accuracy": 0.0, "last accuracy": 0.0}


def test_lengths_grow_to_the_full_one():
    data = GrowingLength(tasks.get("parity"), batch_size=3, seed=0, length=40, batches=20)
    lengths = [data.batch(i).inputs.shape[1] for i in range(25)]
    assert lengths[0] < 4
    assert lengths == sorted(lengths)
    assert lengths[19:] == [40] * 6
    stepped = GrowingLength(tasks.get("modular_arithmetic"), batch_size=1, seed=0, length=20, batches=7)
    assert {stepped.batch(i).inputs.shape[1] % 2 for i in range(9)} == {0}


def test_a_method_s_fields_come_after_the_trial_s_and_edits_last():
    seen = []
    model = TEXT.build({"mixers": "linear", "hidden_size": 8}, 0, edit=seen.append)
    assert seen == [model]
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.vocab_size) == (8, 2, 256)
