"""The step that made a loss or a weight NaN or Inf, as a file, and its replay: term and layer.

The file is safetensors: the weights before the step, its batches, and a JSON header with the
configuration, the step, and the key (seed, step, rank) of which every random number is made. It
holds no code. The teacher is named, not stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._files import replacing
from . import config as configuration
from . import data, preflight
from .cache.read import CachedTeacher
from .checkpoint import CheckpointError
from .runtime import Runtime
from .task import DistillationTask

NAME = "nonfinite.safetensors"
_METADATA, _VERSION = "vitkd_fast.nonfinite", 1


class Header(NamedTuple):
    """What of a step is not a tensor."""

    title: str  # of the run
    what: str  # is not finite
    config: dict[str, Any]  # with models as `preflight` builds them
    classes: list[str]
    seed: int
    step: int
    rank: int
    total: int  # steps of the run
    lr: float
    scale: float  # of the loss: float16's
    student_dtype: str
    teacher_dtype: str
    epoch: int = 0


def save(
    path: Path,
    header: Header,
    modules: Mapping[str, Mapping[str, Tensor]],
    batches: Sequence[data.Batch],
) -> None:
    """Writes state dicts (`student`, `losses`) and batches, atomically."""
    tensors = {f"{name}.{key}": x for name, state in modules.items() for key, x in state.items()}
    for i, batch in enumerate(batches):
        tensors |= {f"images.{i}": batch.images, f"labels.{i}": batch.labels}
        tensors[f"indices.{i}"] = batch.indices
    layout = torch.contiguous_format  # safetensors takes no other
    tensors = {k: x.detach().cpu().clone(memory_format=layout) for k, x in tensors.items()}
    text = json.dumps({"version": _VERSION, **header._asdict()})
    with replacing(path) as part:
        save_file(tensors, part, metadata={_METADATA: text})


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and tensors that `save` wrote.

    Raises:
        CheckpointError: the file is damaged, or not by `save`.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a step of `vitkd distill`: {error}") from error
    if not isinstance(header, dict) or header.pop("version", None) != _VERSION:
        raise CheckpointError(f"{path}: expected a step of `vitkd distill`, version {_VERSION}")
    return Header(**header), tensors


class Statistics(NamedTuple):
    """Of the finite numbers of a tensor; NaN where there are none."""

    min: float
    max: float
    mean: float
    share: float  # of the others, NaN and Inf

    @classmethod
    def of(cls, *tensors: Tensor) -> Statistics:
        flat = torch.cat([x.detach().flatten().double() for x in tensors])
        kept = flat[flat.isfinite()]
        if not kept.numel():
            return cls(*3 * (float("nan"),), float(flat.numel() > 0))
        low, high = kept.aminmax()
        share = 1 - kept.numel() / flat.numel()
        return cls(low.item(), high.item(), kept.mean().item(), share)


class Layer(NamedTuple):
    """The first of a model to make NaN or Inf of an input without."""

    name: str
    kind: str
    shape: list[int]  # of its output, or of a part of it
    output: Statistics


@dataclass
class Replay:
    """A step taken again; the dictionaries are in the order of computation."""

    header: Header
    terms: dict[str, float]  # of the first batch with one that is not finite, else of the last
    weights: list[str] = field(default_factory=list)  # not finite before the step
    layers: dict[str, Layer | None] = field(default_factory=dict)  # by model
    statistics: dict[str, Statistics] = field(default_factory=dict)
    gradient: str = ""  # the first weight, from the loss on, whose gradient is not finite

    def __str__(self) -> str:
        head = self.header
        lines = [
            f"{head.title}: step {head.step} of {head.total}, seed {head.seed}, learning rate "
            f"{head.lr:.3g}: {head.what}",
            *(
                f"term {name}: {value:.6g}{'' if _finite(value) else ' is not finite'}"
                for name, value in self.terms.items()
            ),
        ]
        if self.weights:
            few = ", ".join(self.weights[:3]) + ", ..." * (len(self.weights) > 3)
            lines.append(f"weights that were not finite before the step: {few}")
        for model, layer in self.layers.items():
            if layer is None:
                lines.append(f"{model}: every layer's output is finite")
                continue
            lines.append(
                f"{model}: first layer whose output is not finite: {layer.name} ({layer.kind}), "
                f"{layer.output.share:.1%} of {layer.shape}"
            )
        lines.append(
            f"gradient: the first that is not finite, from the loss on, is of {self.gradient}"
            if self.gradient
            else "gradient: of every weight finite"
        )
        width = max(map(len, self.statistics))
        lines.append(f"{'':{width}} {'min':>10} {'max':>10} {'mean':>10} {'not finite':>10}")
        for name, of in self.statistics.items():
            numbers = "".join(f" {x:10.3g}" for x in of[:3])
            lines.append(f"{name:{width}}{numbers} {of.share:10.1%}")
        return "\n".join(lines)


def replay(path: Path, device: str = "") -> Replay:
    """Takes the step of a file again, and watches every layer and gradient.

    Args:
        path: a file of a run that stopped.
        device: where; the GPU where there is one.

    Raises:
        CheckpointError: the file is damaged, or of other models.
        ConfigError, ValueError: the teacher that it names cannot be loaded.
    """
    header, tensors = read(path)
    config = configuration.validate(header.config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"device": device})})
    runtime = dataclasses.replace(
        Runtime.of(config),
        student_dtype=getattr(torch, header.student_dtype),
        teacher_dtype=getattr(torch, header.teacher_dtype),
    )
    student = preflight.create_student(config, header.classes)
    cache = CachedTeacher(config.teacher.cache) if config.teacher.cache else None
    teachers = [] if cache else preflight.create_teachers(config, header.classes)
    task = DistillationTask.create(config, student, teachers, runtime, cache)
    learned = task.trainable_module.learned
    for name, module in (("student", task.student), ("losses", learned)):
        state = {k.removeprefix(f"{name}."): x for k, x in tensors.items() if _is_of(k, name)}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path}: does not fit its configuration: {why}") from error
    names = [*task.student.named_parameters(), *learned.named_parameters("losses")]
    found = Replay(header, {}, [name for name, x in names if not x.isfinite().all()])
    mixer = data.Mixer(config.augmentation) if config.augmentation.mixes else None
    task.train()
    data.seed_all(header.seed, header.step, header.rank)
    batches = sum(key.startswith("images.") for key in tensors)
    watched = {"student": task.student}
    names_of = [] if cache else list(config.all_teachers())
    for name, predictor in zip(names_of, task.teachers, strict=True):
        assert isinstance(predictor, nn.Sequential)
        watched[name] = predictor[1]
    for i in range(batches):
        images = tensors[f"images.{i}"].contiguous(memory_format=torch.channels_last)
        cached = None
        if cache:
            ids = tensors[f"indices.{i}"]
            cached = task.cached_outputs(data.Batch(images, ids, ids, []), header.epoch)
        images = images.to(runtime.device)
        labels: Any = tensors[f"labels.{i}"].to(runtime.device)
        if mixer:
            images, labels = mixer(images.float(), labels)
        found.statistics = {"images": Statistics.of(images)}
        with _watching(watched, found), _watching_gradients(names, found):
            result = task(images, labels, header.step / header.total, cached)
            (header.scale * result["loss"] / batches).backward()
        values = result["terms"].tolist()
        found.terms = dict(zip(task.trainable_module.terms, values, strict=True))
        if not all(map(_finite, found.terms.values())) or found.gradient:
            break
    gradients = [x.grad for _, x in names if x.grad is not None]
    found.statistics["gradient of all weights"] = Statistics.of(*gradients)
    return found


def _finite(x: float) -> bool:
    return abs(x) < float("inf")


def _is_of(key: str, name: str) -> bool:
    return key.startswith(f"{name}.")


@contextmanager
def _watching(watched: Mapping[str, nn.Module], found: Replay) -> Iterator[None]:
    """Finds each model's first bad layer; keeps statistics of stages and logits, and gradients."""
    handles: list[Any] = []
    # the modules that are being called, and whether their inputs were finite
    calls: list[tuple[str, nn.Module, bool]] = []

    def watch(model: str, name: str, shown: bool, module: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((name, module, _all_finite(_tensors((args, kwargs)))))

        def leave(_: nn.Module, args: tuple, output: Any) -> None:
            tensors = _tensors(output)
            if shown:
                found.statistics[f"{model} {name}"] = Statistics.of(*tensors)
                for x in tensors:
                    if x.requires_grad:
                        x.register_hook(keep)
            if found.layers[model] is None and not _all_finite(tensors):
                # where a part was given NaN or Inf already, it is what encloses it that made them
                place, made = next((call[:2] for call in calls[::-1] if call[2]), calls[-1][:2])
                found.layers[model] = Layer(
                    place, type(made).__name__, list(tensors[0].shape), Statistics.of(*tensors)
                )
            calls.pop()

        def keep(gradient: Tensor) -> None:
            found.statistics[f"gradient of {model} {name}"] = Statistics.of(gradient)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    for model, root in watched.items():
        found.layers[model] = None
        stages = {entry["module"] for entry in getattr(root, "feature_info", ())}
        for name, module in root.named_modules():
            watch(model, name or "logits", not name or name in stages, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_gradients(
    parameters: Sequence[tuple[str, nn.Parameter]], found: Replay
) -> Iterator[None]:
    """Finds the first bad gradient of a weight, in the order in which they are computed."""

    def watch(name: str, parameter: nn.Parameter) -> Any:
        def look(x: Tensor) -> None:
            if not found.gradient and x.grad is not None and not x.grad.isfinite().all():
                found.gradient = name

        return parameter.register_post_accumulate_grad_hook(look)

    handles = [watch(name, x) for name, x in parameters if x.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)
