"""Every claim of the catalog: it runs end to end at a tiny size, and its rules part figures that show the effect from
figures that do not."""

import pytest

from subquad import claims
from subquad.catalog import SYSTEMS
from subquad.claims.contract import Row

BITS, FAR, MASS = "bits per byte", "accuracy at 256", "tokens back for 80% of layer 1's mass"
GRADIENT = "|do/ds| at scores of 1e-{}"

# method -> figures that show the paper's effect; then (method, measure, value) changes that each undo it
MADE_UP = {
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
