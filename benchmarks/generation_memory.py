"""Resident memory while a small model generates 16,384 tokens; writes results/generation_memory.json.

For mixers with a constant state it must not grow: what is left is the token list itself.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import machine
import torch

from subquad import SubquadConfig, SubquadForCausalLM, mixers

FIRST, LAST = 1024, 16_384


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(name: str) -> dict[str, Any]:
    """Growth of resident memory and of the state from 1,024 to 16,384 tokens, greedy, one row."""
    torch.manual_seed(0)
    config = SubquadConfig(mixers=name, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=259)
    model = SubquadForCausalLM(config).eval()
    token, cache, seen = torch.zeros(1, 1, dtype=torch.int64), None, {}
    with torch.no_grad():
        for t in range(1, LAST + 1):
            out = model(token, cache=cache, use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1:].argmax(-1), out.cache
            if t in (FIRST, LAST):
                seen[t] = (resident_bytes(), cache.number_of_bytes())
    return {
        "mixer": name,
        "constant_state": all(mixer.constant_state for mixer in model.model.mixers()),
        "resident_growth_bytes": seen[LAST][0] - seen[FIRST][0],
        "state_bytes_first": seen[FIRST][1],
        "state_bytes_last": seen[LAST][1],
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in mixers.available(mixers.Pattern.CAUSAL_SELF):
        if mixers.mixer_class(name) is mixers.mixer_class("softmax") and name != "sliding_window":
            continue
        rows.append(measure(name))
        print(rows[-1], flush=True)
    print(machine.write("generation_memory", {"command": " ".join(["python", *sys.argv]), "rows": rows}))


if __name__ == "__main__":
    main()
