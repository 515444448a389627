"""`vitkd select`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def select(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE",
            help="As of `vitkd distill`: what all candidates share.",
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            help="What may be chosen, two or more, the simplest first; a recipe or a .yaml file "
            "may stand before its keys.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Trials, caches and report.html."),
    ] = Path("select"),
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=[VALUE,...]",
            help="A hyper-parameter, to see whether the choice depends on it; may be repeated.",
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=2, help="Splits, at most.")] = 100,
    least: Annotated[int, typer.Option(min=2, help="Splits, at least, and for --vary.")] = 5,
    share: Annotated[float, typer.Option(help="Of the images, which a split tests on.")] = 0.2,
    alpha: Annotated[
        float, typer.Option(help="The chance of a stable choice that is none, or of a false p.")
    ] = 0.05,
    margin: Annotated[
        float, typer.Option(min=0, help="A difference of scores that does not matter.")
    ] = 0.005,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, weights and order.")] = 0,
    cache: Annotated[
        bool, typer.Option(help="Ask a teacher once about the images of all trials.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Choose a student, or a loss, by repeated splits of the training images.

    Example: vitkd select mine.yaml -o select --candidate "ce:losses={ce: {}},teacher={}"
    --candidate "kd:losses={kd: {temperature: 4}}" --vary losses.kd.temperature=[1,4,8]

    It stops by itself, once more splits would not choose another. The same command goes on after an
    interruption; with more candidates, it trains only those. Validation images are not looked at.
    """
    from .._extras import require
    from .._files import finite

    require("select", "vitkd select")
    for name, value, top in (("--share", share, 1), ("--alpha", alpha, 0.5)):
        if not 0 < value < top:
            raise typer.BadParameter(
                f"{name}: expected more than 0 and less than {top}, got {value}"
            )
    if least > most:
        raise typer.BadParameter(f"--least: expected at most --most, {most}, got {least}")

    from . import candidates, report, run

    overrides = list(arguments or ())
    source = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    found = run.select(
        candidates.parse(source, overrides, candidate or ()),
        output,
        varied=candidates.parse_varied(vary or ()),
        most=most,
        least=least,
        share=share,
        alpha=alpha,
        margin=margin,
        seed=seed,
        cache=cache,
        tell=lambda what: print(f"select: {what}", file=sys.stderr, flush=True),
    )
    page = report.write(found, output)
    if as_json:
        print(json.dumps(finite(found), allow_nan=False, ensure_ascii=False, indent=2))
        return
    print(report.table(found))
    for sentence in report.verdict(found):
        print(sentence)
    print(f"report: {page}")
