"""The stages of a comparison, each reading what earlier ones found: costs, learning rates, trainings, the report."""

import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from subquad import tasks
from subquad.bench.comparison.candidates import recall_model
from subquad.bench.comparison.folder import WORK, Kept, text_identity
from subquad.bench.comparison.pool import Job, Pool
from subquad.bench.comparison.progress import Display
from subquad.bench.comparison.results import CandidateResult, Comparison
from subquad.bench.comparison.schedule import (
    FEWEST_STEPS,
    MARGIN,
    MEMORY_SHARE,
    MOST_FOR_MEMORY,
    OVERRUN,
    RECALL_SHARE,
    REPORT_SECONDS,
    SPEED_SECONDS_WITHOUT_BUDGET,
    SPEED_SHARE,
    StepTime,
    makespan,
    refuse_too_few,
    steps_within,
)
from subquad.bench.comparison.settings import CompareSettings, RecallSettings
from subquad.bench.comparison.trainings import save_text
from subquad.bench.comparison.verdict import verdict_of
from subquad.bench.machine import available_cores, describe_machine, describe_versions
from subquad.evaluation.report import length_text, listed

SAVE_EVERY_SECONDS = 20.0


class Run:
    """One call of a comparison.

    Args:
        text, settings: what is compared.
        models: name -> fields and parameters, see :func:`matched_models`.
        folder: opened by :func:`subquad.bench.comparison.folder.open_folder`.
        console: for progress.
    """

    def __init__(
        self,
        text: tasks.TextData,
        settings: CompareSettings,
        models: dict[str, tuple[dict[str, Any], int]],
        folder: Path,
        console: Console,
    ) -> None:
        self.text, self.settings, self.models, self.folder = text, settings, models, folder
        self.work = folder / WORK
        self.kept = Kept(self.work / "jobs")
        self.cores = available_cores()
        most = 1 if torch.cuda.is_available() else max(1, self.cores // settings.threads)
        self.workers = settings.workers or min(most, len(settings.candidates) * len(settings.seeds))
        self.display = Display(console, self.kept.get("elapsed", 0.0), settings.budget)
        self.stored_text = {
            "folder": str((self.work / "text").resolve()),
            "vocab_size": text.vocab_size,
            "num_bytes": dict(text.num_bytes),
        }
        self.notes: list[str] = []
        self.left = 0.0  # of a budget, once steps have been timed

    def run(self) -> Comparison:
        try:
            return self.stages()
        finally:
            if self.work.exists():
                self.kept.put("elapsed", self.display.elapsed())

    def stages(self) -> Comparison:
        if not (self.work / "text" / "test.npy").exists():
            save_text(self.text, self.work / "text")
        with self.display, Pool(self.workers, self.settings.threads, self.work / "logs") as self.pool:
            times, recall_times = self.prepare()
            speeds = self.speed()
            memories = self.memory(speeds)
            recall_steps, recalls = self.recall(recall_times)
            sweep_steps, sweeps, times = self.sweep(times)
            steps, runs = self.train(times, sweeps)
            self.display.begin("report", 1.0)
            candidates = []
            for name, (fields, parameters) in self.models.items():
                raw = {
                    "learning_rate": _best_rate(sweeps[name], "valid_bits", min),
                    "sweep": sweeps[name],
                    "runs": runs[name],
                    "recall_learning_rate": _best_rate(recalls[name], "valid_accuracy", max),
                    "recall": recalls[name],
                    "speed": speeds[name],
                    "memory": memories[name],
                }
                sizes = (self.settings.context, self.settings.batch_size)
                candidates.append(CandidateResult(name, fields, parameters, raw, *sizes))
            result = Comparison(
                settings=self.settings,
                data=self.describe_text(),
                steps=steps,
                sweep_steps=sweep_steps,
                recall_steps=recall_steps,
                workers=self.workers,
                machine=describe_machine(),
                versions=describe_versions(),
                seconds=self.display.elapsed(),
                candidates=candidates,
                notes=self.notes,
                folder=self.folder,
            )
            result = result.with_verdict(verdict_of(result))
            self.write(result)
        return result

    def prepare(self) -> tuple[dict[str, StepTime], dict[str, StepTime]]:
        """Compiles kernels and times a few steps of every candidate."""
        settings = self.settings
        jobs = []
        for name, (fields, _) in self.models.items():
            training_job = self.training_arguments(fields, settings.learning_rates[0], settings.seeds[0], final=True)
            recall_job = self.recall_arguments(name, settings.recall, settings.seeds[0])
            arguments = {"training_job": training_job, "recall_job": recall_job}
            jobs.append(Job(self.job_name("prepare", name), "calibrate", arguments, 1 if recall_job is None else 2))
        self.display.begin("prepare", sum(job.work for job in jobs), f"{len(jobs)} models, {self.workers} at once")
        found = dict(zip(self.models, self.do(jobs)))
        times = {name: StepTime(each["text_step"], each["text_other"]) for name, each in found.items()}
        recall = {
            name: StepTime(each["recall_step"], each["recall_other"])
            for name, each in found.items()
            if "recall_step" in each
        }
        self.expect(times)
        budget = settings.budget
        if budget is not None:
            self.left = self.kept.once("left", lambda: budget - self.display.elapsed() - REPORT_SECONDS)
            share = 1 - SPEED_SHARE - MEMORY_SHARE - (RECALL_SHARE if settings.recall is not None else 0.0)
            seconds = MARGIN * share * self.left
            try:
                refuse_too_few(self.steps_with_sweep(seconds, times), settings, seconds)
            except ValueError:
                shutil.rmtree(self.work)  # nothing is trained yet: the folder is free for another budget
                raise
        return times, recall

    def speed(self) -> dict[str, dict[str, Any]]:
        """Reading and writing at each context: one candidate at a time, nothing beside it."""
        settings = self.settings
        seconds = SPEED_SECONDS_WITHOUT_BUDGET
        if settings.budget is not None:
            seconds = self.left * SPEED_SHARE / len(self.models)
        arguments = {
            "contexts": list(settings.contexts),
            "decode_tokens": settings.decode_tokens,
            "threads": self.cores,
            "seconds": seconds,
        }
        jobs = [
            Job(self.job_name("speed", name), "speed", {**arguments, "fields": fields}, len(settings.contexts))
            for name, (fields, _) in self.models.items()
        ]
        self.display.begin("speed", sum(job.work for job in jobs), "one at a time")
        found = dict(zip(self.models, self.do(jobs, at_once=1)))
        for name, speed in found.items():
            if speed["left_out"]:
                lengths = listed(map(length_text, speed["left_out"]))
                self.notes.append(f"{name} was not measured at {lengths} tokens: it would have taken too long.")
        return found

    def memory(self, speeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Peak memory: a process of its own for each candidate."""
        if self.settings.budget is not None:
            starts = makespan(
                [self.kept.once("start_seconds", lambda: self.pool.start_seconds)] * len(self.models), self.workers
            )
            if starts > MOST_FOR_MEMORY * self.left:
                self.notes.append(
                    "Peak memory was not measured: starting a process for each mixer would take too long."
                )
                return {name: {"bytes": None, "reason": "time", "contexts": []} for name in self.models}
        jobs = []
        for name, (fields, _) in self.models.items():
            contexts = [cost["length"] for cost in speeds[name]["costs"]]
            arguments = {"fields": fields, "contexts": contexts, "threads": 1}
            jobs.append(Job(self.job_name("memory", name), "memory", arguments, len(contexts)))
        self.display.begin("memory", sum(job.work for job in jobs), "one process each")
        found = dict(zip(self.models, self.do(jobs, fresh=True)))
        if any(each["bytes"] is None for each in found.values()):
            self.notes.append("Peak memory was not measured: this system does not tell it.")
        return {name: {**each, "contexts": job.arguments["contexts"]} for (name, each), job in zip(found.items(), jobs)}

    def recall(self, times: dict[str, StepTime]) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        """The recall test: every rate on the first seed, the better one on the others."""
        recall, seeds = self.settings.recall, self.settings.seeds
        if recall is None:
            return 0, {name: [] for name in self.models}
        steps = self.kept.once("recall_steps", lambda: self.recall_steps(recall, times))
        first = self.recall_runs(
            [(name, rate, seeds[0]) for rate in recall.learning_rates for name in self.models], steps
        )
        best = {name: _best_rate(runs, "valid_accuracy", max) for name, runs in first.items()}
        others = self.recall_runs(
            [(name, best[name] or recall.learning_rates[0], seed) for seed in seeds[1:] for name in self.models], steps
        )
        return steps, {name: first[name] + others.get(name, []) for name in self.models}

    def recall_steps(self, recall: RecallSettings, times: dict[str, StepTime]) -> int:
        if self.settings.budget is None:
            return recall.steps
        number = len(recall.learning_rates) + len(self.settings.seeds) - 1
        jobs = [times[name] for _ in range(number) for name in self.models]
        return max(4, steps_within(RECALL_SHARE * self.left, jobs, [1.0] * len(jobs), self.workers, recall.steps))

    def recall_runs(self, runs: list[tuple[str, float, int]], steps: int) -> dict[str, list[dict[str, Any]]]:
        jobs = []
        for name, rate, seed in runs:
            arguments = self.recall_arguments(name, self.settings.recall, seed) or {}
            arguments |= {"steps": steps, "learning_rate": rate}
            jobs.append(Job(self.job_name("recall", name, rate, seed), "train_recall", arguments, steps))
        if jobs:
            self.display.begin("recall", sum(job.work for job in jobs), f"{steps} steps each")
        found: dict[str, list[dict[str, Any]]] = {}
        for (name, rate, seed), result in zip(runs, self.do(jobs)):
            found.setdefault(name, []).append({"learning_rate": rate, "seed": seed, "steps": steps, **result})
        return found

    def sweep(self, times: dict[str, StepTime]) -> tuple[int, dict[str, list[dict[str, Any]]], dict[str, StepTime]]:
        """Every learning rate for every candidate, on the first seed, for a part of the steps."""
        settings = self.settings
        rates, seed = settings.learning_rates, settings.seeds[0]
        steps = self.kept.once("sweep_steps", lambda: self.sweep_steps(times))
        runs = [(name, rate) for rate in rates for name in self.models]
        jobs = []
        for name, rate in runs:
            arguments = self.training_arguments(self.models[name][0], rate, seed, final=False) | {"steps": steps}
            jobs.append(Job(self.job_name("sweep", name, rate), "train_text", arguments, steps))
        self.display.begin("sweep", sum(job.work for job in jobs), f"{len(jobs)} runs of {steps} steps")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.models}
        for (name, rate), result in zip(runs, self.do(jobs)):
            found[name].append({"learning_rate": rate, **result})
        measured = {}
        for name, results in found.items():
            known = [result["step_seconds"] for result in results if result["step_seconds"]]
            measured[name] = StepTime(statistics.median(known or [times[name].step]), times[name].other)
        self.expect(measured)
        return steps, found, measured

    def sweep_steps(self, times: dict[str, StepTime]) -> int:
        settings = self.settings
        steps = self.most_steps()
        if settings.budget is not None:
            left = settings.budget - self.display.elapsed() - REPORT_SECONDS
            steps = max(FEWEST_STEPS, self.steps_with_sweep(MARGIN * left, times))
        return max(4, round(settings.sweep_fraction * steps))

    def steps_with_sweep(self, seconds: float, times: dict[str, StepTime]) -> int:
        """Steps of the trainings, where these and the choice of learning rates before them take ``seconds``."""
        settings = self.settings
        tries = [times[name] for _ in settings.learning_rates for name in self.models]
        runs = [times[name] for _ in settings.seeds for name in self.models]
        shares = [settings.sweep_fraction] * len(tries) + [1.0] * len(runs)
        return steps_within(seconds, tries + runs, shares, self.workers, self.most_steps())

    def train(
        self, times: dict[str, StepTime], sweeps: dict[str, list[dict[str, Any]]]
    ) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        """Every candidate on every seed at its best rate, as many steps as the time left allows."""
        settings = self.settings
        rates = {name: _best_rate(results, "valid_bits", min) for name, results in sweeps.items()}
        going = [name for name, rate in rates.items() if rate is not None]
        self.notes += [
            f"{name} was not trained: it diverged at every learning rate tried."
            for name, rate in rates.items()
            if rate is None
        ]
        going.sort(key=lambda name: -times[name].step)
        runs = [(name, seed) for seed in settings.seeds for name in going]
        steps = self.kept.once("steps", lambda: self.final_steps([times[name] for name, _ in runs]))
        jobs = []
        for name, seed in runs:
            fields = self.models[name][0]
            arguments = self.training_arguments(fields, rates[name] or 0.0, seed, final=True)
            job_name = self.job_name("train", name, seed)
            arguments |= {
                "steps": steps,
                "folder": str((self.work / "runs" / job_name).resolve()),
                "save_every": max(1, min(steps, round(SAVE_EVERY_SECONDS / times[name].step))),
            }
            jobs.append(Job(job_name, "train_text", arguments, steps))
        self.display.begin("train", sum(job.work for job in jobs), f"{len(jobs)} runs of {steps} steps")
        gate = _SeedGate(self, jobs, runs, times, steps)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.models}
        for (name, seed), result in zip(runs, self.do(jobs, wanted=gate.wanted)):
            if result is not None:
                found[name].append({"seed": seed, **result})
        if gate.left_out:
            seeds = listed(map(str, sorted(gate.left_out)))
            self.notes.append(f"Seed {seeds} was not trained: the machine became slower and the budget was used up.")
        return steps, found

    def final_steps(self, jobs: list[StepTime]) -> int:
        if self.settings.budget is None:
            return self.most_steps()
        left = self.settings.budget - self.display.elapsed() - REPORT_SECONDS
        return max(FEWEST_STEPS, steps_within(MARGIN * left, jobs, [1.0] * len(jobs), self.workers, self.most_steps()))

    def most_steps(self) -> int:
        tokens = self.settings.tokens
        return 10**7 if tokens is None else tokens // self.settings.tokens_per_step

    def write(self, result: Comparison) -> None:
        from subquad.bench.report.page import write_report  # matplotlib loads here

        result.write_tables()
        write_report(result)

    def do(
        self, jobs: list[Job], *, wanted: Callable[[Job], bool] = lambda job: True, **how: Any
    ) -> list[dict[str, Any]]:
        """The results of the jobs: those that are kept already, and the others once they are done."""
        missing = [job for job in jobs if self.kept.get(job.name) is None]
        for job in jobs:
            if job not in missing:
                self.display.advance(job.name, job.work)

        def finished(job: Job, result: dict[str, Any]) -> None:
            self.kept.put(job.name, result)
            self.kept.put("elapsed", self.display.elapsed())
            self.display.advance(job.name, job.work)

        self.pool.map(
            missing,
            lambda job, done: self.display.advance(job.name, done),
            finished=finished,
            wanted=wanted,
            **how,
        )
        return [self.kept.get(job.name) for job in jobs]

    def expect(self, times: dict[str, StepTime]) -> None:
        """Tells the display what the trainings will take, where no budget says it."""
        settings = self.settings
        expected = self.display.expected
        expected["report"] = REPORT_SECONDS
        if settings.budget is not None:
            return
        steps = self.most_steps()
        sweep = [times[name].seconds(round(settings.sweep_fraction * steps)) for name in self.models]
        train = [times[name].seconds(steps) for name in self.models]
        expected["sweep"] = makespan(sweep * len(settings.learning_rates), self.workers)
        expected["train"] = makespan(train * len(settings.seeds), self.workers)
        expected["speed"], expected["memory"] = 10.0 * len(self.models), 6.0 * len(self.models) / self.workers
        expected["recall"] = 30.0 * len(self.models) if settings.recall is not None else 0.0

    def training_arguments(self, fields: dict[str, Any], rate: float, seed: int, *, final: bool) -> dict[str, Any]:
        settings = self.settings
        return {
            "text": self.stored_text,
            "fields": fields,
            "context": settings.context,
            "batch_size": settings.batch_size,
            "learning_rate": rate,
            "weight_decay": settings.weight_decay,
            "seed": seed,
            "threads": settings.threads,
            "folder": None,
            "save_every": None,
            "final": final,
        }

    def recall_arguments(self, name: str, recall: RecallSettings | None, seed: int) -> dict[str, Any] | None:
        if recall is None:
            return None
        return {
            "fields": recall_model(name, recall),
            "recall": asdict(recall),
            "learning_rate": recall.learning_rates[0],
            "weight_decay": self.settings.weight_decay,
            "seed": seed,
            "threads": self.settings.threads,
        }

    def job_name(self, stage: str, name: str, *more: float) -> str:
        number = list(self.models).index(name)
        readable = re.sub(r"\W+", "-", name)
        return "-".join([stage, f"{number:02d}", readable, *(f"{value:g}" for value in more)])

    def describe_text(self) -> dict[str, Any]:
        text = self.text
        return {
            "source": text.source,
            "split_by": text.split_by,
            "vocab_size": text.vocab_size,
            "tokens": {split: len(text.tokens(split)) for split in ("train", "valid", "test")},
            "num_bytes": dict(text.num_bytes),
            "bigram_bits": text.bigram_bits("test") if text.vocab_size == 256 and text.train.itemsize == 1 else None,
            **text_identity(text),
        }


class _SeedGate:
    """Lets the trainings of a further seed begin only where all of them will end within the budget."""

    def __init__(
        self, run: Run, jobs: list[Job], runs: list[tuple[str, int]], times: dict[str, StepTime], steps: int
    ) -> None:
        self.run, self.times, self.steps = run, times, steps
        self.of_job = dict(zip([job.name for job in jobs], runs))
        self.allowed: dict[int, bool] = {runs[0][1]: True} if runs else {}
        self.left_out: set[int] = set()

    def wanted(self, job: Job) -> bool:
        _, seed = self.of_job[job.name]
        budget = self.run.settings.budget
        if budget is None:
            return True
        if seed not in self.allowed:
            rest = [self.times[other].seconds(self.steps) for other, s in self.of_job.values() if s == seed]
            ends = self.run.display.elapsed() + makespan(rest, self.run.workers) + REPORT_SECONDS
            self.allowed[seed] = ends <= OVERRUN * budget and not self.left_out
        if not self.allowed[seed]:
            self.left_out.add(seed)
        return self.allowed[seed]


def _best_rate(results: list[dict[str, Any]], figure: str, best: Callable[..., Any]) -> float | None:
    """The learning rate of the best of these runs; None where all diverged."""
    good = [result for result in results if result["diverged"] is None]
    if not good:
        return None
    rate: float = best(good, key=lambda result: result[figure])["learning_rate"]
    return rate
