"""Worker processes side by side, each with its own torch: jobs go in, results come back in the order of the jobs.

Workers are started as programs, not forked and not through ``multiprocessing``: a script that calls ``compare`` needs
no ``if __name__ == "__main__"``, and thread pools of the caller are not inherited.
"""

import builtins
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

Done = Callable[["Job", int], None]
GRACE = 20.0  # seconds for a training to finish its step and save, when the comparison is interrupted


class WorkerError(RuntimeError):
    """A worker process ended or failed in a way that is no answer."""


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: tells it apart from all others of the comparison; its result is kept under this name.
        kind: one of :data:`subquad.bench.comparison.worker.JOBS`.
        arguments: its arguments, as JSON holds them.
        work: how much there is to do, in the unit that the job reports.
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    work: int = 1


class Worker:
    """One process. ``log`` receives what it prints."""

    start_seconds: float | None  # from its start to its first answer; None before that

    def __init__(self, log: Path, threads: int) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        with open(log, "ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "subquad.bench.comparison.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the caller alone, who asks each worker to stop once
            )
        self.began, self.start_seconds, self.stopping = time.monotonic(), None, False

    def run(self, job: Job, done: Done) -> dict[str, Any]:
        """Does one job and waits for its result.

        Raises:
            ValueError, TypeError, OSError, ...: what the job raised.
            WorkerError: the process ended, or raised something of its own.
        """
        if self.start_seconds is None:
            self._answer(job, done)
            self.start_seconds = time.monotonic() - self.began
        request = {"job": job.kind, "arguments": job.arguments}
        try:
            self._pipe(self.process.stdin).write(json.dumps(request) + "\n")
            self._pipe(self.process.stdin).flush()
        except BrokenPipeError:
            self._ended(job)
        return self._answer(job, done)

    def close(self) -> None:
        """Lets the process end by itself, which an idle one does at once."""
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                self._pipe(pipe).close()
            except BrokenPipeError:
                continue
        self._wait_or_kill()

    def stop(self) -> None:
        """Asks the process to stop now; a training saves first."""
        if self.process.poll() is None and not self.stopping:
            self.stopping = True
            self.process.send_signal(signal.SIGTERM)

    def _wait_or_kill(self) -> None:
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self, job: Job, done: Done) -> dict[str, Any]:
        for line in self._pipe(self.process.stdout):
            message = json.loads(line)
            if "done" in message:
                done(job, message["done"])
            elif "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            else:
                self._raise(job, message)
        self._ended(job)
        raise AssertionError("a process that ended raises")

    def _raise(self, job: Job, message: dict[str, Any]) -> None:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{job.name}:\n{message['trace']}")
        kind = getattr(builtins, message["error"], None)
        sentence = f"{job.name}: {message['message']}"
        if isinstance(kind, type) and issubclass(kind, (ValueError, TypeError, OSError, ArithmeticError, ImportError)):
            raise kind(sentence)
        raise WorkerError(f"{sentence} ({message['error']}; the trace is in {self.log})")

    def _ended(self, job: Job) -> None:
        status = self.process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = ": the system may be out of memory" if status == -signal.SIGKILL else ""
        raise WorkerError(f"the process of {job.name} {how}{hint}; what it said is in {self.log}")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


class Pool:
    """``count`` workers that live from stage to stage, so that what they have compiled and loaded stays.

    Args:
        count: of processes.
        threads: of each.
        logs: folder of their logs.
    """

    def __init__(self, count: int, threads: int, logs: Path) -> None:
        self.count, self.threads, self.logs = count, threads, logs
        self.started = 0
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.stop()
        for worker in list(self.workers):
            worker.close()

    @property
    def start_seconds(self) -> float:
        """What starting a worker took; the longest of those alive."""
        with self.lock:
            return max((worker.start_seconds or 0.0 for worker in self.workers), default=0.0)

    def stop(self) -> None:
        """Asks every worker to stop now."""
        with self.lock:
            for worker in self.workers:
                worker.stop()

    def map(
        self,
        jobs: Sequence[Job],
        done: Done,
        *,
        finished: Callable[[Job, dict[str, Any]], None],
        wanted: Callable[[Job], bool] = lambda job: True,
        fresh: bool = False,
        at_once: int | None = None,
    ) -> list[dict[str, Any] | None]:
        """Runs the jobs, as many at once as there are workers (or ``at_once``), taken in their order.

        Args:
            jobs: what to do.
            done: called with a job and how much of its work is done, from several threads.
            finished: called once with each result, one call at a time.
            wanted: asked just before a job starts; where it says no the result is None.
            fresh: a new process for each job, ended after it.
        """
        writing = threading.Lock()

        def run(job: Job) -> dict[str, Any] | None:
            if not wanted(job):
                return None
            worker = self._start(job.kind) if fresh else self._take()
            try:
                result = worker.run(job, done)
            finally:
                if fresh:
                    self._end(worker)
                else:
                    self.free.put(worker)
            with writing:
                finished(job, result)
            return result

        with ThreadPoolExecutor(min(at_once or self.count, self.count)) as threads:
            futures = [threads.submit(run, job) for job in jobs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((f for f in futures if f.done() and not f.cancelled() and f.exception()), None)
                if failed is not None:
                    failed.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self.stop()
                raise
        return [future.result() for future in futures]

    def _take(self) -> Worker:
        with self.lock:
            try:
                return self.free.get_nowait()
            except queue.Empty:
                missing = len(self.workers) < self.count
        return self._start("worker") if missing else self.free.get()

    def _start(self, name: str) -> Worker:
        with self.lock:
            self.started += 1
            worker = Worker(self.logs / f"{name}-{self.started}.log", self.threads)
            self.workers.append(worker)
        return worker

    def _end(self, worker: Worker) -> None:
        worker.close()
        with self.lock:
            self.workers.remove(worker)
