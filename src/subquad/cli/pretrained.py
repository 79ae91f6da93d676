"""Commands for models that exist: convert them, write with them, find their idle neurons, make them safer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from subquad.cli.application import answers_errors, app, console, errors, escape, list_of, refuse_existing


@app.command()
@answers_errors
def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder: Llama, Mistral, Qwen, Phi-3, Gemma, GPT-2, ...")],
    to: Annotated[str, typer.Option("--to", help="Recipe: liger, lolcats, hedgehog, linear, window.")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="A text file, a folder of them, or a JSONL file; may be given several times."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; it must not exist.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would be done; with --data also what it costs untrained.")
    ] = False,
    layers: Annotated[str, typer.Option(help="all, every:4 (all but every fourth), or numbers with commas.")] = "all",
    option: Annotated[list[str] | None, typer.Option(help="An option of the recipe, such as window=64.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    transfer_steps: Annotated[int, typer.Option(help="Steps that train new parameters layer by layer.")] = 120,
    steps: Annotated[int, typer.Option(help="Steps that adapt the whole model.")] = 120,
    transfer_learning_rate: Annotated[float | None, typer.Option(help="Peak in transfer; the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak in adaptation; the recipe's.")] = None,
    contexts: Annotated[str, typer.Option(help="Lengths at which speed and memory are measured.")] = "512,2048",
    seed: Annotated[int, typer.Option(help="Of new parameters and the order of the data.")] = 0,
) -> None:
    """Convert a pretrained Transformer to an efficient one and save it as a Hugging Face folder, with a report.

    Stopped or killed, the same command goes on where it was.

    Example: `subquad convert models/llama --to liger --data notes/ -o models/llama-liger`
    """
    from subquad import convert as conversion
    from subquad import tasks
    from subquad.convert.options import parse_options
    from subquad.convert.report import tables

    options = parse_options(to, option or ())
    chosen = layers if layers == "all" or ":" in layers else list_of(layers, int)
    settings = conversion.ConvertSettings(
        context=context,
        batch_size=batch_size,
        transfer_steps=transfer_steps,
        adapt_steps=steps,
        transfer_learning_rate=transfer_learning_rate,
        learning_rate=learning_rate,
        seed=seed,
        contexts=tuple(list_of(contexts, int)),
    )
    if plan:
        console.print(conversion.plan_folder(model, to, layers=chosen, **options))
        if data:
            found = conversion.untrained_cost(
                model, to, tasks.text_files(data), layers=chosen, options=options, settings=settings
            )
            for stage, figures in found.items():
                shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                console.print(f"{stage}: {shown}", highlight=False)
        return
    if not data or out is None:
        raise ValueError("give text with --data and a folder to write with -o, or --plan to see what would be done")
    result = conversion.run(
        model, to, tasks.text_files(data), out, layers=chosen, options=options, settings=settings, console=errors
    )
    console.print(tables(result.record))
    console.print(f"the model and its report, conversion.html, are in {out.resolve()}", soft_wrap=True)


@app.command()
@answers_errors
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a GGUF file, of a causal language model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    optimize: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="Our operations in transformers' recurrent layers.")
    ] = True,
) -> None:
    """Go on from a prompt, and tell the speed.

    Example: `subquad generate runs/notes/model --prompt "def main("`
    """
    import time

    import torch
    from transformers import TextStreamer

    from subquad.inference.optimize import optimize as optimize_model
    from subquad.inference.pretrained import load

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("max_new_tokens must be at least 1 and temperature at least 0")
    lm, tokenizer = load(model)
    if optimize:
        plan = optimize_model(lm)
        if plan.layers:
            errors.print(escape(str(plan)), style="dim", highlight=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one character")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    output = lm.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - started
    added = output.shape[1] - inputs.input_ids.shape[1]
    errors.print(f"{added} tokens in {seconds:.1f} s, {added / seconds:.1f} tokens/s")


@app.command()
@answers_errors
def sparsity(
    model: Annotated[str, typer.Argument(help="Folder of a causal language model with its tokenizer.")],
    data: Annotated[list[Path], typer.Option("--data", help="Text to measure on; the more, the surer.")],
    percent: Annotated[float, typer.Option(help="How much more perplexity is allowed.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens that are read.")] = 8192,
    context: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    out: Annotated[Path, typer.Option(help="Folder for sparsity.json and sparsity.png.")] = Path("sparsity"),
    save: Annotated[
        Path | None, typer.Option(help="Also write the model with its thresholds, to decode by them.")
    ] = None,
) -> None:
    """Measure how many neurons of a model's feed-forward layers matter, at a bound on its perplexity.

    Example: `subquad sparsity models/llama --data notes/ --percent 1 --save models/llama-sparse`
    """
    from subquad import tasks
    from subquad.bench.neuron_use import neuron_use
    from subquad.compress.sparse_feedforward import save_sparse, sparsify
    from subquad.inference.pretrained import load

    if tokens < context or context < 2:
        raise ValueError(f"tokens must be at least context, and context at least 2; got {tokens} and {context}")
    if save is not None:
        refuse_existing(save)
    lm, tokenizer = load(model)
    text = tasks.text_files(data).tokenized(tokenizer)
    windows = [batch.inputs for batch in text.eval_windows("test", context, tokens // context, batch_size=4)]
    result = neuron_use(lm, windows, percent)
    console.print(result)
    console.print(f"figures and curve: {result.write(out).resolve()}", soft_wrap=True)
    if save is not None:
        sparsify(lm, result.found.thresholds.by_neuron)
        save_sparse(lm, save)
        tokenizer.save_pretrained(save)
        console.print(f"the model with its thresholds: {save.resolve()}", soft_wrap=True)


@app.command()
@answers_errors
def rectify(
    model: Annotated[str, typer.Argument(help="A causal language model: a Hugging Face folder or a GGUF file.")],
    reward: Annotated[Path, typer.Option(help="Python file with reward(text) -> a number from -1, undesired, to 0.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line; the last fifth is kept for the test.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the value model; it must not exist.")],
    continuations: Annotated[int, typer.Option(help="Texts per prompt.")] = 25,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each text after its prompt.")] = 20,
    steps: Annotated[int, typer.Option(help="Training steps of the value model.")] = 500,
    width: Annotated[int, typer.Option(help="Width of the value model, a recurrent network.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of the value model's training.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of sampling and training.")] = 0,
) -> None:
    """Learn which next tokens lead to undesired texts, and show what avoiding them costs.

    Example: `subquad rectify models/llama --reward polite.py --prompts prompts.txt -o models/polite`
    """
    import runpy

    from subquad.inference import pretrained, rectification

    refuse_existing(out)
    if not reward.is_file():
        raise ValueError(f"{reward} is no file; give a Python file that defines reward(text)")
    function = runpy.run_path(str(reward)).get("reward")
    if not callable(function):
        raise ValueError(f"{reward} defines no function reward(text)")
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    lm, tokenizer = pretrained.load(model)
    value, rows = rectification.learn_and_measure(
        lm,
        tokenizer,
        function,
        lines,
        continuations=continuations,
        max_new_tokens=max_new_tokens,
        steps=steps,
        width=width,
        learning_rate=learning_rate,
        seed=seed,
        console=errors,
    )
    value.save_pretrained(out)
    table = Table("epsilon", "undesired texts", "mean reward", "KL to the model, per text")
    for row in rows:
        name = "the model alone" if row.epsilon is None else f"{row.epsilon:g}"
        table.add_row(name, f"{row.undesired:.1%}", f"{row.reward:.3f}", f"{row.divergence:.3f}")
    console.print(table)
    console.print(f"the value model: {out.resolve()}; see docs/rectify.md for how to generate with it", soft_wrap=True)
