"""The global random generators (python, numpy, torch) as a pure function of (seed, step, process)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def reseed(seed: int, step: int, process: int = 0) -> None:
    """Seeds python's, numpy's and torch's generators (on every device) for one step of one process.

    Dropout and other noise of a step then depend on nothing that happened before it, so a resumed run draws what the
    uninterrupted one drew.
    """
    words = numpy.random.SeedSequence((seed, step, process)).generate_state(4)
    random.seed(int(words[0]))
    numpy.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Gives the caller's generators back as they were: python's, numpy's, torch's (CPU and CUDA ``device``)."""
    python, legacy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)  # noqa: NPY002
