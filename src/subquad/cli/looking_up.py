"""Commands that say what there is: the catalog of systems, and what works on this machine."""

import itertools
from typing import Annotated

import typer
from rich.table import Table

from subquad.cli.application import answers_errors, app, catalog_app, console, escape


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
    console.print(f"[bold]{row.name}[/]{number}: {escape(row.title)}")
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

        console.print(escape(str(optimize(skeleton(model), dry_run=True))), highlight=False)
        return

    from subquad.bench import doctor as report

    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    findings = report.environment()
    for finding in findings:
        console.print(f"[{colours[finding.state]}]{finding.state:>8}[/]  {finding.subject}: {escape(finding.text)}")
    if compile:
        console.print("building and testing the CPU kernels (a few minutes the first time):")
    else:
        console.print("testing the kernels:")
    for finding, seconds in itertools.chain(report.self_test(), report.step_test() if compile else ()):
        findings.append(finding)
        line = f"[{colours[finding.state]}]{finding.state:>8}[/]  {finding.subject}: {escape(finding.text)}"
        console.print(f"{line}, {seconds:.1f} s")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)
