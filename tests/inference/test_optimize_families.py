"""Every family of transformers with something recurrent: optimised, it computes what it computed."""

import copy
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from subquad import optimize
from subquad.bench.transformers_families import FAMILIES
from subquad.inference.optimize import Optimization

CONVOLUTION = ("short_convolution",)
SCAN = (*CONVOLUTION, "selective_scan")
SSD = (*CONVOLUTION, "ssd")
DELTA = (*CONVOLUTION, "gated_delta_rule")
KDA = (*CONVOLUTION, "kda")
REPLACED = {
    "mamba": {"MambaMixer": SCAN},
    "falcon_mamba": {"FalconMambaMixer": SCAN},
    "jamba": {"JambaMambaMixer": SCAN},
    "zamba": {"ZambaMambaMixer": SCAN},
    "mamba2": {"Mamba2Mixer": SSD},
    "bamba": {"BambaMixer": SSD},
    "falcon_h1": {"FalconH1Mixer": SSD},
    "granitemoehybrid": {"GraniteMoeHybridMambaLayer": SSD},
    "nemotron_h": {"NemotronHMamba2Mixer": SSD},
    "zamba2": {"Zamba2MambaMixer": SSD},
    "qwen3_next": {"Qwen3NextGatedDeltaNet": DELTA},
    "qwen3_5_text": {"Qwen3_5GatedDeltaNet": DELTA},
    "qwen3_5_moe_text": {"Qwen3_5MoeGatedDeltaNet": DELTA},
    "lara_mini": {"LaraMiniGatedDeltaNet": DELTA},
    "olmo_hybrid": {"OlmoHybridGatedDeltaNet": DELTA},
    "qwen4_exp_text": {"Qwen4ExpTextGatedDeltaNet": DELTA},
    "kimi_linear": {"KimiLinearDeltaAttention": KDA},
    "bailing_hybrid": {"BailingHybridDeltaAttention": KDA},
    "glm5_next": {"Glm5NextTextLinearAttention": KDA},
    "lfm2": {"Lfm2ShortConv": CONVOLUTION},
    "lfm3": {"Lfm3ShortConv": CONVOLUTION},
    "lfm2_moe": {"Lfm2MoeShortConv": CONVOLUTION},
    "inkling_text": {"InklingShortConvolution": CONVOLUTION},
    "inkling2_text": {"Inkling2ShortConvolution": CONVOLUTION},
    "inkling2_loop_text": {"Inkling2LoopShortConvolution": CONVOLUTION},
    "recurrent_gemma": {"RecurrentGemmaRecurrentBlock": CONVOLUTION, "RecurrentGemmaRglru": ("diagonal_scan",)},
    "minimax": {"MiniMaxLightningAttention": ("lightning_attention",)},
    "rwkv": {"RwkvSelfAttention": ("wkv",), "RwkvFeedForward": ("wkv",)},
    "xlstm": {"xLSTMBackend": ("mlstm",)},
    "zaya": {},
}
#: Their layers take no notice of padding, so that rows of unequal length cannot be compared.
IGNORE_PADDING = {"rwkv", "xlstm", "recurrent_gemma"}
#: transformers is wrong here: test_optimize_right.py has what is right.
WRONG_LEFT_PADDING, WRONG_ROWS = {"minimax"}, {"rwkv"}
#: Make a cache of a class of their own.
OWN_CACHE = {"minimax", "rwkv", "xlstm"}
LIMITED_STEPS = {"nemotron_h", "zamba2"}
TOLERANCE = 1e-4


@dataclass
class Pair:
    name: str
    plain: PreTrainedModel
    ours: PreTrainedModel
    done: Optimization

    @property
    def ids(self) -> torch.Tensor:
        return torch.randint(2, 96, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=REPLACED)
def pair(request):
    family = FAMILIES[request.param]
    plain, ours = family.build(), family.build()
    return Pair(request.param, plain, ours, optimize(ours))


def assert_near(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error, size = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * size, f"error {error} for size {size}"


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return ids * mask, mask


def test_every_recurrent_layer_is_ours(pair):
    assert {layer.kind: layer.ops for layer in pair.done.replaced} == REPLACED[pair.name]
    assert not [layer for layer in pair.done.layers if layer.reason]


@torch.no_grad()
def test_logits_are_equal(pair):
    ids, mask = left_padded(pair.ids)
    for given in (torch.ones_like(mask), mask):
        expected, actual = (m(input_ids=ids, attention_mask=given).logits for m in (pair.plain, pair.ours))
        assert_near(actual[given.bool()], expected[given.bool()])


def test_greedy_tokens_and_their_logits_are_equal(pair):
    ids, mask = left_padded(pair.ids)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for given in (torch.ones_like(mask), mask):
        if given is mask and pair.name in IGNORE_PADDING | WRONG_LEFT_PADDING:
            continue
        if pair.name in WRONG_ROWS:
            ids, given = ids[1:], given[1:]
        expected, actual = (m.generate(input_ids=ids, attention_mask=given, **options) for m in (pair.plain, pair.ours))
        assert torch.equal(actual.sequences, expected.sequences)
        assert_near(torch.stack(actual.logits), torch.stack(expected.logits))


def test_gradients_are_equal(pair):
    found = []
    for model in (pair.plain, pair.ours):
        copied = copy.deepcopy(model).train()
        torch.manual_seed(0)
        copied(input_ids=pair.ids, labels=pair.ids, use_cache=False).loss.backward()
        found.append({name: x.grad for name, x in copied.named_parameters() if x.grad is not None})
    expected, actual = found
    assert expected.keys() == actual.keys()
    # a gradient is a sum over tokens whose terms cancel: 1e-6 of their size is left wherever it comes to less
    floor = 1e-2 * max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        error, size = float((actual[name] - gradient).abs().max()), max(float(gradient.abs().max()), floor)
        assert error <= TOLERANCE * size, f"{name}: error {error} for size {size}"


@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_whole(pair):
    """Where transformers loses a state between pieces, ours goes on from it."""
    ids = pair.ids
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    whole = pair.ours(input_ids=ids).logits
    cache = None if pair.name in OWN_CACHE else DynamicCache(config=pair.ours.config.get_text_config())
    pieces = []
    # a single token takes the step of decoding, in which transformers does not limit the steps of Mamba-2
    cuts = (11, 30) if pair.name in LIMITED_STEPS else (11, 30, 31)
    name = "state" if pair.name == "rwkv" else "cache"
    for start, end in pairwise((0, *cuts, 37)):
        at = slice(start, end)
        out = pair.ours(input_ids=ids[:, at], position_ids=positions[:, at], use_cache=True, **{name: cache})
        cache = out.get(name, cache)
        pieces.append(out.logits)
    assert_near(torch.cat(pieces, 1), whole)


def test_undo_gives_the_very_same_model_back(pair):
    model = copy.deepcopy(pair.ours)
    done = optimize(model)
    done.undo()
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=pair.ids).logits, pair.plain(input_ids=pair.ids).logits)
