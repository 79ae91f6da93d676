"""A worker process: reads jobs as lines of JSON, answers with lines of JSON, and ends when nobody listens.

Lines in: ``{"job": name, "arguments": {...}}``. Lines out: ``{"done": n}`` while it works, then ``{"result": {...}}``
or ``{"error": kind, "message": ..., "trace": ...}``. Whatever else is printed goes to stderr, the worker's log.
"""

import json
import os
import sys
import time
import traceback
from typing import IO, Any

from subquad.layers.registry import load

JOBS = {
    "calibrate": "subquad.bench.comparison.trainings:calibrate",
    "train_text": "subquad.bench.comparison.trainings:train_text",
    "train_recall": "subquad.bench.comparison.trainings:train_recall",
    "speed": "subquad.bench.comparison.costs:speed",
    "memory": "subquad.bench.comparison.costs:memory",
}
REPORT_EVERY = 0.25  # seconds


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Does one job after another until ``requests`` ends."""

    def answer(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    last = 0.0

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            answer({"done": done})  # raises where the other side is gone: the job ends with it

    load(JOBS["speed"])  # what every job needs
    answer({"result": {"ready": True}})
    for line in requests:
        request = json.loads(line)
        try:
            result = load(JOBS[request["job"]])(report, **request["arguments"])
        except BrokenPipeError:
            raise
        except Exception as error:  # whatever it is, the other side tells
            answer({"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()})
        else:
            answer({"result": result})


def main() -> None:
    """Takes over the process's standard input and output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
