"""Handwritten digits of 8 x 8 pixels (scikit-learn's copy of the UCI set by Alpaydin and Kaynak 1998)."""

import importlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.tasks.contract import Draw, check_choice

TRAINING_IMAGES = 1400


class Images(NamedTuple):
    """Images ``(N, 8, 8)`` float32 in [0, 1] and their classes ``(N,)`` int64."""

    images: Tensor
    labels: Tensor


def digits(split: str = "train") -> Images:
    """1,400 images to train on, 397 to test on: always the same, drawn at random from the 1,797 there are.

    Args:
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: another split.
        ImportError: scikit-learn, which carries the images, is not installed (``pip install "subquad[data]"``).

    Example:
        >>> [tuple(digits(split).images.shape) for split in ("train", "test")]
        [(1400, 8, 8), (397, 8, 8)]
    """
    check_choice("split", split, ("train", "test"))
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "subquad[data]"') from error
    found = datasets.load_digits()
    count = len(found.target)
    order = Draw("digits", seed=0, split="train", index=0).distinct(0, count, 1, count)[0]
    order = order[:TRAINING_IMAGES] if split == "train" else order[TRAINING_IMAGES:]
    images = (found.images[order] / 16).astype(np.float32)
    return Images(torch.from_numpy(images), torch.from_numpy(found.target[order].astype(np.int64)))
