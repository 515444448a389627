"""`vitkd search`."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..predict_command import Engine


class Sampler(str, Enum):
    """Who draws candidates: Optuna's samplers."""

    tpe = "tpe"
    nsga2 = "nsga2"
    random = "random"


def search(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE",
            help="As of `vitkd distill`: teacher, images, and the length of full training.",
        ),
    ],
    latency_ms: Annotated[
        float, typer.Option(help="Of an image, at most; slower candidates are not trained.")
    ],
    device: Annotated[
        str,
        typer.Option(
            metavar="int8:threads=N|FILE.json",
            help="Where: the int8 engine here, or a machine by what `vitkd profile --json` "
            "printed there.",
        ),
    ] = "int8:threads=1",
    memory_mb: Annotated[
        float | None, typer.Option(help="Of the engine, at most: weights and working memory.")
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Candidates within the bounds to train, or begin to.")
    ] = 40,
    cpu_hours: Annotated[
        float | None, typer.Option(help="Of training, after which no other trial begins.")
    ] = None,
    space: Annotated[
        str, typer.Option(metavar="NAME|FILE.yaml", help="What candidates are drawn from.")
    ] = "default",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where all of it is written.")
    ] = Path("search"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in DIR.")] = False,
    sampler: Annotated[Sampler, typer.Option(help="Who draws candidates.")] = Sampler.tpe,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto", help="Search for the best at every latency, not for the most accurate."
        ),
    ] = False,
    flash: Annotated[
        float,
        typer.Option(min=0, max=0.5, help="Share of the steps after which one is judged; 0: none."),
    ] = 0.08,
    trust: Annotated[
        float,
        typer.Option(help="Rank correlation with full training from which on judgements decide."),
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    engine: Annotated[
        Engine, typer.Option(help="Who trains: this process, or a Ray cluster's.")
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray; the default is all CPUs but one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Search for the best student within a latency, and write a report and a recipe of each point.

    Example: vitkd search digits --space digits --latency-ms 0.1 --trials 20 -o runs/search, then
    vitkd distill runs/search/recipes/0-mobilenetv2_035.yaml

    For another machine: vitkd profile student.int8.safetensors --json > pi.json there, and here
    vitkd search mine.yaml --latency-ms 20 --device pi.json

    Several machines: RAY_ADDRESS=head:6379 vitkd search mine.yaml --latency-ms 3 -o /shared/search
    --engine ray
    """
    from .._extras import require

    require("search", "vitkd search")
    if engine is Engine.ray:
        require("ray", "vitkd search --engine ray")
    elif workers:
        raise typer.BadParameter("--workers: only with --engine ray")
    from ..distill import config
    from ..distill.config import ConfigError
    from . import report, study
    from . import space as space_

    if not latency_ms > 0 or (memory_mb is not None and not memory_mb > 0):
        raise typer.BadParameter("--latency-ms and --memory-mb: expected more than 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("expected one process, got torchrun's")
    overrides = list(arguments)
    source = overrides.pop(0) if "=" not in overrides[0] else None
    recipe, drawn = config.load(source, overrides), space_.load(space)
    if (output / study.FILE).exists() and not resume:
        raise ConfigError(f"-o: {output} holds a study; --resume goes on with it, or name another")
    settings = study.Settings(
        device, latency_ms, memory_mb, sampler.value, pareto, flash, trust, seed
    )

    def tell(line: str) -> None:
        typer.echo(f"search: {line}", err=True)

    cpu_seconds = None if cpu_hours is None else 3600 * cpu_hours
    with study.Search(recipe, drawn, output, settings, tell) as found:
        if engine is Engine.ray:
            from . import cluster

            cluster.run(found, trials, cpu_seconds, workers)
        else:
            found.run(trials, cpu_seconds)
        page = report.write(found)
    results = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
        return
    print(report.table(results))
    for sentence in [*report.verdict(results), *results["notes"]]:
        print(sentence)
    print(f"report: {page}")
