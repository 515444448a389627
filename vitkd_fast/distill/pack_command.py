"""`vitkd pack`: what of it needs torch is imported when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them.")
]


def pack(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of class folders; of --verify a FILE.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="What to write: *.pack.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="The short side of images, where it is longer.")
    ] = None,
    jpeg: Annotated[
        bool, typer.Option("--jpeg", help="Keep the files' bytes instead of their pixels.")
    ] = False,
    labels: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of several labels: the .csv or .json file in DIR."),
    ] = "",
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Without labels: images wherever they lie in DIR.")
    ] = False,
    skip_bad: SkipBad = False,
    threads: Annotated[
        int, typer.Option(min=0, max=256, help="Threads that decode; 0: one for each CPU.")
    ] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every image of a packed file; write nothing.")
    ] = False,
) -> None:
    """Put the images of a folder into one file, decoded once, from which training reads fast.

    Example: vitkd pack images/train -o train.pack --size 256

    Then data.train=train.pack, in place of the folder. Every image: vitkd pack train.pack --verify
    """
    from . import pack as packing

    if verify:
        print(f"{folder}: {packing.verify(folder):,} images, none damaged")
        return
    if output is None or output.suffix != packing.SUFFIX or output.is_dir():
        raise typer.BadParameter(f"-o: expected a name in {packing.SUFFIX}, got {output}")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o: {output.parent} is no folder")
    if (jpeg and size) or (labels and unlabelled):
        pair = "--jpeg or --size" if size else "--labels or --unlabelled"
        raise typer.BadParameter(f"expected {pair}, got both")
    chosen = packing.choose(folder, labels, unlabelled, skip_bad)
    for note in chosen.notes:
        print(note, file=sys.stderr)
    done = packing.write(
        output,
        chosen,
        size=size,
        encoded=jpeg,
        skip_bad=skip_bad,
        threads=threads or os.cpu_count() or 1,
        tell=lambda text: print(text, file=sys.stderr),
    )
    skipped = len(chosen.bad) + len(done.skipped)
    print(f"{output}: {done.images:,} images, {skipped} skipped, {done.bytes / 1e6:,.2f} MB")
