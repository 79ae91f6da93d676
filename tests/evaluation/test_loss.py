"""Bits per byte, against models whose loss is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from subquad.evaluation.loss import bits_by_position, bits_per_byte, smoothed
from subquad.tasks import TextData


def text(size=6000):
    words = np.random.default_rng(0).integers(97, 105, size).astype(np.uint8).tobytes()
    return TextData.from_splits({"train": words, "valid": words[:1001], "test": words[::-1][:1201]}, "drawn letters")


class Table(nn.Module):
    """A model that knows the log probability of each byte after each byte, and nothing more."""

    def __init__(self, log_probabilities):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(log_probabilities, dtype=torch.float32))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_that_knows_nothing_pays_eight_bits():
    assert bits_per_byte(Table(np.zeros((256, 256))), text(), context=50) == pytest.approx(8.0, abs=1e-5)


def test_a_table_of_pairs_pays_what_the_text_says_of_one():
    data = text()
    pairs = np.ones((256, 256))
    np.add.at(pairs, (data.train[:-1], data.train[1:]), 1)
    model = Table(np.log(pairs / pairs.sum(1, keepdims=True)))
    # 1,200 predictions are 24 whole windows of 50: the same ones that the bigram figure is a mean of
    assert bits_per_byte(model, data, context=50) == pytest.approx(data.bigram_bits("test"), abs=1e-5)


def test_stretches_of_positions_average_to_the_whole():
    data, model = text(), Table(np.random.default_rng(1).normal(size=(256, 256)))
    stretches = bits_by_position(model, data, "test", 60, blocks=4)
    assert len(stretches) == 4
    assert np.mean(stretches) == pytest.approx(bits_per_byte(model, data, context=60), abs=1e-6)
    with pytest.raises(ValueError, match="blocks must divide length = 60; got 7"):
        bits_by_position(model, data, "test", 60, blocks=7)


def test_tokens_of_several_bytes_count_by_their_bytes():
    data = text()
    halved = TextData(
        data.train, data.valid, data.test, 256, "", "given", {split: 2 * size for split, size in data.num_bytes.items()}
    )
    model = Table(np.zeros((256, 256)))
    assert bits_per_byte(model, halved, context=50) == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_in_its_mode(mode):
    model = Table(np.zeros((256, 256))).train(mode)
    bits_per_byte(model, text(), context=50, limit=2)
    assert model.training is mode


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"2001 tokens.*1201"):
        bits_per_byte(Table(np.zeros((256, 256))), text(), context=2000)


def test_smoothing_keeps_the_mean_and_the_end():
    values = [math.sin(i) for i in range(103)]
    points = smoothed(values, 10)
    assert len(points) == 10
    assert points[-1][0] == 103
    widths = np.diff([0, *(end for end, _ in points)])
    assert np.dot(widths, [mean for _, mean in points]) / 103 == pytest.approx(np.mean(values))
    assert smoothed([1.0, 2.0], 10) == [(1, 1.0), (2, 2.0)]
