"""Feed-forward layers of a model trained towards zeros, one token at a time: sparse against dense.

A byte model with SwiGLU is trained, its activation exchanged for ReLU, and trained on under a growing penalty. Whenever
its measured sparsity has passed a level, one token after another goes through all its feed-forward layers, sparse and
dense by turns, on the inputs that the model itself gives them. Writes results/sparse_feedforward.json.
"""

import copy
import statistics
import sys
import time
from typing import Any

import machine
import torch
from rich.console import Console
from torch import Tensor, nn

from subquad import SubquadConfig, SubquadForCausalLM, tasks, training
from subquad.compress.prosparse import substitute_relu
from subquad.compress.sparse_feedforward import sparsify
from subquad.evaluation import sparsity
from subquad.layers.feedforward_sites import feedforward_sites
from subquad.training.progressive_l1 import PenaltyStage, ProgressiveL1

FIELDS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
LENGTH, BATCH, TEACHER_STEPS, STAGE_STEPS, MOST_STAGES = 128, 8, 150, 30, 16
FIRST_PENALTY, GROWTH = 1e-4, 2.0
LEVELS = (0.0, 0.5, 0.8, 0.9)
TOKENS, PAIRS = 32, 9


def train(model: nn.Module, steps: int, learning_rate: float, seed: int, objective: Any = None) -> None:
    options = training.TrainingOptions(
        steps=steps,
        batch_size=BATCH,
        learning_rate=learning_rate,
        schedule="constant",
        warmup_steps=steps // 10,
        seed=seed,
    )
    data = training.from_text(tasks.source_text(), LENGTH, BATCH, seed)
    chosen = training.objectives.next_token if objective is None else objective
    training.train(model, data, options, out=None, objective=chosen, console=Console(quiet=True))


def windows() -> list[Tensor]:
    text = tasks.source_text()
    return [batch.inputs for batch in text.eval_windows("valid", LENGTH, 32, batch_size=16)]


@torch.no_grad()
def decode_seconds(model: SubquadForCausalLM) -> dict[str, float]:
    """Median seconds of one token through all feed-forward layers, dense and sparse by turns."""
    model = copy.deepcopy(model).eval()
    inputs: list[Tensor] = []
    handles = [
        site.module.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0, -TOKENS:]))
        for site in feedforward_sites(model)
    ]
    model(input_ids=windows()[0][:1], use_cache=False)
    for handle in handles:
        handle.remove()
    dense = [copy.deepcopy(site.module) for site in feedforward_sites(model)]
    names = sparsify(model)
    sparse = [model.get_submodule(name) for name in names]

    def run(layers: list[nn.Module]) -> float:
        started = time.perf_counter()
        for token in range(TOKENS):
            for layer, x in zip(layers, inputs):
                layer(x[None, token : token + 1])
        return (time.perf_counter() - started) / TOKENS

    run(dense), run(sparse)
    pairs = [(run(dense), run(sparse)) for _ in range(PAIRS)]
    return {"dense": statistics.median(a for a, _ in pairs), "sparse": statistics.median(b for _, b in pairs)}


def measured(model: SubquadForCausalLM, level: float, penalty: float) -> dict[str, Any]:
    found = sparsity.measure(model, windows())
    seconds = decode_seconds(model)
    return {
        "level": level,
        "penalty": penalty,
        "sparsity": 1 - found.ratio,
        "nats_per_byte": found.dense_loss,
        "seconds": seconds,
        "dense_over_sparse": seconds["dense"] / seconds["sparse"],
    }


def main() -> None:
    torch.manual_seed(0)
    model = SubquadForCausalLM(
        SubquadConfig(vocab_size=tasks.source_text().vocab_size, mixers="gla", initializer_range=0.03, **FIELDS)
    )
    train(model, TEACHER_STEPS, 1e-3, 0)
    rows = [measured(model, LEVELS[0], 0.0)]
    print(rows[-1], flush=True)
    substitute_relu(model)
    penalty, left = 0.0, list(LEVELS[1:])
    for stage in range(MOST_STAGES):
        train(model, STAGE_STEPS, 5e-4, stage + 1, ProgressiveL1([PenaltyStage(penalty, 1)]) if penalty else None)
        reached = 1 - sparsity.measure(model, windows()).ratio
        while left and reached >= left[0]:
            rows.append(measured(model, left.pop(0), penalty))
            print(rows[-1], flush=True)
        if not left:
            break
        penalty = penalty * GROWTH if penalty else FIRST_PENALTY
    results = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads(), "model": FIELDS}
    print(machine.write("sparse_feedforward", {**results, "rows": rows}))


if __name__ == "__main__":
    main()
