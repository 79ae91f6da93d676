"""The record of a run: one line per step, no duplicates and no holes after a resume, a table that keeps up with it."""

import csv
import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from subquad.training import read_metrics
from subquad.training.metrics import MetricsLog


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_both_files_hold_the_same_records(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 0.1})
    log.write(2, {"loss": 1 / 3, 'eval,"x"': 2.5})
    log.write(3, {"loss": math.inf, "other": 7})
    assert read_metrics(tmp_path) == log.history
    table = rows(tmp_path)
    assert list(table[0]) == ["step", "loss", 'eval,"x"', "other"]
    assert [row["step"] for row in table] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in table] == [0.1, 1 / 3, math.inf]
    assert table[1]['eval,"x"'] == "2.5"
    assert table[0]["other"] == ""


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 5}', "\n", "[5]\n"])
def test_a_resumed_log_has_no_duplicates_and_no_holes(torn, tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 5):
        log.write(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    log = MetricsLog(tmp_path, resumed_step=3)
    log.write(4, {"loss": 40})
    log.write(5, {"loss": 50})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert [row["loss"] for row in rows(tmp_path)] == ["1", "2", "3", "40", "50"]
    assert log.history == read_metrics(tmp_path)


def test_beginning_anew_forgets_what_a_killed_run_left(tmp_path):
    MetricsLog(tmp_path).write(1, {"old": 1})
    log = MetricsLog(tmp_path, resumed_step=0)
    log.write(1, {"new": 2})
    assert read_metrics(tmp_path) == [{"step": 1, "new": 2}]
    assert (tmp_path / "metrics.csv").read_text() == "step,new\n1,2\n"


def test_missing_records_are_reported(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (5, 10):
        log.write(step, {"loss": 0.0})
    with pytest.warns(UserWarning, match=r"ends at step 10, but the run resumes after step 20"):
        MetricsLog(tmp_path, resumed_step=20)


def test_records_are_json_of_python_numbers(tmp_path, tiny_model, counted_data, options, quiet_train):
    result = quiet_train(tiny_model(), counted_data(), options(steps=4), out=tmp_path, evaluate=lambda model: {"x": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert list(result.history[0]) == ["step", "loss", "learning_rate", "gradient_norm", "tokens"]
    assert result.history[-1]["evaluation/x"] == 1
    assert [record["tokens"] for record in result.history] == [24, 48, 72, 96]


def test_tensorboard_shows_each_step_once(tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = {"schedule": "constant", "tensorboard": True}
    quiet_train(tiny_model(), counted_data(), options(steps=4, **chosen), out=tmp_path)
    quiet_train(tiny_model(), counted_data(), options(steps=6, **chosen), out=tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "learning_rate", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in read_metrics(tmp_path)]
    )
