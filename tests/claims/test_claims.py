"""Every claim of the catalog: it runs end to end at a tiny size, and its rules part figures that show the effect from
figures that do not."""

import pytest

from subquad import claims
from subquad.catalog import SYSTEMS
from subquad.claims.contract import Row

NATS = "nats per byte"
BITS, FAR, MASS = "bits per byte", "accuracy at 256", "tokens back for 80% of layer 1's mass"
GRADIENT = "|do/ds| at scores of 1e-{}"
Q_2Q, NEAREST = "{}: q against 2q", "InLine: nearest of 100 queries, 64 keys"
PAIR = "InLine: a constructed pair, as many keys as the head is wide"
SHORT_FIRST, LONG_FIRST = "accuracy, short list first", "accuracy, long list first"

# method -> figures that show the paper's effect; then (method, measure, value) changes that each undo it
MADE_UP = {
    "recycled": (
        {
            "recycled, a full step in 4": {"accuracy": 0.95},
            "recycled, a full step in 8": {"accuracy": 0.6},
            "recycled, a full step in 4, no pooling": {"accuracy": 0.6},
            "the whole cache": {"accuracy": 1.0},
            "SnapKV": {"accuracy": 0.15},
            "H2O": {"accuracy": 0.1},
            "streaming": {"accuracy": 0.05},
        },
        [
            ("recycled, a full step in 4", "accuracy", 0.7),
            ("SnapKV", "accuracy", 0.4),
            ("H2O", "accuracy", 0.4),
            ("streaming", "accuracy", 0.4),
        ],
    ),
    "hip": (
        {
            "HiP, each query its own keys": {"accuracy": 0.95},
            "HiP, blocks of 4 queries": {"accuracy": 0.9},
            "HiP, blocks of 8 queries": {"accuracy": 0.8},
            "its own attention": {"accuracy": 1.0},
            "streaming": {"accuracy": 0.04},
            "random keys": {"accuracy": 0.1},
        },
        [
            ("HiP, each query its own keys", "accuracy", 0.8),
            ("streaming", "accuracy", 0.3),
            ("random keys", "accuracy", 0.3),
        ],
    ),
    "based": (
        {
            "Taylor, d 16": {"accuracy": 1.0},
            "Taylor, d 4": {"accuracy": 0.75},
            "elu + 1, d 16": {"accuracy": 0.3},
            "window of 16": {"accuracy": 0.02},
            "a step of Based": {"ms at 128": 200, "ms at 8192": 210},
            "a step of softmax": {"ms at 128": 250, "ms at 8192": 700},
        },
        [
            ("Taylor, d 16", "accuracy", 0.9),
            ("Taylor, d 16", "accuracy", 0.7),
            ("Taylor, d 4", "accuracy", 0.2),
            ("elu + 1, d 16", "accuracy", 0.6),
            ("window of 16", "accuracy", 0.2),
            ("a step of Based", "ms at 8192", 300),
            ("a step of softmax", "ms at 8192", 300),
        ],
    ),
    "prosparse": (
        {
            "SwiGLU teacher": {NATS: 2.0},
            "ReLU, no penalty": {NATS: 1.83, "sparsity": 0.56},
            "fixed 0.015": {NATS: 1.87, "sparsity": 0.9},
            "fixed 0.002": {"sparsity": 0.7},
            "fixed 0.03": {"sparsity": 0.94},
            "ProSparse 0.002": {"sparsity": 0.6},
            "ProSparse 0.015": {
                NATS: 1.87,
                "sparsity": 0.82,
                f"{NATS}, threshold 0.05": 1.871,
                "sparsity, threshold 0.05": 0.84,
            },
            "ProSparse 0.03": {"sparsity": 0.88},
            "sparse layers": {"ms at 1": 10},
            "dense layers": {"ms at 1": 17},
        },
        [
            ("ReLU, no penalty", "sparsity", 0.7),
            ("fixed 0.015", "sparsity", 0.8),
            ("fixed 0.015", NATS, 1.9),
            ("ProSparse 0.015", "sparsity, threshold 0.05", 0.82),
            ("ProSparse 0.015", f"{NATS}, threshold 0.05", 1.88),
            ("ProSparse 0.03", "sparsity", 0.8),
            ("ProSparse 0.002", "sparsity", 0.83),
            ("sparse layers", "ms at 1", 12),
        ],
    ),
    "rectification": (
        {
            "base": {"unsafe texts": 0.2},
            "without 1 tokens": {"unsafe texts": 0.15},
            "without 2 tokens": {"unsafe texts": 0.1},
            "without 4 tokens": {"unsafe texts": 0.02},
            "exact value": {"unsafe texts": 0.0},
            "learnt value, epsilon 0.1": {"unsafe texts": 0.08},
            "learnt value, epsilon 0.3": {
                "unsafe texts": 0.03,
                "KL to the base": 0.2,
                "KL of the cheapest ban as safe": 2.0,
            },
        },
        [
            ("learnt value, epsilon 0.3", "unsafe texts", 0.07),
            ("learnt value, epsilon 0.3", "KL to the base", 1.1),
            ("exact value", "unsafe texts", 0.01),
            ("base", "unsafe texts", 0.01),
        ],
    ),
    "sparsing_law": (
        {
            "ReLU": {"ratio at 600": 0.12},
            "SiLU": {"ratio at 75": 0.16, "ratio at 600": 0.27},
        },
        [("SiLU", "ratio at 600", 0.17), ("SiLU", "ratio at 75", 0.3)],
    ),
    "lolcats": (
        {
            "LoLCATs": {"after transfer": 0.88, "at the end": 0.95},
            "no transfer": {"at the end": 0.55},
            "no transfer, 80 steps": {},
            "linear attention, no window": {},
            "transfer at 1e-2": {},
            "text": {},
            "text, transfer at 1e-2": {},
            "text, no transfer": {},
            "text, window alone": {},
        },
        [
            ("LoLCATs", "after transfer", 0.7),
            ("LoLCATs", "at the end", 0.89),
            ("no transfer", "at the end", 0.8),
        ],
    ),
    "liger": (
        {
            "Liger": {"teacher": 2.94, "at the end": 3.0, "added parameters": 0.0},
            "recurrence alone": {"at the end": 3.5},
            "LoLCATs": {"at the end": 2.97},
            "LoLCATs, transfer at 1e-2": {},
            "window alone": {},
            "recall of pairs": {},
        },
        [
            ("Liger", "teacher", 2.85),
            ("Liger", "added parameters", 4.0),
            ("recurrence alone", "at the end", 3.2),
            ("LoLCATs", "at the end", 2.9),
        ],
    ),
    "hedgehog": (
        {
            "Hedgehog": {"accuracy after the maps": 0.9, "entropy": 1.0},
            "Hedgehog, joint softmax": {"accuracy after the maps": 0.95},
            "Hedgehog, exp": {"accuracy after the maps": 0.95},
            "T2R": {"accuracy after the maps": 0.6, "entropy": 2.0},
            "elu + 1": {"accuracy after all": 0.6},
        },
        [
            ("Hedgehog", "accuracy after the maps", 0.84),
            ("T2R", "accuracy after the maps", 0.8),
            ("Hedgehog", "entropy", 1.3),
            ("elu + 1", "accuracy after all", 0.9),
        ],
    ),
    "jrt": (
        {
            "JRT-RNN": {SHORT_FIRST: 0.96, LONG_FIRST: 0.95},
            "causal": {SHORT_FIRST: 0.7, LONG_FIRST: 0.6},
            "JRT-Prompt": {SHORT_FIRST: 0.8, LONG_FIRST: 0.75},
            "JRT-RNN, half the state": {SHORT_FIRST: 0.6, LONG_FIRST: 0.6},
            "causal, half the state": {SHORT_FIRST: 0.5, LONG_FIRST: 0.5},
        },
        [
            ("JRT-RNN", SHORT_FIRST, 0.85),
            ("JRT-RNN", LONG_FIRST, 0.85),
            ("causal", LONG_FIRST, 0.8),
            ("causal", SHORT_FIRST, 0.55),
            ("JRT-RNN", LONG_FIRST, 0.75),
            ("JRT-Prompt", SHORT_FIRST, 0.72),
            ("JRT-Prompt", LONG_FIRST, 0.62),
        ],
    ),
    "mamba": (
        {
            "Mamba": {"accuracy": 0.99},
            "fixed maps": {"accuracy": 0.6},
            "the scan": {"ms at 512": 5},
            "transformers' fallback": {"ms at 512": 180},
            "a loop over tokens": {"ms at 512": 30},
        },
        [
            ("Mamba", "accuracy", 0.9),
            ("fixed maps", "accuracy", 0.8),
            ("transformers' fallback", "ms at 512", 90),
            ("a loop over tokens", "ms at 512", 10),
        ],
    ),
    "inline": (
        {
            "InLine": {"accuracy": 0.86},
            "InLine, global part": {"accuracy": 0.81},
            "linear attention, relu": {"accuracy": 0.73},
            "linear attention, elu + 1": {"accuracy": 0.54},
            "linear attention, relu, and a plain 5x5 convolution": {"accuracy": 0.79},
            "softmax": {"accuracy": 0.7},
            "weights": {Q_2Q.format("linear attention"): 0.0, Q_2Q.format("InLine"): 5e-3, NEAREST: 5e-3, PAIR: 1e-16},
        },
        [
            ("InLine", "accuracy", 0.83),
            ("linear attention, relu", "accuracy", 0.82),
            ("linear attention, elu + 1", "accuracy", 0.82),
            ("softmax", "accuracy", 0.87),
            ("weights", Q_2Q.format("linear attention"), 1e-3),
            ("weights", Q_2Q.format("InLine"), 0.0),
            ("weights", NEAREST, 0.0),
            ("weights", PAIR, 1e-3),
        ],
    ),
    "flowformer": (
        {
            "flow attention": {BITS: 3.53},
            "flow attention, clip 1": {BITS: 3.54},
            "plain linear": {BITS: 3.63},
            "without competition": {BITS: 3.55},
            "without allocation": {BITS: 3.59},
            "softmax": {BITS: 3.55},
            "the op": {"ms at 4096": 20, "ms at 16384": 85},
        },
        [
            ("flow attention", BITS, 3.6),
            ("softmax", BITS, 3.4),
            ("the op", "ms at 16384", 120),
        ],
    ),
    "lightning2": (
        {
            "lightning": {
                "tokens/s at 1024": 1000,
                "tokens/s at 16384": 900,
                "bytes/token at 1024": 100,
                "bytes/token at 4096": 100,
                "bytes/token at 16384": 105,
            },
            "torch's attention": {"tokens/s at 1024": 500, "tokens/s at 16384": 90},
            "cumulative sum": {"bytes/token at 4096": 4000},
        },
        [
            ("lightning", "tokens/s at 16384", 800),
            ("lightning", "bytes/token at 16384", 120),
            ("lightning", "bytes/token at 16384", 80),
            ("torch's attention", "tokens/s at 16384", 200),
            ("cumulative sum", "bytes/token at 4096", 1500),
        ],
    ),
    "lightning_tnl": (
        {
            "TNL": {f"{BITS} at 256": 3.0, f"{BITS} at 2048": 2.95},
            "TNL, the authors' example": {f"{BITS} at 256": 3.1, f"{BITS} at 2048": 3.1},
            "no decay, LRPE": {f"{BITS} at 256": 3.2, f"{BITS} at 2048": 3.5},
            "softmax, RoPE": {f"{BITS} at 256": 2.95, f"{BITS} at 2048": 3.4},
            "TNL, D 256": {"tokens/s at 512": 1000, "tokens/s at 8192": 1000, "exponent": 0.0},
            "softmax, D 256": {"tokens/s at 512": 1000, "tokens/s at 8192": 300},
        },
        [
            ("TNL", f"{BITS} at 256", 3.1),
            ("TNL", f"{BITS} at 2048", 3.05),
            ("TNL, the authors' example", f"{BITS} at 2048", 3.2),
            ("no decay, LRPE", f"{BITS} at 2048", 3.3),
            ("softmax, RoPE", f"{BITS} at 2048", 3.05),
            ("TNL, D 256", "tokens/s at 8192", 800),
            ("TNL, D 256", "exponent", 0.1),
            ("TNL, D 256", "exponent", -0.1),
            ("softmax, D 256", "tokens/s at 8192", 600),
        ],
    ),
    "gla": (
        {
            "GLA": {BITS: 2.8},
            "fixed decay, windows 4..256": {BITS: 2.9},
            "RetNet's decay": {BITS: 3.2},
            "no decay": {BITS: 3.3},
            "one gate per head": {BITS: 2.8},
            "softmax without positions": {BITS: 3.3},
            "the op": {"ms at 2048": 10, "ms at 8192": 42},
            "torch's attention": {"ms at 8192": 700},
        },
        [
            ("GLA", BITS, 2.86),
            ("RetNet's decay", BITS, 2.95),
            ("the op", "ms at 8192", 60),
            ("torch's attention", "ms at 8192", 300),
        ],
    ),
    "deltanet": (
        {
            "DeltaNet": {"accuracy": 1.0},
            "additive": {"accuracy": 0.6},
            "additive, learnt write strength": {"accuracy": 0.9},
            "DeltaNet, one layer": {"accuracy": 1.0},
            "additive, one layer": {"accuracy": 0.6},
            "GLA": {"accuracy": 1.0},
            "the op": {"ms at 2048": 10, "ms at 8192": 42},
        },
        [("DeltaNet", "accuracy", 0.9), ("additive", "accuracy", 0.8), ("the op", "ms at 8192", 60)],
    ),
    "transnormer": (
        {
            "TransNormer": {BITS: 3.4, MASS: 20},
            "scaled linear": {BITS: 3.6, MASS: 150},
            "NormAttention in both layers": {BITS: 3.6, MASS: 150},
            "softmax": {BITS: 3.5, MASS: 90},
            "scaled linear, one row": {GRADIENT.format(k): 10.0**k for k in (0, 2, 4, 6, 8)},
            "NormAttention, one row": {GRADIENT.format(k): min(10.0**k, 1e4) for k in (0, 2, 4, 6, 8)},
        },
        [
            ("scaled linear", BITS, 3.5),
            ("softmax", BITS, 3.3),
            ("TransNormer", MASS, 100),
            ("scaled linear, one row", GRADIENT.format(8), 1e6),
            ("NormAttention, one row", GRADIENT.format(8), 1e8),
        ],
    ),
    "transnormerllm": (
        {
            "TransNormerLLM": {BITS: 3.1},
            "no decay": {BITS: 3.4},
            "no decay, LRPE in every layer": {BITS: 3.4},
            "softmax": {BITS: 3.05},
            "SwiGLU for SGLU": {BITS: 3.1},
            "RMSNorm for SRMSNorm": {BITS: 3.1},
        },
        [
            ("no decay", BITS, 3.2),
            ("no decay, LRPE in every layer", BITS, 3.2),
            ("softmax", BITS, 2.9),
            ("SwiGLU for SGLU", BITS, 3.0),
            ("SwiGLU for SGLU", BITS, 3.2),
            ("RMSNorm for SRMSNorm", BITS, 3.0),
            ("RMSNorm for SRMSNorm", BITS, 3.2),
        ],
    ),
    "rnn_review": (
        {
            "adding: GRU": {"squared error": 0.004},
            "adding: LSTM": {"squared error": 0.1},
            "adding: Elman": {"squared error": 0.17},
            "neighbours: bidirectional LSTM": {"accuracy": 1.0},
            "neighbours: LSTM": {"accuracy": 0.75},
            "gradient at the start": {
                f"{name}: |d out / d x_1| over |d out / d x_60|": 1e-6
                for name in ("Elman", "LSTM, forget bias 0", "LSTM, forget bias 2", "GRU")
            },
            "RTRL": {"largest difference to BPTT": 1e-15},
        },
        [
            ("adding: GRU", "squared error", 0.03),
            ("adding: Elman", "squared error", 0.1),
            ("neighbours: bidirectional LSTM", "accuracy", 0.98),
            ("neighbours: LSTM", "accuracy", 0.8),
            ("RTRL", "largest difference to BPTT", 1e-8),
        ],
    ),
    "lightnet": (
        {
            "LightNet, one pass": {"accuracy": 0.8},
            "gated, 2 scans": {"accuracy": 0.81},
            "gated, 4 scans": {"accuracy": 0.82},
            "gated, 1 scan": {"accuracy": 0.84},
            "LightNet, one pass: a training step": {"ms": 20},
            "gated, 2 scans: a training step": {"ms": 40},
            "gated, 4 scans: a training step": {"ms": 75},
            "gated, 1 scan: a training step": {"ms": 25},
        },
        [
            ("LightNet, one pass", "accuracy", 0.77),
            ("gated, 2 scans: a training step", "ms", 30),
            ("gated, 4 scans: a training step", "ms", 50),
        ],
    ),
    "aaren": (
        {
            "series: Aaren": {"squared error": 0.15},
            "series: softmax": {"squared error": 0.14},
            "series: GRU 64": {"squared error": 0.18},
            "drawn sines: Aaren": {"squared error": 0.37},
            "drawn sines: softmax": {"squared error": 0.36},
            "drawn sines: GRU 64": {"squared error": 0.2},
            "rows: Aaren": {"accuracy": 0.98},
            "rows: softmax": {"accuracy": 0.99},
            "rows: GRU 64": {"accuracy": 0.9},
            "pixels: Aaren": {"accuracy": 0.5},
            "pixels: softmax": {"accuracy": 0.8},
            "pixels: GRU 96": {"accuracy": 0.6},
            "the layer's state": {"state bytes after 16": 160, "state bytes after 1,024": 160},
            "the op": {"ms at 4096": 0.2, "ms at 16384": 0.9},
            "torch's attention": {"ms at 16384": 1700},
        },
        [
            ("series: Aaren", "squared error", 0.172),
            ("series: GRU 64", "squared error", 0.14),
            ("rows: Aaren", "accuracy", 0.95),
            ("the layer's state", "state bytes after 1,024", 170),
            ("the op", "ms at 16384", 1.1),
            ("torch's attention", "ms at 16384", 0.8),
        ],
    ),
    "mom": (
        {
            "64 pairs in 4 memories of K 16": {"mean squared error of recall": 0.2},
            "64 pairs in one memory of K 16": {"mean squared error of recall": 0.6},
            "4 memories of K 8": {"accuracy": 0.9},
            "one memory of K 8": {"accuracy": 0.8},
            "one memory of K 40": {"accuracy": 0.85},
        },
        [
            ("64 pairs in one memory of K 16", "mean squared error of recall", 0.3),
            ("4 memories of K 8", "accuracy", 0.82),
        ],
    ),
    "titans": (
        {
            "memory": {"accuracy": 0.85},
            "linear memory": {"accuracy": 0.8},
            "window of 16": {"accuracy": 0.4},
            "window of 16, if perfect": {"accuracy": 0.45},
            "window of 32, gated by a memory": {BITS: 3.1},
            "window of 32": {BITS: 3.5},
        },
        [
            ("memory", "accuracy", 0.69),
            ("window of 16", "accuracy", 0.7),
            ("window of 16, if perfect", "accuracy", 0.7),
            ("window of 32", BITS, 3.11),
        ],
    ),
    "dsf": (
        {"normalised attention": {"accuracy": 0.97}, "linear attention, elu + 1": {"accuracy": 0.1}},
        [("normalised attention", "accuracy", 0.85), ("linear attention, elu + 1", "accuracy", 0.6)],
    ),
    "negative_eigenvalues": (
        {
            "DeltaNet, eigenvalues in (-1, 1)": {FAR: 0.97},
            "DeltaNet, eigenvalues in (0, 1)": {FAR: 0.52},
        },
        [("DeltaNet, eigenvalues in (-1, 1)", FAR, 0.8), ("DeltaNet, eigenvalues in (0, 1)", FAR, 0.7)],
    ),
}


