"""One process of a data-parallel run: ``python two_processes.py FOLDER``, with torchrun's environment variables.

Writes what it ended with to ``FOLDER/result-RANK.json`` and its weights to ``FOLDER/weights-RANK.pt``.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console

from subquad.training import NonFiniteLoss, TrainingOptions, TrainingResult, train

specification = importlib.util.spec_from_file_location("samples", Path(__file__).with_name("conftest.py"))
samples = importlib.util.module_from_spec(specification)
specification.loader.exec_module(samples)


def options(steps: int) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        batch_size=4,
        learning_rate=0.02,
        schedule="constant",
        accumulate=2,
        save_every=4,
        eval_every=4,
        find_unused_parameters=True,
        tensorboard=False,
    )


def model() -> torch.nn.Module:
    """float64, without dropout (each process draws its own), with a parameter that no step uses."""
    torch.manual_seed(0)
    model = samples.TinyModel(dropout=0.0, dtype=torch.float64)
    model.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    return model


def evaluate(model: torch.nn.Module) -> dict[str, float]:
    return {"rank": int(os.environ.get("RANK", 0)), "sum": float(model.hidden.weight.sum())}


class PoisonedOnOneProcess(samples.CountedData):
    """Row 1, which the second of two processes gets, holds a token beyond the poisoned model's table in batch 5."""

    def batch(self, index):
        inputs, labels = super().batch(index)
        inputs[:] = 0
        inputs[1] = 1 if index == 5 else 0
        return samples.Batch(inputs, labels)


def failure() -> list[object]:
    """What every process is told when the loss of one is NaN."""

    class Logarithm(torch.nn.Module):
        def forward(self, x):
            return torch.log(x) + torch.log(1 - x)

    class Poisoned(samples.TinyModel):
        def __init__(self):
            super().__init__(dropout=0.0, dtype=torch.float64)
            self.logarithm = Logarithm()

        def forward(self, tokens):
            return SimpleNamespace(
                logits=super().forward(tokens).logits + 0 * self.logarithm(tokens[..., None] / 2 + 0.5)
            )

    def objective(model, batch):
        return torch.nn.functional.cross_entropy(model(batch.inputs).logits.flatten(0, 1), batch.labels.flatten()), {}

    try:
        train(
            Poisoned(), PoisonedOnOneProcess(), options(4), out=None, objective=objective, console=Console(quiet=True)
        )
    except NonFiniteLoss as error:
        return [error.step, error.batch, error.layer]
    return []


def run(folder: Path) -> tuple[torch.nn.Module, TrainingResult]:
    """Nine steps in two calls, the second of which resumes the first."""
    trained, arguments = model(), {"out": folder, "resume": True, "evaluate": evaluate, "console": Console(quiet=True)}
    for steps in (6, 9):
        result = train(trained, samples.CountedData(), options(steps), **arguments)
    return trained, result


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    trained, result = run(folder / "run")
    ended = {"step": result.step, "tokens": result.tokens, "last": result.history[-1], "failure": failure()}
    (folder / f"result-{rank}.json").write_text(json.dumps(ended))
    torch.save(trained.state_dict(), folder / f"weights-{rank}.pt")
    torch.distributed.destroy_process_group()
