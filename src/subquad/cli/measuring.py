"""Commands that measure: mixers on your text, papers' claims, ops, mixers as linear systems."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from subquad.cli.application import (
    COUNTS,
    answers_errors,
    app,
    causal_mixers,
    console,
    errors,
    escape,
    list_of,
    quantity,
)


@app.command()
@answers_errors
def compare(
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="A text file, a folder or a JSONL file; may be given several times."),
    ] = None,
    mixers: Annotated[
        str, typer.Option(help="Names with commas between, or 'all' that have a causal form.")
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
            causal_mixers(mixers),
            hybrids=hybrid or (),
            context=context,
            budget=None if budget is None else quantity(budget, {"s": 1, "m": 60, "h": 3600}, "90s, 20m or 2h"),
            tokens=None if tokens is None else int(quantity(tokens, COUNTS, "500k or 2M")),
            parameters=int(quantity(params, COUNTS, "500k or 2M")),
            seeds=tuple(range(seeds)),
            learning_rates=list_of(learning_rates, float),
            out=out,
            resume=not fresh,
            progress=errors,
            **({} if contexts is None else {"contexts": list_of(contexts, int)}),
        )
    console.print(result.table())
    for statement in result.verdict:
        console.print(str(statement), highlight=False)
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)


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
        list_of(seeds, int),
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
        names or None, list_of(lengths, int), heads=heads, width=width, threads=threads, device=device
    ):
        direction = "forward + backward" if timing.backward else "forward"
        ratio = "not run" if timing.ratio is None else f"{timing.ratio:.1f}"
        table.add_row(timing.op, f"{timing.time:,}", direction, f"{1e3 * timing.seconds:.2f}", ratio)
    console.print(table)


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
        analysis = systems.analyze_mixers(causal_mixers(mixers), dim=dim, num_heads=heads, tokens=tokens)
    else:
        from subquad.models import SubquadForCausalLM

        if not Path(str(model)).is_dir():
            raise ValueError(f"{model} is no folder; give the folder that holds config.json and the weights")
        text = tasks.text_files(data) if data else tasks.source_text("tiny")
        windows = next(iter(text.eval_windows("test", tokens, limit=2)))
        analysis = systems.analyze_model(SubquadForCausalLM.from_pretrained(model), windows.inputs)
    console.print(analysis.table())
    for name, reason in analysis.refused.items():
        console.print(f"[yellow]left out[/]  {escape(name)}: {escape(reason)}", highlight=False)
    if not analysis.parts:
        raise ValueError("none of these is a linear system")
    console.print(f"report: {analysis.write(out).resolve()}", soft_wrap=True)
