"""The command line. Every command is a call that can be made from Python; here arguments are read and results shown."""

import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Sequence models whose cost does not grow with the square of their input: train, run and compare them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
catalog_app = typer.Typer(help="What the library holds: 70 systems and what they stand on.", no_args_is_help=True)
app.add_typer(catalog_app, name="catalog")
console, errors = Console(), Console(stderr=True)

DataPaths = Annotated[
    list[Path],
    typer.Option("--data", help="A text file, a folder of them, or a JSONL file; may be given several times."),
]


def answers_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong input is answered with its sentence and exit code 2; ``SUBQUAD_DEBUG=1`` shows where it was raised."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ArithmeticError, ImportError) as error:
            if os.environ.get("SUBQUAD_DEBUG") == "1":
                raise
            errors.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error

    return run


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _list_of(text: str, kind: type = str) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"a list of {kind.__name__} with commas between is needed; got {text!r}") from error


def _causal_mixers(text: str) -> list[str]:
    """Names with commas between, or for 'all' every mixer that a causal language model can be made of."""
    from subquad.mixers import Pattern, available

    if text.strip() != "all":
        return _list_of(text)
    causal = available(Pattern.CAUSAL_SELF)
    others = [name for name in available() if name not in causal]
    if others:
        errors.print(f"left out, without a causal form: {', '.join(others)}", highlight=False)
    return causal


@app.command()
@answers_errors
def compare(
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="A text file, a folder or a JSONL file; may be given several times."),
    ] = None,
    mixers: Annotated[
        str, typer.Option(help="Names with commas between, or 'all'.")
    ] = "softmax,gla,delta_net,retention",
    hybrid: Annotated[
        list[str] | None, typer.Option(help="A pattern over the layers, such as 'gla*3+softmax'.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens (bytes) per training row.")] = 512,
    budget: Annotated[str | None, typer.Option(help="Time of the whole command: 90s, 20m, 2h.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Training tokens of every model, instead of a budget: 500k, 2M.")
    ] = None,
    params: Annotated[str, typer.Option(help="Parameters of every model, matched within 2%: 500k, 2M.")] = "2M",
    seeds: Annotated[int, typer.Option(help="Models per mixer; two or more show what is chance.")] = 2,
    contexts: Annotated[str | None, typer.Option(help="Lengths at which speed and memory are measured.")] = None,
    learning_rates: Annotated[str, typer.Option(help="Tried on the first seed, the same for all.")] = "1e-3,3e-3,1e-2",
    out: Annotated[Path, typer.Option(help="Folder for report.html, results and plots.")] = Path("comparison"),
    demo: Annotated[
        bool, typer.Option("--demo", help="Four mixers on Python's own sources, under five minutes.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse a folder that holds an earlier comparison.")] = False,
) -> None:
    """Which mixer serves your text at your length? Trains one model per mixer, measures all, writes a report.

    Example: `subquad compare --data my.txt --mixers softmax,gla,delta_net --budget 20m --out comparison`
    """
    from subquad import bench, tasks

    if demo:
        if data:
            raise ValueError("--demo brings its own text; leave out --data, or leave out --demo")
        result = bench.run_comparison(
            tasks.source_text("standard"), bench.CompareSettings.demo(), out=out, resume=not fresh, progress=errors
        )
    else:
        if not data:
            raise ValueError("give your text with --data PATH, or --demo for Python's own sources")
        result = bench.compare(
            data,
            _causal_mixers(mixers),
            hybrids=hybrid or (),
            context=context,
            budget=None if budget is None else _quantity(budget, {"s": 1, "m": 60, "h": 3600}, "90s, 20m or 2h"),
            tokens=None if tokens is None else int(_quantity(tokens, COUNTS, "500k or 2M")),
            parameters=int(_quantity(params, COUNTS, "500k or 2M")),
            seeds=tuple(range(seeds)),
            learning_rates=_list_of(learning_rates, float),
            out=out,
            resume=not fresh,
            progress=errors,
            **({} if contexts is None else {"contexts": _list_of(contexts, int)}),
        )
    console.print(result.table())
    for statement in result.verdict:
        console.print(str(statement), highlight=False)
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)


