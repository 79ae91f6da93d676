"""The measurements of speed and memory that a worker process does, plain values in and out.

They import no training: a process that measures memory starts sooner without it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from subquad.evaluation.memory import prefill_memory
from subquad.evaluation.throughput import ContextCost, context_cost
from subquad.models import SubquadConfig, SubquadForCausalLM

Report = Callable[[int], None]


def speed(
    report: Report,
    *,
    fields: dict[str, Any],
    contexts: list[int],
    decode_tokens: int,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Reading and writing at each context, shortest first, while ``seconds`` last.

    Before a length is tried its time is foretold from the shorter ones, as the square of the length at worst.
    """
    torch.set_num_threads(threads)
    model = build_model(fields, 0).eval()
    context_cost(model, min(64, contexts[0]), decode_tokens=2, repeats=1)
    began = time.perf_counter()
    costs: list[ContextCost] = []
    for number, length in enumerate(contexts):
        if costs:
            longer = length / costs[-1].length
            foretold = 2 * min(costs[-1].prefill_seconds) * longer**2 + sum(costs[-1].decode_seconds) * longer
            if foretold > seconds - (time.perf_counter() - began):
                break
        share = seconds / (4 * len(contexts))
        costs.append(context_cost(model, length, decode_tokens=decode_tokens, enough_seconds=share))
        report(number + 1)
    return {"costs": [asdict(cost) for cost in costs], "left_out": contexts[len(costs) :]}


def memory(report: Report, *, fields: dict[str, Any], contexts: list[int], threads: int) -> dict[str, Any]:
    """Peak memory of reading at each context: bytes above the idle model, by length; None where it cannot be read."""
    torch.set_num_threads(threads)
    try:
        peaks = prefill_memory(build_model(fields, 0).eval(), contexts)
    except OSError as error:
        return {"bytes": None, "reason": str(error)}
    report(len(contexts))
    return {"bytes": [peaks[length] for length in contexts], "reason": None}


def build_model(fields: dict[str, Any], seed: int) -> SubquadForCausalLM:
    """An untrained model, a function of the fields and the seed; on the GPU where there is one."""
    torch.manual_seed(seed)
    model = SubquadForCausalLM(SubquadConfig(**fields))
    return model.cuda() if torch.cuda.is_available() else model
