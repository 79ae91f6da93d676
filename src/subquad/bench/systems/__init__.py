"""Token mixers as linear time-varying systems, measured side by side (Sieber et al. 2024)."""

from subquad.bench.systems.analysis import Analysis, Part, analyze_mixers, analyze_model, take_apart
from subquad.bench.systems.measures import (
    coupling,
    distance,
    eigenvalues,
    half_lives,
    linearized,
    mean_weight_by_distance,
    memory_rank,
    reach,
)

__all__ = [
    "Analysis",
    "Part",
    "analyze_mixers",
    "analyze_model",
    "coupling",
    "distance",
    "eigenvalues",
    "half_lives",
    "linearized",
    "mean_weight_by_distance",
    "memory_rank",
    "reach",
    "take_apart",
]
