"""Teachers and students from timm: create, save and load them, and prepare their images."""

from __future__ import annotations

from ._extras import require

require("distill", __name__)

import copy
import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import clean_state_dict
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from . import _preprocessing, pruning, weights
from ._files import replacing

_METADATA, _VERSION = "vitkd_fast", 1


@dataclass(frozen=True)
class Pixels:
    """How a model wants its images: what happens between a decoded image and the tensor."""

    image_size: int  # the side of a square
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float  # evaluation resizes to image_size / crop_pct and keeps the centre

    def __post_init__(self) -> None:
        try:
            _preprocessing.check(self.mean, self.std, self.crop_pct)
        except ValueError as error:
            raise ValueError(f"Pixels: {error}") from None

    @classmethod
    def of(cls, model: nn.Module) -> Pixels:
        """What timm knows of the model, else ImageNet's; ValueError where it is not square."""
        config = resolve_data_config(model=model)
        height, width = input_size(model)
        if height != width:
            raise ValueError(f"Pixels.of: model: expected square images, got {height} x {width}")
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return cls(height, mean, std, config["interpolation"], config["crop_pct"])


def input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that the model was made for."""
    # a transformer's size is the one it was built with, which may not be its weights'
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built or resolve_data_config(model=model)["input_size"][1:]
    return height, width


class Normalize(nn.Module):
    """(x / 255 - mean) / std, as one multiply-add per pixel: x / (255 std) - mean / std.

    Of pixels in [0, 1], per channel. The arithmetic is float32, the output `dtype`. Images of
    another side than `size`, where one is given, are resized first: bicubic, antialiased.
    """

    scale: Tensor  # [1, C, 1, 1]
    shift: Tensor  # [1, C, 1, 1]

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.size = dtype, size
        scale = torch.tensor([1 / (255 * s) for s in std])
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], uint8 or floats in 0..255, in their memory format."""
        channels = self.scale.numel()
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"Normalize: x: expected [B, {channels}, H, W], got {list(x.shape)}")
        x = x.float()
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            side = (self.size, self.size)
            x = F.interpolate(x, side, mode="bicubic", antialias=True).clamp(0, 255)
        return torch.addcmul(self.shift, x, self.scale).to(self.dtype)


def predictor(
    model: nn.Module, pixels: Pixels | None = None, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """uint8 images [B, 3, H, W] -> logits: the model behind its own `Normalize`.

    Args:
        model: kept, not copied.
        pixels: whose mean and std count; None: `Pixels.of(model)`.
        dtype: of the model's parameters.
    """
    pixels = pixels or Pixels.of(model)
    resized = Origin.of(model).resized
    return nn.Sequential(Normalize(pixels.mean, pixels.std, dtype, resized), model)


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from, and what came with them; of a trained one, what began."""

    weights: str = "random"  # or "timm's NAME", the hub's name, "checkpoint PATH", "file PATH"
    new_head: str = ""  # why the classifier is random; "" where it came with the weights
    classes: tuple[str, ...] | None = None  # in the order of the logits; None: unknown
    # None where nothing came with the weights: then `Pixels.of` tells what timm's name stands for
    pixels: Pixels | None = None
    note: str = ""  # what of the file was left out
    multilabel: bool = False  # classes are not exclusive: a sigmoid of each logit
    pruned: bool = False  # layers are narrower than timm's name says
    resized: int | None = None  # the side to which `predictor` resizes images; None: it does not
    # what `create` added to the options; `save` keeps them
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """A model's by `create` or `load`; of another's, nothing is known: "unknown"."""
        return getattr(unwrap_model(model), "origin", cls("unknown"))

    @property
    def trained(self) -> bool:
        """Whether the logits mean something before any training."""
        return self.weights != "random" and not self.new_head

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.weights, self.new_head, self.note)))


def create(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    new_head: bool = False,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a timm model, in training mode; `Origin.of` it says where its weights come from.

    Args:
        name: timm's ("mobilenetv4_conv_small"), "hf-hub:org/model" or "local-dir:path", which
            come with their weights.
        num_classes: of the classifier; None keeps the model's own.
        pretrained: loads timm's weights, with a new classifier where num_classes is another.
        checkpoint: a file of weights to load instead, which timm resamples to the image size:
            .safetensors or a torch.save of them, bare or in a checkpoint of timm's or Lightning's;
            torchvision's MobileNet V2 and V3 and ViT too.
        new_head: a checkpoint of another number of classes gets a new classifier; else an error.
        image_size: that a transformer is built for; convnets only remember it for `Pixels.of`.
        options: further arguments of timm.create_model, such as drop_path_rate.

    Raises:
        ValueError: an unknown name or option, or weights that are missing, damaged, or unfit.
    """
    _check_name(name)
    given, options = _read(name, checkpoint), dict(options or {})
    if num_classes is None:
        num_classes = options.pop("num_classes", None)
    what = f"checkpoint {checkpoint}" if checkpoint else name
    # what a hub holds is named for its weights
    pretrained = not given and (pretrained or ":" in name)
    added: dict[str, Any] = {}
    if given and given.torchvision == "MobileNetV3" and "bn_eps" not in options:
        added = {"bn_eps": 0.001}  # torchvision's; timm's is 1e-5
    about = _about(given) if given and checkpoint else None
    widths = given.state if given and about and about.pruned else None
    build = partial(_build, name, image_size=image_size, options=options | added, widths=widths)
    load = partial(build, given=given, pretrained=pretrained)
    found = None  # classes of the weights, where the model's are others
    try:
        try:
            model = load(num_classes)
        except RuntimeError as error:
            found = weights.Misfit.of(error).classes
            if not num_classes or found is None or (checkpoint and not new_head):
                raise
            model = build(num_classes)
            try:
                _copy_body(load(found), model)
            except RuntimeError:
                raise error from None
    except Exception as error:
        text = str(error)
        ours = any(key in text for key in added)
        if options and isinstance(error, TypeError) and "keyword argument" in text and not ours:
            why = f"options {options} does not fit {name}: {error}"
        elif given or pretrained:
            why = f"{what} {_why_unfit(name, num_classes, given, error)}"
        else:
            raise
        raise ValueError(f"models.create: {why}") from error
    if given:
        for key, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"models.create: {what} has NaN or Inf in {key}")
    if pretrained and found is None and model.pretrained_cfg["num_classes"] != model.num_classes:
        found = model.pretrained_cfg["num_classes"]  # timm made a new classifier
    origin = _origin(model, name, what, checkpoint, given, pretrained)
    if found is not None:
        new = f"new classifier: {model.num_classes} classes for {found}"
        origin = replace(origin, new_head=new, classes=None)
    model.origin = replace(origin, options=added)
    return model


