"""Training: one loop for every model of the library, with checkpoints that resume bit for bit."""

from subquad.training.checkpoint import CheckpointError
from subquad.training.data import Batch, Data, from_task, from_text
from subquad.training.loop import TrainingResult, train
from subquad.training.metrics import read_metrics
from subquad.training.mimicry import Mimicry
from subquad.training.nonfinite import NonFiniteLoss
from subquad.training.objectives import Objective, PrefixLM, next_token
from subquad.training.optimizers import adamw, learning_rate_schedule, parameter_groups
from subquad.training.options import TrainingOptions
from subquad.training.through_time import RTRL, TruncatedBPTT, gradient_flow

__all__ = [
    "train",
    "TrainingOptions",
    "TrainingResult",
    "Batch",
    "Data",
    "from_task",
    "from_text",
    "Objective",
    "next_token",
    "PrefixLM",
    "Mimicry",
    "TruncatedBPTT",
    "RTRL",
    "gradient_flow",
    "adamw",
    "parameter_groups",
    "learning_rate_schedule",
    "read_metrics",
    "NonFiniteLoss",
    "CheckpointError",
]
