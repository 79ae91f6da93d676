"""Kills a conversion with SIGKILL at random moments and checks that it ends with the weights of an uninterrupted one.

    python -m tests.torture.conversions --kills 10

Every run is a fork of this process, so that a run costs no import. A kill may come anywhere: in measuring, in a stage,
inside the write of a checkpoint, while the folder is saved or while it is verified.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer step would, in every fork
from rich.console import Console
from safetensors.torch import load_file

from subquad import convert, tasks
from tests.convert.cases import source

BYTES = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
SETTINGS = convert.ConvertSettings(
    context=48, batch_size=2, transfer_steps=20, adapt_steps=20, save_every=3, windows=4, contexts=(32,)
)


def begin(folder: Path, out: Path) -> int:
    """A child that converts ``folder``, or goes on with it."""
    child = os.fork()
    if child:
        return child
    try:
        text = tasks.source_text("tiny")
        convert.run(folder, "lolcats", text, out, options={"window": 5}, settings=SETTINGS, console=Console(quiet=True))
        os._exit(0)
    except BaseException as error:
        print(f"the conversion failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, whole, killed = (Path(place, name) for name in ("llama", "whole", "killed"))
        source("llama", **BYTES, initializer_range=0.05).save_pretrained(folder)
        tasks.byte_tokenizer().save_pretrained(folder)
        began = time.monotonic()
        if os.waitpid(begin(folder, whole), 0)[1]:
            raise SystemExit("the uninterrupted conversion failed")
        seconds, kills = time.monotonic() - began, 0
        while not killed.exists():
            child = begin(folder, killed)
            if kills < arguments.kills:
                time.sleep(draw.uniform(0.1, 0.5) * seconds)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
                print(f"kill {kills}: {sorted(path.name for path in Path(place).glob('killed*/*'))}", flush=True)
                if killed.exists() and not (killed / "conversion.html").exists():
                    raise SystemExit("a half-written folder stands in its place")
            elif status:
                raise SystemExit("a resumed conversion failed")
        first, second = (load_file(out / "model.safetensors") for out in (whole, killed))
        if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
            raise SystemExit(f"after {kills} kills the weights differ from those of the uninterrupted conversion")
        print(f"{kills} kills; the weights are those of the uninterrupted conversion, bit for bit")


if __name__ == "__main__":
    main()
