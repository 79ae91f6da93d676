"""A whole comparison at a size of seconds: interrupted, continued, and equal to what it should have been."""

import csv
import json
import threading

import numpy as np
import pytest
import torch
from rich.console import Console

from subquad import bench, tasks
from subquad.bench import CompareSettings, RecallSettings
from subquad.bench.comparison import stages
from subquad.bench.comparison.candidates import matched_models
from subquad.bench.comparison.folder import Kept
from subquad.bench.comparison.pool import Job, Pool, Worker, WorkerError
from subquad.bench.comparison.trainings import save_text, train_text

CONTEXT = 16
SETTINGS = CompareSettings(
    mixers=("softmax", "gla"),
    context=CONTEXT,
    tokens=12 * 4 * CONTEXT,
    batch_size=4,
    parameters=12_000,
    hidden_size=16,
    layers=2,
    heads=2,
    learning_rates=(1e-3, 3e-3),
    sweep_fraction=0.5,
    contexts=(16, 32),
    decode_tokens=2,
    recall=RecallSettings(steps=4, batch_size=4, learning_rates=(3e-3,), hidden_size=16),
    workers=1,
)


def text(seed=0):
    letters = np.random.default_rng(seed).choice(list(b"abcde \n"), 6000).astype(np.uint8).tobytes()
    return tasks.TextData.from_splits(
        {"train": letters, "valid": letters[:400], "test": letters[::-1][:400]}, "letters"
    )


class StopAfterTraining(Kept):
    """Ctrl-C just after the first training is done."""

    def put(self, name, value):
        super().put(name, value)
        if name.startswith("train-"):
            raise KeyboardInterrupt


class OneWorker(Pool):
    """Does in one process what the comparison wants in several, to spare their starts."""

    def map(self, jobs, done, **how):
        return super().map(jobs, done, **{**how, "fresh": False})


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Interrupted between its trainings, then continued."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBQUAD_BACKEND", "chunked")
        patch.setattr(stages, "Pool", OneWorker)
        out = tmp_path_factory.mktemp("comparison") / "out"
        with patch.context() as stop:
            stop.setattr(stages, "Kept", StopAfterTraining)
            with pytest.raises(KeyboardInterrupt):
                bench.run_comparison(text(), SETTINGS, out=out, progress=False)
        assert not (out / "results.json").exists()
        assert len(list((out / "work" / "jobs").glob("train-*"))) == 1
        yield bench.run_comparison(text(), SETTINGS, out=out, progress=False)


def alone(tmp_path, name, seed, steps, rate, **changes):
    """The same training in this process, with nothing beside it."""
    data = text()
    save_text(data, tmp_path / "text")
    fields = dict(matched_models(SETTINGS, 256)[name][0])
    arguments = {
        "text": {"folder": str(tmp_path / "text"), "vocab_size": 256, "num_bytes": data.num_bytes},
        "fields": fields,
        "context": CONTEXT,
        "steps": steps,
        "batch_size": 4,
        "learning_rate": rate,
        "weight_decay": SETTINGS.weight_decay,
        "seed": seed,
        "threads": 1,
        "folder": None,
        "save_every": None,
        "final": True,
    }
    return train_text(changes.pop("report", lambda done: None), **{**arguments, **changes})


@pytest.fixture
def plain_torch(monkeypatch):
    monkeypatch.setenv("SUBQUAD_BACKEND", "chunked")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("plain_torch")
def test_a_continued_comparison_equals_trainings_that_nothing_interrupted(comparison, tmp_path):
    for candidate in comparison.candidates:
        assert [run["seed"] for run in candidate.raw["runs"]] == [0, 1]
        for run in candidate.raw["runs"]:
            expected = alone(tmp_path, candidate.name, run["seed"], comparison.steps, candidate.learning_rate)
            for figure in ("test_bits", "valid_bits", "curve", "positions"):
                assert run[figure] == expected[figure]


