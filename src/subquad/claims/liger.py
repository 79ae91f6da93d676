"""26 Liger: a gate read off the keys, a window, and low-rank additions convert a trained model (Lan et al. 2025)."""

from subquad.claims.contract import Claim, Term, at_most
from subquad.claims.conversions import ADDED, FINAL, TEACHER, Converted, PairRecall, SourceText, Stage

TEXT = SourceText()
WINDOW = 8
ADAPT = Stage(100, 5e-3)
QKV = ("q", "k", "v")
OURS, PURE, LOLCATS = "Liger", "recurrence alone", "LoLCATs"
CLAIM = Claim(
    number=26,
    slug="liger",
    claim="With its forget gate read off the pretrained keys, and a window on the same projections, a Transformer "
    "becomes a gated recurrent model without a new parameter; low-rank additions recover its quality.",
    measured="Bits per byte on Python's sources (the second half of rows of 128) of a Llama of 2 layers, D 64, 2 "
    "heads, 500 steps of 8 rows, and of its conversions with windows of 8: 100 steps of rank 8 on q, k and v at 5e-3; "
    "LoLCATs with 50 steps of transfer at 5e-2 and 50 of rank 8.",
    arms={
        OURS: Converted(TEXT, "liger", {"window": WINDOW}, None, ADAPT, QKV, batch_size=8),
        PURE: Converted(TEXT, "liger", {"window": WINDOW, "mix": (1, 0)}, None, ADAPT, QKV, batch_size=8),
        LOLCATS: Converted(
            TEXT, "lolcats", {"window": WINDOW, "feature_dim": 32}, Stage(50, 5e-2), Stage(50, 5e-3), batch_size=8
        ),
        "LoLCATs, transfer at 1e-2": Converted(
            TEXT, "lolcats", {"window": WINDOW, "feature_dim": 32}, Stage(50, 1e-2), Stage(50, 5e-3), batch_size=8
        ),
        "window alone": Converted(TEXT, "window", {"window": WINDOW}, None, ADAPT, QKV, batch_size=8),
        "recall of pairs": Converted(PairRecall(), "liger", {"window": 4}, None, Stage(50, 1e-2), QKV),
    },
    rules=(
        at_most(Term(OURS, FINAL), Term(OURS, TEACHER), plus=0.10),
        at_most(Term(OURS, FINAL), Term(LOLCATS, FINAL), plus=0.05),
        at_most(Term(OURS, FINAL), Term(PURE, FINAL), plus=-0.3),
        at_most(Term(OURS, ADDED), plus=0.0),
    ),
    remark="The window carries it: alone it does as well on local text. The row on recall is an accuracy (chance "
    "0.125): softmax features of a fixed scale cannot address 16 keys.",
)