def headless(model: nn.Module) -> nn.Module:
    """The model, changed in place: it returns what its classifier would read, [B, features]."""
    body: Any = model
    body.reset_classifier(0)
    body.origin = replace(Origin.of(model), new_head="", classes=None, multilabel=False)
    return model


def with_classifier(model: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy with the linear classifier weight f + bias of what the model's own would read, f.

    Args:
        model: one by `headless`, or any of timm's with a linear classifier or none.
        weight: [classes, features].
        bias: [classes].
    """
    made: Any = copy.deepcopy(model)
    made.reset_classifier(len(weight))
    layer = made.get_classifier()
    if not isinstance(layer, nn.Linear) or layer.weight.shape != weight.shape:
        raise ValueError(
            f"models.with_classifier: weight: expected the shape of {layer}, got "
            f"{list(weight.shape)}"
        )
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return made.to(next(model.parameters()).device)


def _origin(
    model: Any,
    name: str,
    what: str,
    checkpoint: str | Path,
    given: weights.Weights | None,
    pretrained: bool,
) -> Origin:
    """Of a classifier that came with the weights; tells timm the pixels that did."""
    if not (given or pretrained):
        return Origin()
    if given and checkpoint:
        about = _about(given)
        if not about:
            return Origin(what, note=given.note)
        _tell(model, about.pixels)
        return Origin(
            what,
            classes=about.classes,
            pixels=about.pixels,
            note=given.note,
            multilabel=about.multilabel,
            pruned=about.pruned,
        )
    if ":" not in name:
        config = model.pretrained_cfg
        what = "timm's " + ".".join(filter(None, (config["architecture"], config.get("tag"))))
    pixels = None
    with suppress(ValueError):  # not square
        pixels = Pixels.of(model)
    return Origin(what, classes=_class_names(model, guess=":" not in name), pixels=pixels)


def _check_name(name: str) -> None:
    names = timm.list_models(include_tags="." in name)
    if ":" not in name and name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 5, cutoff=0))
        raise ValueError(
            "models.create: name: expected hf-hub:org/model, local-dir:path or one of timm's, got "
            f"{name!r}; the nearest are {near}"
        )


def _read(name: str, checkpoint: str | Path) -> weights.Weights | None:
    """The weights in a checkpoint, else in a folder that is the model's name."""
    try:
        if checkpoint:
            given = weights.read(Path(checkpoint))
            _about(given)  # another version's is refused here
            return given
        if name.startswith("local-dir:"):
            return weights.read(weights.in_folder(Path(name.removeprefix("local-dir:"))))
    except ValueError as error:
        label = "checkpoint" if checkpoint else "name local-dir:"
        raise ValueError(f"models.create: {label} {error}") from error
    return None


def _build(
    name: str,
    num_classes: int | None = None,
    *,
    given: weights.Weights | None = None,
    pretrained: bool = False,
    image_size: int | None,
    options: Mapping[str, Any],
    widths: Mapping[str, Tensor] | None = None,
) -> Any:
    """timm's model with weights that are `given`, timm's own, or random; as wide as `widths`.

    Raises RuntimeError where weights do not fit to the last tensor, but of timm's own weights, of
    which timm drops the classifier.
    """
    sizes = {"num_classes": num_classes, "img_size": image_size}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    overlay: dict[str, Any] = {}
    if num_classes is not None and (given or ":" in name):
        # timm takes any weights for a model, unless it has the classes stated here
        overlay = {"num_classes": num_classes}
    if given and not given.torchvision and widths is None:
        overlay |= {"source": "", "state_dict": given.state, "custom_load": False}
        pretrained = True
    build: Any = partial(timm.create_model, name, pretrained, pretrained_cfg_overlay=overlay)
    try:
        model = build(**sizes, **options)
    except TypeError as error:
        if "unexpected keyword argument 'img_size'" not in str(error):
            raise
        sizes.pop("img_size", None)
        model = build(**sizes, **options)
    model.pretrained_cfg.pop("state_dict", None)
    if given and given.torchvision:
        model.load_state_dict(weights.of_torchvision(given, model))
    if widths is not None:
        pruning.narrow(model, widths)
        if given:
            model.load_state_dict(given.state)
    if image_size is not None:
        model.pretrained_cfg["input_size"] = (3, image_size, image_size)
    return model


def _copy_body(source: nn.Module, model: Any) -> None:
    """Copies all but the classifier."""
    names = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    new = {k: v for k, v in model.state_dict().items() if k.startswith(heads)}
    model.load_state_dict(source.state_dict() | new)


def _why_unfit(
    name: str, num_classes: int | None, given: weights.Weights | None, error: Exception
) -> str:
    misfit = weights.Misfit.of(error)
    # it may list hundreds of keys
    reason = str(misfit) or textwrap.shorten(str(error) or repr(error), 300, placeholder=" ...")
    if given and misfit.classes:
        return f"has {misfit.classes} classes, and {name} with {num_classes=} others: {reason}"
    if given:
        return f"does not fit {name}: {given.foreign}{reason}"
    if isinstance(error, KeyError):
        return f"is no model of timm's: its config.json has no {reason}"
    return f"has no weights that can be loaded: {reason}"


def _class_names(model: Any, guess: bool) -> tuple[str, ...] | None:
    """The names in a hub's config, else ImageNet's where timm's weights have as many classes."""
    names: Any = model.pretrained_cfg.get("label_names") or ()
    if isinstance(names, Mapping):  # by index, which JSON makes a string
        names = [names.get(str(i), names.get(i)) for i in range(len(names))]
    # transformers' placeholders are no names
    if names and len(names) == model.num_classes and None not in names and names[0] != "LABEL_0":
        return tuple(map(str, names))
    subset = infer_imagenet_subset(model) if guess else None
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


def _tell(model: Any, pixels: Pixels) -> None:
    """Lets timm, and so `Pixels.of`, know how the weights want their images, but for the size."""
    told = asdict(pixels)
    del told["image_size"]
    model.pretrained_cfg.update(told)


class _About(NamedTuple):
    """What `save` writes beside the weights."""

    version: int
    name: str
    options: dict[str, Any]
    num_classes: int
    pixels: Pixels
    classes: tuple[str, ...]
    multilabel: bool = False
    pruned: bool = False


def _about(file: weights.Weights) -> _About | None:
    """None: the file is not by `save`."""
    if _METADATA not in file.metadata:
        return None
    try:
        about = json.loads(file.metadata[_METADATA])
        if about["version"] != _VERSION:
            raise ValueError(f"version: expected {_VERSION}, got {about['version']}")
        pixels = about["pixels"]
        pixels = Pixels(**{**pixels, "mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])})
        return _About(**{**about, "pixels": pixels, "classes": tuple(about["classes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file.file} has metadata that cannot be read: {error}") from error


class Loaded(NamedTuple):
    """A model in eval mode, the images it wants and the names of its classes."""

    model: nn.Module
    pixels: Pixels
    classes: tuple[str, ...]


def save(
    path: str | Path,
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    *,
    name: str,
    options: Mapping[str, Any] | None,
    num_classes: int,
    pixels: Pixels,
    classes: Sequence[str],
    multilabel: bool = False,
) -> None:
    """Writes the .safetensors file that `load` rebuilds a model from, entirely or not at all.

    `name`, `options` (JSON) and `num_classes` are as given to `create`, `classes` are names, which
    are not exclusive with `multilabel` (older versions refuse to load such a file, and one of a
    pruned model); the weights may come from inside DistributedDataParallel or torch.compile. Raises
    ValueError for another suffix or number of names. Where writing fails, an older file stays.
    """
    path, state, options = Path(path), model_or_state_dict, dict(options or {})
    if path.suffix != ".safetensors":
        raise ValueError(f"models.save: path: expected a name in .safetensors, got {path}")
    if len(classes) != num_classes:
        raise ValueError(f"models.save: classes: expected {num_classes} names, got {len(classes)}")
    pruned = False
    if isinstance(state, nn.Module):
        pruned = Origin.of(state).pruned
        options = {**Origin.of(state).options, **options}
        state = state.state_dict()
    state = clean_state_dict(dict(state))
    # safetensors takes neither shared memory nor channels-last weights
    layout = torch.contiguous_format
    tensors = {key: t.detach().cpu().clone(memory_format=layout) for key, t in state.items()}
    about = {"version": _VERSION, "name": name, "options": options,
             "num_classes": num_classes, "pixels": asdict(pixels),
             "classes": list(classes)}  # fmt: skip
    about |= {"multilabel": True} if multilabel else {}
    about |= {"pruned": True} if pruned else {}
    with replacing(path) as beside:
        safetensors.torch.save_file(tensors, beside, {_METADATA: json.dumps(about)})


def load(source: str | Path, *, options: Mapping[str, Any] | None = None) -> Loaded:
    """A saved model, bit by bit as it was, or one of timm's with its weights; in eval mode.

    `source` is a file by `save`, or a name for `create`; `options` go before the saved ones.

    Raises:
        ValueError: an unknown name or option, one that does not suit the saved weights, a damaged
            file, or one that is not by `save`.
        FileNotFoundError: the file does not exist.
    """
    if not Path(source).is_file():
        if Path(source).suffix in (".safetensors", ".pth", ".pt"):
            raise FileNotFoundError(f"models.load: source {source} is not a file")
        if Path(source).is_dir() and not timm.is_model(str(source)):
            raise ValueError(f"models.load: source: expected a file, got the folder {source}")
        model: Any = create(str(source), pretrained=True, options=options)
        classes = Origin.of(model).classes or _class_names(model, guess=True)
        classes = classes or tuple(map(str, range(model.num_classes)))
        return Loaded(model.eval(), Pixels.of(model), classes)
    try:
        file = weights.read(Path(source))
        about = _about(file)
    except ValueError as error:
        raise ValueError(f"models.load: source {error}") from error
    if about is None:
        raise ValueError(
            f"models.load: source {source} is not by models.save; weights alone need timm's name: "
            "models.create(name, checkpoint=...)"
        )
    options = {**about.options, "num_classes": about.num_classes, **(options or {})}
    size = None if "img_size" in options else about.pixels.image_size
    _check_name(about.name)
    widths = file.state if about.pruned else None
    model = _build(about.name, image_size=size, options=options, widths=widths)
    try:
        model.load_state_dict(file.state)
    except RuntimeError as error:
        why = weights.Misfit.of(error) or error
        raise ValueError(f"models.load: source {source} does not fit {options=}: {why}") from error
    _tell(model, about.pixels)
    model.origin = Origin(
        f"file {source}", classes=about.classes, pixels=about.pixels,
        multilabel=about.multilabel, pruned=about.pruned,
    )  # fmt: skip
    return Loaded(model.eval(), about.pixels, about.classes)


def saved_as(source: str | Path) -> tuple[str, dict[str, Any]]:
    """timm's name and options of the model in a file by `save`.

    Raises:
        ValueError: the file is damaged, or not by `save`.
        FileNotFoundError: it does not exist.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"models.saved_as: source {source} is not a file")
    about = _about(weights.read(Path(source)))
    if about is None:
        raise ValueError(f"models.saved_as: source {source} is not by models.save")
    return about.name, dict(about.options)


def class_names(classes: Sequence[str]) -> list[list[str]]:
    """What the classes may be called in a folder's name: their own names, and WordNet's ids."""
    subset = infer_imagenet_subset({"num_classes": len(classes)})
    ids = [ImageNetInfo(subset).label_names()] if subset else []
    return [list(classes), *ids]
