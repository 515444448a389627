"""`vitkd audit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..distill.pack_command import SkipBad
from ..predict_command import MODEL, MODEL_OR_INT8, Threads


def audit(
    teacher: Annotated[str, typer.Argument(help=MODEL)],
    student: Annotated[str, typer.Argument(help=MODEL_OR_INT8)],
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of class folders, or its packed file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where audit.html is written.")
    ] = Path("audit"),
    groups: Annotated[
        str,
        typer.Option(
            metavar="FILE.csv|folders",
            help="Who else may be harmed: a file with lines image,group, or the folder in which an "
            "image lies below its class folder.",
        ),
    ] = "",
    store: Annotated[
        bool,
        typer.Option("--store", help="Write the student's temperature into its int8 file."),
    ] = False,
    robustness_images: Annotated[
        int, typer.Option(min=0, help="Images that are corrupted and augmented; 0: none.")
    ] = 500,
    severities: Annotated[
        str, typer.Option(help="Of the corruptions, as in ImageNet-C: some of 1 to 5.")
    ] = "1,3,5",
    attention_images: Annotated[
        int, typer.Option(min=0, help="Images on which it is compared where both look; 0: none.")
    ] = 64,
    alpha: Annotated[
        float, typer.Option(help="Of a family of tests, the chance of one false accusation.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of noise and resamples.")] = 0,
    cost: Annotated[bool, typer.Option(help="Measure time, memory and energy.")] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure what a student lost beside its teacher: who is harmed, how sure it is, what flips it.

    Example: vitkd audit teacher.safetensors student.int8.safetensors images/val -o audit

    Groups: vitkd audit teacher.safetensors student.safetensors images/val --groups groups.csv
    """
    from .._extras import require
    from .._files import finite
    from .._opened import is_int8

    require("audit", "vitkd audit")
    if store and not is_int8(student):
        raise typer.BadParameter(f"--store: STUDENT: expected an int8 file, got {student}")
    if not output.parent.is_dir() or output.is_file():
        why = "is a file" if output.is_file() else "is in no folder that is there"
        raise typer.BadParameter(f"-o: {output} {why}")
    if not 0 < alpha < 0.5:
        raise typer.BadParameter(f"--alpha: expected more than 0 and less than 0.5, got {alpha}")
    chosen = [x.strip() for x in severities.split(",")]
    if not set(chosen) <= set("12345"):
        raise typer.BadParameter(f"--severities: expected some of 1,2,3,4,5, got {severities}")

    from . import report, run

    found = run.audit(
        teacher,
        student,
        folder,
        groups=groups,
        store=store,
        robustness_images=robustness_images,
        severities=[int(x) for x in chosen],
        attention_images=attention_images,
        alpha=alpha,
        seed=seed,
        batch_size=batch_size,
        threads=threads,
        skip_bad=skip_bad,
        measure_cost=cost,
        tell=lambda what: print(f"audit: {what}", file=sys.stderr, flush=True),
    )
    page = report.write(found, output)
    if as_json:
        print(json.dumps(finite(found), allow_nan=False, ensure_ascii=False, indent=2))
        return
    print(report.table(found))
    for sentence in [*report.verdict(found), *found["notes"]]:
        print(sentence)
    print(f"report: {page}")
