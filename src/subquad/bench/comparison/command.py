"""The whole comparison: measure costs, choose learning rates, train, and say which mixer serves the text.

Every finished piece of work is kept in the folder under its name, so that a second call with the same settings goes on
where the first one stopped, trainings in their middle included.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad import tasks
from subquad.bench.comparison.candidates import matched_models
from subquad.bench.comparison.folder import open_folder
from subquad.bench.comparison.results import Comparison
from subquad.bench.comparison.settings import CONTEXTS, CompareSettings
from subquad.bench.comparison.stages import Run

Paths = str | Path | Iterable[str | Path]


def compare(
    data: tasks.TextData | Paths,
    mixers: Sequence[str],
    *,
    hybrids: Sequence[str] = (),
    context: int = 512,
    budget: float | None = None,
    tokens: int | None = None,
    parameters: int = 2_000_000,
    seeds: Sequence[int] = (0, 1),
    out: str | Path,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    contexts: Sequence[int] = CONTEXTS,
    resume: bool = True,
    progress: bool | Console = True,
    **settings: Any,
) -> Comparison:
    """Trains one language model per mixer on your text, alike in everything else, and measures what each costs.

    All models have the same number of parameters within 2%, see the same batches in the same order, and get the best of
    the same learning rates. Measured are: loss on held-out text (bits per byte), training speed, reading and writing
    speed, memory and state size over context lengths, recall, and loss beyond the training context.

    Args:
        data: a :class:`subquad.tasks.TextData`, or files and folders for :func:`subquad.tasks.text_files`.
        mixers, hybrids, context, budget, tokens, parameters, seeds, learning_rates, contexts: and any further field of
            :class:`CompareSettings` by name.
        out: folder for ``report.html``, ``results.json``, ``results.csv`` and ``plots/``; what has been done so far
            is kept there too.
        resume: continue what ``out`` holds, if its settings are the same.
        progress: True shows it on stderr, False shows nothing; or a console of your own.

    Returns:
        The figures and the verdict; ``print(comparison.verdict)``, ``rich.print(comparison.table())``.

    Raises:
        ValueError, TypeError: settings that do not fit (unknown mixer, text too short, parameters that cannot be
            matched, a budget too small), or ``out`` holds something else; always before anything is trained but for the
            budget, which is judged once steps have been timed.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: Ctrl-C; trainings save first, and the same call goes on from there.

    Example:
        >>> from subquad import bench, tasks
        >>> bench.compare(tasks.source_text(), ["softmax", "glaa"], out="/tmp/never-made")
        Traceback (most recent call last):
        ValueError: unknown mixer 'glaa'; did you mean 'gla'?...
    """
    chosen = CompareSettings(
        mixers=tuple(mixers),
        hybrids=tuple(hybrids),
        context=context,
        budget=budget,
        tokens=tokens,
        parameters=parameters,
        seeds=tuple(seeds),
        learning_rates=tuple(learning_rates),
        contexts=tuple(contexts),
        **settings,
    )
    return run_comparison(data, chosen, out=out, resume=resume, progress=progress)


def run_comparison(
    data: tasks.TextData | Paths,
    settings: CompareSettings,
    *,
    out: str | Path,
    resume: bool = True,
    progress: bool | Console = True,
) -> Comparison:
    """As :func:`compare`, with the settings as one record, such as ``CompareSettings.demo()``."""
    text = data if isinstance(data, tasks.TextData) else tasks.text_files(data)
    check_length(text, settings)
    models = matched_models(settings, text.vocab_size)
    console = progress if isinstance(progress, Console) else Console(stderr=True, quiet=not progress)
    folder = open_folder(Path(out), settings, text, resume)
    return Run(text, settings, models, folder, console).run()


def check_length(text: tasks.TextData, settings: CompareSettings) -> None:
    """Raises ValueError where a split of the text is shorter than one training row."""
    for split in ("train", "valid", "test"):
        size = len(text.tokens(split))
        if size < settings.context + 1:
            raise ValueError(
                f"{text.source} is too short for a context of {settings.context}: its {split} split has {size:,} "
                f"tokens, and {settings.context + 1:,} are needed; give more text or a context of at most {size - 1:,}"
            )
