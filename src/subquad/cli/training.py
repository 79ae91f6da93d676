"""The command that trains."""

import json
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.application import DataPaths, answers_errors, app, console, errors


@app.command()
@answers_errors
def train(
    data: DataPaths,
    out: Annotated[Path, typer.Option(help="Folder of the run; the model is saved in OUT/model.")],
    mixers: Annotated[
        str, typer.Option(help="One mixer for all layers, or a pattern such as 'gla*3+softmax'.")
    ] = "gla",
    config: Annotated[Path | None, typer.Option(help="JSON file with further fields of SubquadConfig.")] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Number of heads.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens (bytes) per row.")] = 512,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 50,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16 (GPU).")] = "no",
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run in OUT.")] = False,
) -> None:
    """Train a byte-level language model on your text and save it as a Hugging Face folder.

    Example: `subquad train --data notes/ --mixers "gla*3+softmax" --out runs/notes`
    """
    from subquad import tasks
    from subquad.evaluation.loss import bits_per_byte
    from subquad.models import SubquadConfig
    from subquad.training import TrainingOptions
    from subquad.training.language import train_language_model

    text = tasks.text_files(data)
    fields = json.loads(config.read_text()) if config else {}
    settings = SubquadConfig(
        **{
            "mixers": mixers,
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            **fields,
        }
    )
    options = TrainingOptions(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(warmup_steps, steps - 1),
        precision=precision,
        seed=seed,
        save_every=save_every,
        eval_every=eval_every,
    )
    _, result = train_language_model(
        text,
        settings,
        options,
        context=context,
        out=out,
        resume=resume,
        evaluate=lambda model: {"bits_per_byte": bits_per_byte(model, text, "valid", context, limit=64)},
        console=errors,
    )
    last = result.history[-1]
    console.print(
        f"loss {last['loss']:.3f} nats, {last.get('evaluation/bits_per_byte', float('nan')):.3f} bits per byte on the "
        f"validation text; the model is in {out / 'model'}"
    )
