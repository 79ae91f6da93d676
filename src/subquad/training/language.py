"""From text to a language model in an ordinary Hugging Face folder: what ``subquad train`` does."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from subquad import tasks
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.training.data import from_text
from subquad.training.loop import Evaluation, TrainingResult, train
from subquad.training.options import TrainingOptions


def train_language_model(
    data: Any,
    config: SubquadConfig,
    options: TrainingOptions,
    *,
    context: int,
    out: str | Path,
    resume: bool = False,
    evaluate: Evaluation | None = None,
    console: Console | None = None,
) -> tuple[SubquadForCausalLM, TrainingResult]:
    """Trains a byte-level language model and saves it, with its tokenizer, in ``out/model``.

    Args:
        data: a :class:`subquad.tasks.TextData`; its tokens are bytes.
        config: of the model; its vocabulary is replaced by the byte tokenizer's 259.
        options: of the run; the seed also draws the first weights.
        context: tokens per row.
        out: folder of the run (checkpoints, metrics) and of the model.
        resume: continue an interrupted run in ``out``.
        evaluate: called with the model now and then, as in :func:`subquad.training.train`.

    Returns:
        The model in evaluation mode, and the result of the run.
    """
    tokenizer = tasks.byte_tokenizer()
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.max_position_embeddings = max(config.max_position_embeddings, context)
    torch.manual_seed(options.seed)
    model = SubquadForCausalLM(config)

    batches = from_text(data, context, options.batch_size, options.seed)
    result = train(model, batches, options, out=out, resume=resume, evaluate=evaluate, console=console)
    model.eval()
    model.save_pretrained(Path(out, "model"))
    tokenizer.save_pretrained(Path(out, "model"))
    return model, result
