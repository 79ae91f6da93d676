"""A model with dropout and tied weights that trains in milliseconds, and data that is a function of its index."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from subquad.training import Batch, TrainingOptions, train

VOCABULARY = 11


class TinyModel(nn.Module):
    """Token t from token t, through an embedding, one hidden layer with dropout, a norm, and the embedding again."""

    def __init__(self, width=8, dropout=0.2, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, dtype=dtype)
        self.hidden = nn.Linear(width, width, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, VOCABULARY, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        x = x + self.dropout(torch.tanh(self.hidden(x)))
        return SimpleNamespace(logits=self.head(self.norm(x)))


class CountedData:
    """Batch ``index``: random tokens, and as labels the next number; some labels, more in some batches, are ignored."""

    def __init__(self, batch_size=4, length=6):
        self.batch_size, self.length, self.asked = batch_size, length, []

    def batch(self, index):
        self.asked.append(index)
        generator = torch.Generator().manual_seed(1000 + index)
        tokens = torch.randint(VOCABULARY, (self.batch_size, self.length), generator=generator)
        labels = (tokens + 1) % VOCABULARY
        labels[torch.rand(labels.shape, generator=generator) < 0.15 * (index % 4)] = -100
        return Batch(tokens, labels)


@pytest.fixture
def tiny_model():
    def make(seed=0, **options):
        torch.manual_seed(seed)
        return TinyModel(**options)

    return make


@pytest.fixture
def counted_data():
    return CountedData


@pytest.fixture
def options():
    def make(**changes):
        usual = {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 3, "tensorboard": False}
        return TrainingOptions(**(usual | changes))

    return make


@pytest.fixture
def quiet_train():
    def run(model, data, options, *, out=None, **arguments):
        return train(model, data, options, out=out, console=Console(quiet=True), **arguments)

    return run
