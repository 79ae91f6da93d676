"""How long, on what and by which rates a conversion is trained and measured."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """The settings of one conversion, beside recipe, layers and options.

    Args:
        context: tokens per row, in training and in measuring perplexity.
        batch_size: rows per step.
        transfer_steps, adapt_steps: steps of the two stages, of those that the recipe has; 0 leaves a stage out.
        transfer_learning_rate, learning_rate: peaks in transfer and adaptation; None: the recipe's.
        seed: of new parameters, additions and the order of the data.
        save_every: steps between checkpoints.
        windows: held-out rows that perplexity is measured on, at most.
        contexts: lengths at which speed and memory are measured.

    Raises:
        ValueError: a number out of range.
    """

    context: int = 512
    batch_size: int = 8
    transfer_steps: int = 120
    adapt_steps: int = 120
    transfer_learning_rate: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    save_every: int = 50
    windows: int = 32
    contexts: tuple[int, ...] = (512, 2048)

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("batch_size", 1),
            ("transfer_steps", 0),
            ("adapt_steps", 0),
            ("save_every", 1),
            ("windows", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")
        if any(length < 1 for length in self.contexts) or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must be positive and ascend; got {list(self.contexts)}")

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "contexts": list(self.contexts)}
