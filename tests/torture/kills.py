"""Kills training runs with SIGKILL and checks that the resumed runs end like the uninterrupted one, bit for bit.

    python -m tests.torture.kills --kills 30 --inside 10

A kill inside a checkpoint write is made certain, not hoped for: the run's ``os.fsync`` or ``os.replace`` announces on
a pipe that it was reached and waits there for the kill; some of these also cut the file that is being flushed in two,
as a crash of the whole machine could. A kill counts as inside a write if the half-written folder is then found on the
disk. The other kills come some milliseconds after the run asked for a random batch, wherever it is by then. Some runs
are killed again while they resume.

Every run is a fork of this process, which has imported everything and computed nothing, so that a run costs no import.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch._dynamo  # the first optimizer step would, in every fork
from rich.console import Console
from torch import nn

from subquad.training import Batch, TrainingOptions, train

STEPS, SAVE_EVERY, ACCUMULATE = 40, 4, 2
FILES = ("metrics.jsonl", "metrics.csv", f"checkpoints/step-{STEPS:08d}/model.safetensors")


class Model(nn.Module):
    """Two layers, dropout, tied embeddings; 30 kB of weights, so that a write takes several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(torch.tanh(self.hidden(self.embedding(input_ids))))))


class Data:
    """Tokens that count upwards from random starts. ``asked`` hears the number of every batch."""

    def __init__(self, asked: Callable[[int], object]) -> None:
        self.asked = asked

    def batch(self, index: int) -> Batch:
        self.asked(index)
        start = torch.randint(50, (4, 1), generator=torch.Generator().manual_seed(index))
        tokens = (start + torch.arange(17)) % 50
        return Batch(tokens[:, :-1], tokens[:, 1:])