@pytest.mark.parametrize("slug", claims.available())
def test_a_claim_runs_end_to_end(slug):
    claim = claims.load(slug)
    result = claim.tiny().run((0,))
    assert [row.method for row in result.rows] == list(claim.arms)
    assert len(result.outcomes) == len(claim.rules)
    for row in result.rows:
        for measure, value in row.figures.items():
            assert value == value, f"{row.method}'s {measure} is NaN"


@pytest.mark.parametrize("slug", claims.available())
def test_its_rules_part_the_effect_from_its_absence(slug):
    claim = claims.load(slug)
    shows, undoings = MADE_UP[slug]
    assert set(shows) == set(claim.arms)

    def judged(figures):
        return claim.judge([Row(method, 0, values) for method, values in figures.items()], 0.0)

    assert judged(shows).reproduced
    undone = set()
    for method, measure, value in undoings:
        assert measure in shows[method]
        result = judged({**shows, method: {**shows[method], measure: value}})
        assert not result.reproduced, f"{method}'s {measure} = {value} should undo the claim"
        undone |= {outcome.rule for outcome in result.outcomes if not outcome.holds}
    assert undone == {str(rule) for rule in claim.rules}, "every rule is undone by some figure"


def test_claims_carry_the_catalog_s_numbers_and_names():
    rows = [row for row in SYSTEMS if row.claim is not None]
    assert [row.slug for row in rows] == claims.available()
    for row in rows:
        claim = claims.load(row.number)
        assert (claim.number, claim.slug) == (row.number, row.slug)
        assert claims.load(f"{row.number:02d}") is claim
        assert claims.load(row.slug) is claim


@pytest.mark.parametrize(
    ("name", "message"),
    [("glaa", "did you mean 'gla'"), (1, "AP has no claim to run yet"), (71, "no claim is called 71")],
)
def test_an_unknown_claim_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        claims.load(name)


def test_the_same_seed_gives_the_same_figures():
    arm = claims.load("negative_eigenvalues").tiny().arms["DeltaNet, eigenvalues in (-1, 1)"]
    assert arm.measure(3) == arm.measure(3)
    assert arm.measure(3) != arm.measure(4)
