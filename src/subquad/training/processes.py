"""The processes of a run, through accelerate: device, mixed precision, gradient synchronisation, and who does what.

A run on several processes (``torchrun``, ``accelerate launch``) is data parallel: every process takes its rows of the
same batches, and the result is that of one process up to the order of summation.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
)
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from .options import TrainingOptions

Result = TypeVar("Result")


@contextmanager
def accelerator_for(options: TrainingOptions) -> Iterator[Accelerator]:
    """An Accelerator for one run. accelerate keeps one precision and device per process: those of before are put back.

    Raises:
        ValueError: fp16 without a GPU, a batch that the processes cannot share evenly, or a way of distributing
            parameters (FSDP, DeepSpeed, ...) that this loop does not drive.
    """
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    if options.precision == "fp16" and on_cpu:
        raise ValueError("precision 'fp16' needs a GPU (its loss scaling has no CPU form); use 'bf16' or 'no'")
    shared = (AcceleratorState._shared_state, PartialState._shared_state)
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=options.precision,
            # a plug-in, not a number: the number would yield to an environment variable of `accelerate launch`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.find_unused_parameters)],
        )
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if accelerator.distributed_type not in supported:
            raise ValueError(
                f"this loop runs on one or more processes with whole models; got {accelerator.distributed_type}"
            )
        expected = int(os.environ.get("WORLD_SIZE", 1))
        if accelerator.num_processes != expected:
            raise ValueError(
                f"WORLD_SIZE is {expected}, but {accelerator.num_processes} process takes part in this run"
            )
        if options.batch_size % accelerator.num_processes:
            raise ValueError(
                f"batch_size = {options.batch_size} must be a multiple of the {accelerator.num_processes} processes "
                "that share it"
            )
        yield accelerator
    finally:
        for state, earlier in zip(shared, before, strict=True):
            state.clear()
            state.update(earlier)


def rows_of_process(batch: Any, accelerator: Accelerator) -> Any:
    """This process's rows of a nest of tensors: every n-th, so that all processes get as many."""
    if accelerator.num_processes == 1:
        return batch
    first, stride = accelerator.process_index, accelerator.num_processes
    return recursively_apply(lambda tensor: tensor[first::stride], batch)


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Runs ``function`` on the first process; every process returns its result, or raises where it raised."""
    if accelerator.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"the first process failed: {outcome[1]}")
    result: Result = outcome[0]
    return result


def first_of_any_process(accelerator: Accelerator, value: Result | None) -> Result | None:
    """The first value that is not None, by process number; the same on every process."""
    values = [value] if accelerator.num_processes == 1 else gather_object([value])
    return next((each for each in values if each is not None), None)


def summed(accelerator: Accelerator, values: Tensor) -> list[float]:
    """``values`` added up over the processes."""
    total: list[float] = accelerator.reduce(values, reduction="sum").tolist()
    return total
