"""The digits are all there, once, split the same way on every call."""

import sys

import pytest
import torch

from subquad import tasks


def test_every_digit_is_in_one_split():
    train, test = tasks.digits("train"), tasks.digits("test")
    pixels = torch.cat([train.images, test.images]).flatten(1)
    assert pixels.shape == (1797, 64)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert len({row.numpy().tobytes() for row in pixels}) == 1797
    counts = torch.bincount(test.labels, minlength=10)
    assert bool((counts > 25).all())
    assert torch.equal(tasks.digits("test").images, test.images)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'train'"):
        tasks.digits("trian")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"subquad\[data\]"):
        tasks.digits()
