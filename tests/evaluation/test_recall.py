"""Accuracy on recall tasks, by models that answer all or nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from subquad import tasks
from subquad.evaluation.recall import recall_accuracy

TASK = tasks.Mqar(vocab_size=32, length=24, num_pairs=4)


class Lookup(nn.Module):
    """Answers with the token that followed this one at its first place; ``wrong`` adds one to every answer."""

    def __init__(self, wrong=0):
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.zeros(1)), wrong

    def forward(self, input_ids, use_cache):
        first = (input_ids[:, :, None] == input_ids[:, None, :]).int().argmax(-1)
        answers = (input_ids.gather(1, (first + 1).clamp(max=input_ids.shape[1] - 1)) + self.wrong) % 32
        return SimpleNamespace(logits=nn.functional.one_hot(answers, 32).float())


def test_a_model_that_looks_up_is_always_right():
    assert recall_accuracy(Lookup(), TASK, batches=2, batch_size=16) == 1.0
    assert recall_accuracy(Lookup(), TASK, batches=2, batch_size=16, length=40, split="valid") == 1.0


def test_a_model_that_is_always_one_off_is_never_right():
    assert recall_accuracy(Lookup(wrong=1), TASK, batches=2, batch_size=16) == 0.0


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_in_its_mode(mode):
    model = Lookup().train(mode)
    recall_accuracy(model, TASK, batches=1, batch_size=2)
    assert model.training is mode
