"""15 LoLCATs: attention transfer, then low-rank additions, convert a trained model (Zhang et al. 2025, section 4)."""

from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.conversions import FINAL, TRANSFERRED, Converted, PairRecall, SourceText, Stage

RECALL, TEXT = PairRecall(), SourceText()
MAPS = {"window": 4, "feature_dim": 32}
TRANSFER, ADAPT = Stage(60, 5e-2), Stage(20, 1e-2)
TEXT_MAPS = {"window": 8, "feature_dim": 32}
TEXT_ADAPT = Stage(50, 5e-3)
OURS, NO_TRANSFER, LONGER = "LoLCATs", "no transfer", "no transfer, 80 steps"
CLAIM = Claim(
    number=15,
    slug="lolcats",
    claim="Feature maps trained layer by layer to give softmax's outputs, and then low-rank additions, recover a "
    "model that is converted to linear attention and a window, in a few steps; additions alone do not.",
    measured="Recall of 16 pairs of 24 keys and 8 values by 48 questions after them (chance 0.125): accuracy of a "
    "Llama of 2 layers, D 64, 2 heads, and of its conversions with windows of 4: 60 steps of transfer at 5e-2, 20 of "
    "rank 8 at 1e-2, 32 rows each. On Python's sources (T 128, windows of 8, 50 + 50 steps of 8 rows): bits per byte "
    "of the second half of each row.",
    arms={
        OURS: Converted(RECALL, "lolcats", MAPS, TRANSFER, ADAPT),
        NO_TRANSFER: Converted(RECALL, "lolcats", MAPS, None, ADAPT, core_rate=5e-2),
        LONGER: Converted(RECALL, "lolcats", MAPS, None, Stage(80, 1e-2), core_rate=5e-2),
        "linear attention, no window": Converted(RECALL, "lolcats", {**MAPS, "window": None}, TRANSFER, ADAPT),
        "transfer at 1e-2": Converted(RECALL, "lolcats", MAPS, Stage(60, 1e-2), ADAPT),
        "text": Converted(TEXT, "lolcats", TEXT_MAPS, Stage(50, 5e-2), TEXT_ADAPT, batch_size=8),
        "text, transfer at 1e-2": Converted(TEXT, "lolcats", TEXT_MAPS, Stage(50, 1e-2), TEXT_ADAPT, batch_size=8),
        "text, no transfer": Converted(TEXT, "lolcats", TEXT_MAPS, None, TEXT_ADAPT, core_rate=5e-3, batch_size=8),
        "text, window alone": Converted(TEXT, "window", {"window": 8}, None, TEXT_ADAPT, batch_size=8),
    },
    rules=(
        at_least(Term(OURS, TRANSFERRED), plus=0.75),
        at_least(Term(OURS, FINAL), plus=0.9),
        at_most(Term(NO_TRANSFER, FINAL), Term(OURS, FINAL), plus=-0.2),
    ),
    remark="Where the teacher solves the task whole, additions alone come near it in the same 20 steps, and nearer in "
    "80: transfer saves labels, not steps. Its learning rate decides much, see the rows at 1e-2. On local text a "
    "window alone does as well.",
)
