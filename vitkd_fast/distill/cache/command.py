"""`vitkd cache`: what of it needs torch is imported when it runs."""

import os
from enum import Enum
from typing import Annotated, Any

import typer

from .store import CacheError


class Engine(str, Enum):
    """Whose processes make a cache."""

    local = "local"
    ray = "ray"


class FeatureType(str, Enum):
    """How a cache keeps features."""

    float16 = "float16"
    int8 = "int8"


def cache(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE...|verify DIR",
            help="The configuration of the run to come, and keys to override; or verify and a "
            "cache.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DIR|URL", help="The cache to make: a folder, s3://, gs://."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of augmentations to keep; the default is run.epochs."),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(min=1, help="Classes to keep of each image; the default is all."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(metavar="pooled|patch:BLOCK", help="Features to keep; may be repeated."),
    ] = None,
    feature_type: Annotated[
        FeatureType, typer.Option(help="Of the numbers of features.")
    ] = FeatureType.float16,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="Of losses that a cache of some classes serves; the default is "
            "losses.kd.temperature; may be repeated."
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="This process, with those of torchrun, or a Ray cluster's."),
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray; the default is all CPUs but one."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Images that verify shows to the teacher again.")
    ] = 64,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="With verify: make bad shards again.")
    ] = False,
) -> None:
    """Keep what a trained teacher says of every augmented image, for runs that name the folder.

    Example: vitkd cache mine.yaml -o cache/vit --epochs 30 --topk 50, then
    vitkd distill mine.yaml teacher.cache=cache/vit

    What is there and sound is not made again, so an interrupted cache goes on. `vitkd cache verify
    DIR` compares every checksum and asks the teacher about some images again.

    Several processes: torchrun --no-python --nproc-per-node=8 vitkd cache mine.yaml -o cache/vit

    Several machines: RAY_ADDRESS=head:6379 vitkd cache mine.yaml -o /shared/vit --engine ray
    """
    from .. import config
    from . import build

    if arguments[0] == "verify":
        _verify(arguments[1:], samples, rebuild)
        return
    if workers and engine is not Engine.ray:
        raise typer.BadParameter("--workers: only with --engine ray; torchrun starts processes too")
    if output is None:
        raise typer.BadParameter("-o: missing; name the folder of the cache")
    overrides = list(arguments)
    source = overrides.pop(0) if "=" not in overrides[0] else None
    loaded = config.load(source, overrides)
    options = build.Options(
        epochs or loaded.run.epochs,
        topk,
        list(dict.fromkeys(features or ())),
        feature_type.value,
        tuple(temperature or ()),
    )
    if engine is Engine.ray:
        from . import cluster

        _say_made(cluster.build(loaded, output, options, workers), output)
    else:
        _say_made(build.build(loaded, output, options), output)


def _say_made(made: Any, folder: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    plan = made.plan
    print(
        f"{folder}: {plan.images:,} images, {plan.epochs} epochs, {plan.record['topk']} of "
        f"{plan.record['classes']} classes, {plan.stride} bytes an image and epoch, "
        f"{plan.bytes / 1e6:,.1f} MB; shards of this process: {made.made} made, {made.kept} kept"
    )


def _verify(arguments: list[str], samples: int, rebuild: bool) -> None:
    """Prints what is wrong with a cache, and makes it again or exits with 1."""
    from . import build

    if not arguments:
        raise typer.BadParameter("verify: expected the folder of a cache")
    folder, overrides = arguments[0], arguments[1:]
    found = build.verify(folder, overrides, samples)
    count = found.plan.epochs * found.plan.shards
    print(f"{count - len(found.bad)} of {count} shards are sound")
    for line in found.bad:
        print(line)
    print(
        f"{found.asked} images shown to the teacher again: {found.equal} bit by bit as they are "
        f"there; outputs differ by at most {found.distance:.2g}"
    )
    for name in found.pixels:
        print(f"{name}: has other pixels now")
    if found.pixels or found.distance > found.allowed:
        raise CacheError(
            f"{folder}: the teacher sees or says something else now: {len(found.pixels)} of "
            f"{found.asked} images differ, and outputs by {found.distance:.2g}"
        )
    if found.bad and not rebuild:
        raise CacheError(f"{folder}: {len(found.bad)} bad shards; --rebuild makes them again")
    if found.bad:
        config, options = build.reopen(folder, overrides)
        _say_made(build.build(config, folder, options, thorough=True), folder)
