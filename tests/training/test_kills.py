"""Three real kills, one of them inside a checkpoint write (``python -m tests.torture.kills`` makes thirty)."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_killed_runs_resume_to_the_same_bits():
    command = [sys.executable, "-m", "tests.torture.kills", "--kills", "3", "--inside", "1", "--seed", "1"]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("3 kills, ")
    assert last.endswith("inside a checkpoint write: all resumed bit for bit")
    assert int(last.split()[2]) >= 1