def run(out: Path, asked: Callable[[int], object] = lambda index: None) -> None:
    """The run that is killed and resumed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = TrainingOptions(
        steps=STEPS,
        batch_size=4,
        learning_rate=0.01,
        warmup_steps=5,
        accumulate=ACCUMULATE,
        save_every=SAVE_EVERY,
        eval_every=10,
        tensorboard=False,
    )
    evaluation = {"evaluate": lambda model: {"weight": float(model.hidden.weight.sum())}}
    train(Model(), Data(asked), options, out=out, resume=True, console=Console(quiet=True), **evaluation)


class Operation(NamedTuple):
    """The n-th flush or rename of a run, and whether a checkpoint was being written then."""

    number: int
    name: str
    inside: bool


def watch(out: Path, reached: Callable[[Operation, str], None]) -> None:
    """Calls ``reached(operation, "before" or "after")`` around every flush and rename of this process."""
    count = 0

    def watched(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal count
            count += 1
            operation = Operation(count, name, any(out.glob("checkpoints/.writing-*")))
            reached(operation, "before")
            original(*arguments)
            reached(operation, "after")

        return call

    os.fsync, os.replace = watched("fsync", os.fsync), watched("replace", os.replace)


class Child:
    """A fork that runs ``work(send)``; what it sends arrives in ``receive``."""

    def __init__(self, work: Callable[[Callable[[bytes], object]], None], log: Path) -> None:
        self.reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                work(lambda message: os.write(writing, message))
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)

    def receive(self) -> bytes:
        """What was sent, up to a newline; empty if the child ended first."""
        message = b""
        while not message.endswith(b"\n") and (more := os.read(self.reading, 1)):
            message += more
        return message

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status, or minus the signal that ended it."""
        os.close(self.reading)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def cut_newest_file(folder: Path) -> None:
    """Leaves the first half of the file that was written last."""
    newest = max(folder.glob("checkpoints/.writing-*/*"), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(newest, newest.stat().st_size // 2)


def run_to_the_end(out: Path, log: Path) -> tuple[list[Operation], float]:
    """The run without a kill: its flushes and renames, and its seconds."""

    def work(send: Callable[[bytes], object]) -> None:
        operations: list[Operation] = []
        watch(out, lambda operation, when: operations.append(operation) if when == "before" else None)
        started = time.monotonic()
        run(out)
        send(json.dumps([time.monotonic() - started, operations]).encode() + b"\n")

    child = Child(work, log)
    answer = child.receive()
    if child.wait() != 0:
        raise SystemExit(f"a run that nobody killed failed:\n{log.read_text()}")
    seconds, operations = json.loads(answer)
    return [Operation(*operation) for operation in operations], seconds


def kill_at(out: Path, log: Path, operation: Operation, when: str, cut: bool) -> bool:
    """Kills the run at one of its flushes or renames. True if it got there."""

    def work(send: Callable[[bytes], object]) -> None:
        def reached(here: Operation, moment: str) -> None:
            if here.number == operation.number and moment == when:
                if cut:
                    cut_newest_file(out)
                send(b"here\n")
                time.sleep(600)

        watch(out, reached)
        run(out)

    child = Child(work, log)
    if child.receive():
        child.kill()
    return child.wait() == -signal.SIGKILL


def kill_after(out: Path, log: Path, batch: int, seconds: float) -> bool:
    """Kills the run some time after it asked for a batch. True if it got there and was still running."""
    child = Child(lambda send: run(out, lambda index: send(b"here\n") if index == batch else None), log)
    if child.receive():
        time.sleep(seconds)
        child.kill()
    return child.wait() == -signal.SIGKILL


def differences(one: Path, other: Path) -> list[str]:
    """The files of two finished runs that are not the same, byte for byte (the optimizer's state: value for value)."""
    differing = [name for name in FILES if (one / name).read_bytes() != (other / name).read_bytes()]
    state = f"checkpoints/step-{STEPS:08d}/state.pt"
    states = [torch.load(folder / state, weights_only=True) for folder in (one, other)]
    return differing if same(*states) else [*differing, state]


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def torture(kills: int, inside: int, seed: int, folder: Path) -> bool:
    """Makes ``kills`` kills, ``inside`` of them in a checkpoint write, and prints each; True if all resumed exactly."""
    choose = random.Random(seed)
    whole, log = folder / "uninterrupted", folder / "log.txt"
    operations, seconds = run_to_the_end(whole, log)
    moments = [(operation, when) for operation in operations for when in ("before", "after") if operation.inside]
    # after the rename the checkpoint is whole
    planned = choose.sample([m for m in moments if (m[0].name, m[1]) != ("replace", "after")], inside)
    done = done_inside = number = 0
    exact = True
    print(f"the uninterrupted run: {STEPS} steps, {len(operations)} flushes and renames, {seconds:.2f} s", flush=True)
    while done < kills:
        number += 1
        if number > 10 * kills:
            raise SystemExit(f"only {done} of {number} runs could be killed")
        out = folder / f"run-{number}"
        for attempt in range(1 if done == kills - 1 else choose.randint(1, 2)):
            if planned and (attempt == 0 or kills - done <= len(planned)):
                operation, when = planned[-1]
                cut = when == "before" and operation.name == "fsync" and choose.random() < 0.8
                where = f"{when} {operation.name} {operation.number}" + (", file cut in two" if cut else "")
                killed = kill_at(out, log, operation, when, cut)
                planned = planned[:-1] if killed else planned
            else:
                batch, pause = choose.randrange(STEPS * ACCUMULATE), choose.uniform(0, 2 * seconds / STEPS)
                killed = kill_after(out, log, batch, pause)
                where = f"{1000 * pause:.1f} ms after batch {batch}"
            if killed:
                was_inside = any(out.glob("checkpoints/.writing-*"))
                done, done_inside = done + 1, done_inside + was_inside
                print(f"run {number}: kill {done} {where}{', inside a write' if was_inside else ''}", flush=True)
        run_to_the_end(out, log)
        differing = differences(whole, out)
        exact = exact and not differing
        print(f"run {number}: resumed, {'DIFFERS in ' + ', '.join(differing) if differing else 'the same'}", flush=True)
    print(
        f"{done} kills, {done_inside} inside a checkpoint write: {'all resumed bit for bit' if exact else 'NOT EXACT'}"
    )
    return exact and done_inside >= inside


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--inside", type=int, default=10, help="so many of them inside a checkpoint write")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(0 if torture(chosen.kills, chosen.inside, chosen.seed, Path(scratch)) else 1)