@pytest.mark.usefixtures("plain_torch")
def test_a_training_interrupted_in_its_middle_goes_on_to_the_same_figures(tmp_path):
    def interrupt(done):
        if done == 7:
            raise KeyboardInterrupt

    whole = alone(tmp_path, "gla", 0, 12, 3e-3)
    kept = {"folder": str(tmp_path / "run"), "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path, "gla", 0, 12, 3e-3, report=interrupt, **kept)
    assert (tmp_path / "run" / "checkpoints").is_dir()
    asked = []
    resumed = alone(tmp_path, "gla", 0, 12, 3e-3, report=asked.append, **kept)
    assert asked[0] == 6  # from the checkpoint after six steps
    for figure in ("test_bits", "valid_bits", "curve", "positions", "training_curve"):
        assert resumed[figure] == whole[figure]


def test_everything_that_was_asked_for_was_measured(comparison):
    assert comparison.steps == 12
    assert comparison.tokens == 12 * 4 * CONTEXT
    assert comparison.sweep_steps == 6
    for candidate in comparison.candidates:
        assert abs(candidate.parameters / 12_000 - 1) <= 0.02
        assert [each["learning_rate"] for each in candidate.raw["sweep"]] == [1e-3, 3e-3]
        best = min(candidate.raw["sweep"], key=lambda each: each["valid_bits"])
        assert candidate.learning_rate == best["learning_rate"]
        assert candidate.loss.count == 2
        assert candidate.loss.high < 8.0
        assert list(candidate.extrapolation) == [1, 2, 4]
        assert [figures.length for figures in candidate.contexts] == [16, 32]
        assert candidate.recall.count == 2
        assert candidate.training_tokens_per_second.low > 0
    softmax, gla = (candidate.contexts for candidate in comparison.candidates)
    assert softmax[1].state_bytes == 2 * softmax[0].state_bytes
    assert gla[1].state_bytes == gla[0].state_bytes


def test_the_files_hold_the_figures(comparison):
    folder = comparison.folder
    stored = json.loads((folder / "results.json").read_text())
    assert CompareSettings.from_dict(stored["settings"]) == SETTINGS
    assert stored["plan"]["steps"] == 12
    assert {"processor", "cores", "blas"} <= stored["machine"].keys()
    assert stored["versions"]["torch"]
    assert [each["name"] for each in stored["candidates"]] == ["softmax", "gla"]
    assert stored["candidates"][1]["runs"] == comparison.candidate("gla").raw["runs"]
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixer"] for row in rows] == [candidate.name for candidate in comparison.by_loss()]
    assert float(rows[0]["bits_per_byte"]) == comparison.by_loss()[0].loss.mean
    assert comparison.report.stat().st_size > 50_000
    plots = {path.stem for path in (folder / "plots").iterdir()}
    assert plots >= {"loss-by-tokens", "loss-by-seconds", "prefill-speed", "decode-cost", "recall", "loss-by-position"}


def test_a_finished_comparison_is_read_not_repeated(comparison, monkeypatch):
    monkeypatch.setattr("subquad.bench.comparison.pool.Worker", None)  # no worker can start
    again = bench.run_comparison(text(), SETTINGS, out=comparison.folder, progress=False)
    assert [candidate.raw for candidate in again.candidates] == [candidate.raw for candidate in comparison.candidates]
    assert [str(each) for each in again.verdict] == [str(each) for each in comparison.verdict]


def test_other_settings_do_not_continue_it(comparison):
    changed = CompareSettings.from_dict({**SETTINGS.to_dict(), "batch_size": 5, "seeds": [0, 2]})
    with pytest.raises(ValueError, match=r"seeds is \[0, 2\] and was \[0, 1\]; batch_size is 5 and was 4"):
        bench.run_comparison(text(), changed, out=comparison.folder, progress=False)
    with pytest.raises(ValueError, match=r"text.sha256 is '"):
        bench.run_comparison(text(seed=1), SETTINGS, out=comparison.folder, progress=False)
    with pytest.raises(ValueError, match="already holds a comparison: pass resume=True"):
        bench.run_comparison(text(), SETTINGS, out=comparison.folder, resume=False, progress=False)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a comparison"):
        bench.run_comparison(text(), SETTINGS, out=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_paths_are_read_as_text_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        bench.compare([tmp_path / "missing.txt"], ["gla"], out=tmp_path / "out", progress=False)


@pytest.mark.usefixtures("plain_torch")
def test_a_loss_that_is_no_number_is_a_diverged_training(tmp_path):
    diverged = alone(tmp_path, "softmax", 0, 12, 1e30, final=False)
    assert "step" in diverged["diverged"]
    assert diverged["valid_bits"] is None


FIELDS = {"mixers": "gla", "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_worker_that_fails_says_why_and_one_that_dies_is_noticed(tmp_path):
    worker = Worker(tmp_path / "worker.log", threads=1)
    bad = Job("bad", "memory", {"fields": FIELDS, "contexts": [32, 16], "threads": 1})
    with pytest.raises(ValueError, match=r"bad: lengths must ascend; got \[32, 16\]"):
        worker.run(bad, lambda *_: None)
    good = Job("good", "memory", {"fields": FIELDS, "contexts": [16], "threads": 1})
    assert len(worker.run(good, lambda *_: None)["bytes"]) == 1  # it goes on after a failure
    endless = {"fields": FIELDS, "contexts": [16], "decode_tokens": 10**9, "threads": 1, "seconds": 1}
    threading.Timer(0.3, worker.process.kill).start()
    with pytest.raises(WorkerError, match="the process of endless was ended by signal 9"):
        worker.run(Job("endless", "speed", endless), lambda *_: None)
    worker.close()
    assert "lengths must ascend" in (tmp_path / "worker.log").read_text()


def test_a_fresh_process_does_one_job_and_is_gone(tmp_path):
    job = Job("memory", "memory", {"fields": FIELDS, "contexts": [16], "threads": 1})
    finished = []
    with Pool(2, 1, tmp_path) as pool:
        (result,) = pool.map([job], lambda *_: None, finished=lambda *done: finished.append(done), fresh=True)
        assert pool.workers == []
    assert finished == [(job, result)]


def test_progress_tells_stages_and_the_time_left(comparison, capsys):
    console = Console(stderr=True, width=100)
    bench.run_comparison(text(), SETTINGS, out=comparison.folder, progress=console)
    shown = capsys.readouterr().err
    for stage in ("timing steps", "peak memory", "recall test", "choosing learning rates", "training", "report"):
        assert stage in shown


def test_a_budget_too_small_is_told_and_leaves_the_folder_free(tmp_path, monkeypatch):
    timed = {"text_step": 1.0, "text_other": 0.0, "recall_step": 0.1, "recall_other": 0.0}
    monkeypatch.setattr(stages.Run, "do", lambda self, jobs, **how: [timed for _ in jobs])
    poor = CompareSettings.from_dict({**SETTINGS.to_dict(), "budget": 20.0})
    with pytest.raises(ValueError, match=r"a budget of 20 s leaves .* to train 2 mixers on 2 seeds .* 8 are the least"):
        bench.run_comparison(text(), poor, out=tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())
