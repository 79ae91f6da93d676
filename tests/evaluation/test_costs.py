"""Speed, state and memory: what is counted, not how fast it is."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.evaluation.memory import peak_resident_bytes, prefill_memory, resident_bytes, restart_peak
from subquad.evaluation.throughput import context_cost


def model(mixer):
    torch.manual_seed(0)
    fields = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SubquadForCausalLM(SubquadConfig(mixers=mixer, **fields)).eval()


def read_two_lengths():
    torch.set_num_threads(1)
    return prefill_memory(model("softmax"), [256, 8192])


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("SUBQUAD_BACKEND", "chunked")


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_every_repetition_and_token_is_timed(mixer):
    cost = context_cost(model(mixer), 24, decode_tokens=5, repeats=3, enough_seconds=60)
    assert (cost.length, len(cost.prefill_seconds), len(cost.decode_seconds)) == (24, 3, 5)
    assert min(cost.prefill_seconds + cost.decode_seconds) > 0
    assert len(context_cost(model(mixer), 24, decode_tokens=1, repeats=9, enough_seconds=0).prefill_seconds) == 2


def test_softmax_keeps_every_key_and_value_and_gla_a_matrix_per_head():
    softmax = [context_cost(model("softmax"), n, decode_tokens=1, repeats=1).state_bytes for n in (20, 40)]
    per_token = 2 * (2 * 32 * 4 + 8)  # layers x (keys and values in float32, a position in int64)
    assert softmax == [20 * per_token, 40 * per_token]
    gla = [context_cost(model("gla"), n, decode_tokens=1, repeats=1).state_bytes for n in (20, 40)]
    assert gla[0] == gla[1] == 2 * 2 * (8 * 16) * 4  # layers, heads, half of the width as keys, float32


def test_the_peak_rises_with_what_is_held_and_restarts():
    restart_peak()
    before = resident_bytes()
    held = torch.ones(16 * 2**20)
    assert peak_resident_bytes() - before >= 0.9 * held.numel() * 4
    del held
    restart_peak()
    assert peak_resident_bytes() - before < 48 * 2**20


def test_reading_more_takes_more_memory():
    # a process of its own, as in a comparison: what tests before have freed would be used again, and no peak would rise
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peaks = pool.submit(read_two_lengths).result()
    assert peaks[8192] >= 8192 * 2 * 2 * 32 * 4  # at least the keys and values
    assert peaks[8192] > peaks[256]


def test_lengths_must_ascend():
    with pytest.raises(ValueError, match=r"lengths must ascend; got \[64, 32\]"):
        prefill_memory(model("gla"), [64, 32])