COUNTS = {"k": 1e3, "K": 1e3, "M": 1e6, "m": 1e6, "": 1}


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    """A number with a unit behind it; a bare number is in the smallest unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2] if match else None
    if match is None or (unit not in units and unit != ""):
        raise ValueError(f"cannot read {text!r}; give a number and a unit, as in {example}")
    return float(match[1]) * units.get(unit or "", 1)


@app.command()
@answers_errors
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Numbers, slugs or names of papers.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All claims, going on past failures.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between.")] = "0,1",
    write: Annotated[Path | None, typer.Option(help="JSON file that takes the results.")] = None,
) -> None:
    """Does the paper's claim hold? Re-runs it small, with the paper's baseline; exit code 0 only if it does.

    Example: `subquad claims 06 --seeds 0,1`
    """
    from subquad.claims import available, run_claims

    if not names and not everything:
        console.print("There are:")
        for slug in available():
            console.print(f"  {slug}", highlight=False)
        console.print("Run one with `subquad claims NAME`, all with `subquad claims --all`.")
        return
    results = run_claims(
        None if everything else names,
        _list_of(seeds, int),
        write=write,
        progress=lambda line: errors.print(line, style="dim", highlight=False),
        finished=console.print,
    )
    if not all(result.reproduced for result in results):
        raise typer.Exit(1)


@app.command()
@answers_errors
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Ops; all if none is named.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "512,2048,8192",
    heads: Annotated[int, typer.Option(help="Number of heads.")] = 8,
    width: Annotated[int, typer.Option(help="Width of keys and values.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads; as many as torch has by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time ops on this machine beside torch's causal attention, forward and with backward.

    Example: `subquad bench gla delta_rule --lengths 2048,8192 --threads 1`
    """
    from subquad.bench.kernels import kernel_timings

    table = Table("Op", "Tokens", "Direction", "ms", "times faster than torch's attention")
    errors.print("kernels are compiled at first use, which is not timed", style="dim")
    for timing in kernel_timings(
        names or None, _list_of(lengths, int), heads=heads, width=width, threads=threads, device=device
    ):
        direction = "forward + backward" if timing.backward else "forward"
        ratio = "not run" if timing.ratio is None else f"{timing.ratio:.1f}"
        table.add_row(timing.op, f"{timing.time:,}", direction, f"{1e3 * timing.seconds:.2f}", ratio)
    console.print(table)


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
    chosen = layers if layers == "all" or ":" in layers else _list_of(layers, int)
    settings = conversion.ConvertSettings(
        context=context,
        batch_size=batch_size,
        transfer_steps=transfer_steps,
        adapt_steps=steps,
        transfer_learning_rate=transfer_learning_rate,
        learning_rate=learning_rate,
        seed=seed,
        contexts=tuple(_list_of(contexts, int)),
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
            errors.print(_escape(str(plan)), style="dim", highlight=False)
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
def analyze(
    model: Annotated[str | None, typer.Argument(help="Folder of a trained Subquad model; or give --mixers.")] = None,
    mixers: Annotated[str | None, typer.Option(help="Untrained mixers: names with commas between, or 'all'.")] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="Text that the model reads.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are looked at, at most 1024.")] = 128,
    dim: Annotated[int, typer.Option(help="Width of untrained mixers.")] = 64,
    heads: Annotated[int, typer.Option(help="Heads of untrained mixers.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for analysis.html, its plots and figures.")] = Path("analysis"),
) -> None:
    """Write mixers as linear systems (L, B, C, D), rebuild their outputs, and lay state, decay and memory side by side.

    Example: `subquad analyze --mixers softmax,gla,delta_net,mamba --out analysis`
    """
    from subquad import tasks
    from subquad.bench import systems

    if (model is None) == (mixers is None):
        raise ValueError("give a model's folder, or --mixers with names (or 'all')")
    if mixers is not None:
        if data:
            raise ValueError("--data is what a model reads; untrained mixers look at noise")
        analysis = systems.analyze_mixers(_causal_mixers(mixers), dim=dim, num_heads=heads, tokens=tokens)
    else:
        from subquad.models import SubquadForCausalLM

        if not Path(str(model)).is_dir():
            raise ValueError(f"{model} is no folder; give the folder that holds config.json and the weights")
        text = tasks.text_files(data) if data else tasks.source_text("tiny")
        windows = next(iter(text.eval_windows("test", tokens, limit=2)))
        analysis = systems.analyze_model(SubquadForCausalLM.from_pretrained(model), windows.inputs)
    console.print(analysis.table())
    for name, reason in analysis.refused.items():
        console.print(f"[yellow]left out[/]  {_escape(name)}: {_escape(reason)}", highlight=False)
    if not analysis.parts:
        raise ValueError("none of these is a linear system")
    console.print(f"report: {analysis.write(out).resolve()}", soft_wrap=True)


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from subquad import tasks
    from subquad.bench.neuron_use import neuron_use
    from subquad.compress.sparse_feedforward import save_sparse, sparsify

    if not Path(model).is_dir():
        raise ValueError(f"{model} is no folder; give the folder that holds config.json and the weights")
    if tokens < context or context < 2:
        raise ValueError(f"tokens must be at least context, and context at least 2; got {tokens} and {context}")
    if save is not None and save.exists():
        raise ValueError(f"{save} exists already: name a folder that does not, or remove it")
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
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


