"""Two processes share every batch and end where one process ends."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from subquad.training import read_metrics

SCRIPT = Path(__file__).with_name("two_processes.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes worked, started with the variables that torchrun sets."""
    folder, world_size = tmp_path_factory.mktemp("two"), 2
    port, processes = str(free_port()), []
    for rank in range(world_size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        place |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(SCRIPT), str(folder)]
        environment = os.environ | place | quiet
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    return folder


def test_two_processes_end_where_one_does(two, tmp_path):
    """float64: only the order of summation differs, 1e-16 relative, amplified by AdamW as in the loop's test."""
    specification = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    alone, _ = script.run(tmp_path / "run")
    expected = alone.state_dict()
    for rank in (0, 1):
        weights = torch.load(two / f"weights-{rank}.pt")
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9)
    records = [read_metrics(folder / "run") for folder in (tmp_path, two)]
    assert [r["step"] for r in records[1]] == list(range(1, 10))
    for single, shared in zip(*records, strict=True):
        assert single == pytest.approx(shared, rel=1e-6)


def test_both_processes_hold_the_same_weights_and_report_the_same(two):
    first, second = (json.loads((two / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["step"] == 9
    assert first["tokens"] == 9 * 2 * 4 * 6
    assert first["last"]["evaluation/rank"] == 0
    weights = [torch.load(two / f"weights-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_nan_on_one_process_is_named_on_all(two):
    for rank in (0, 1):
        assert json.loads((two / f"result-{rank}.json").read_text())["failure"] == [3, 5, "logarithm"]


def test_a_launch_that_does_not_come_together(monkeypatch, tiny_model, counted_data, options, quiet_train):
    """Two processes that do not see each other would otherwise write over each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda self, *_: (None, "NO"))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but 1 process"):
        quiet_train(tiny_model(), counted_data(), options())