@catalog_app.command("list")
@answers_errors
def catalog_list(
    built: Annotated[bool, typer.Option("--built", help="Only what is built.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only rows whose kind contains this word.")] = None,
) -> None:
    """List the systems.

    Example: `subquad catalog list --built`
    """
    from subquad.catalog import ROWS

    table = Table("No.", "Name", "Kind", "Public names", "State")
    for row in ROWS:
        if (built and row.state != "built") or (kind and kind not in row.kind):
            continue
        names = ", ".join(name for floor in row.names.values() for name in floor)
        table.add_row("" if row.number is None else str(row.number), row.name, row.kind, names, row.state)
    console.print(table)


@catalog_app.command("show")
@answers_errors
def catalog_show(name: Annotated[str, typer.Argument(help="Number, slug or public name.")]) -> None:
    """Show one system: its paper, public names, patterns, backends and state.

    Example: `subquad catalog show gla`
    """
    from subquad.catalog import ROWS, row_of
    from subquad.layers.registry import unknown_name

    row = row_of(name)
    if row is None:
        public = [public for r in ROWS for floor in r.names.values() for public in floor]
        raise unknown_name("system", name, {*[r.slug for r in ROWS], *public})
    number = "" if row.number is None else f" (number {row.number})"
    console.print(f"[bold]{row.name}[/]{number}: {_escape(row.title)}")
    console.print(f"kind      {row.kind}\nstate     {row.state}")
    for floor, names in row.names.items():
        for public, entry in names.items():
            console.print(f"{floor:<13} {public} = {entry.path}", highlight=False)
    if row.patterns:
        console.print(f"patterns  {', '.join(row.patterns)}\nbackends  {', '.join(row.backends)}")
    if row.claim:
        console.print(f"claim     subquad claims {row.number:02d}")


@app.command()
@answers_errors
def doctor(
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Build every CPU kernel now, one-token kernels too, so that nothing compiles later."
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Only say what subquad.optimize would change in this folder or GGUF file.")
    ] = None,
) -> None:
    """Say what works here: packages, backends, threads, BLAS, and every kernel against its definition.

    Example: `subquad doctor --compile`
    """
    if model is not None:
        from subquad.inference.optimize import optimize
        from subquad.inference.pretrained import skeleton

        console.print(_escape(str(optimize(skeleton(model), dry_run=True))), highlight=False)
        return

    from subquad.bench import doctor as report

    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    findings = report.environment()
    for finding in findings:
        console.print(f"[{colours[finding.state]}]{finding.state:>8}[/]  {finding.subject}: {_escape(finding.text)}")
    if compile:
        console.print("building and testing the CPU kernels (a few minutes the first time):")
    else:
        console.print("testing the kernels:")
    for finding, seconds in itertools.chain(report.self_test(), report.step_test() if compile else ()):
        findings.append(finding)
        line = f"[{colours[finding.state]}]{finding.state:>8}[/]  {finding.subject}: {_escape(finding.text)}"
        console.print(f"{line}, {seconds:.1f} s")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """The entry point of the ``subquad`` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()


if __name__ == "__main__":
    sys.exit(main())
