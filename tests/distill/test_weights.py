"""Weights of every origin, in files by the library that writes them, and every file that is bad."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from vitkd_fast.models import Origin, Pixels, create, load, predictor, save

NAME = "mobilenetv3_small_050"
VIT: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}


def randomize(model: nn.Module) -> nn.Module:
    """Makes every weight count, and keeps the logits near 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # variances near torchvision's eps show whether it is used
            nn.init.uniform_(module.running_var, 0.001, 0.01)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.05, 0.15)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return list(a_state) == list(b_state) and all(a_state[k].equal(b_state[k]) for k in a_state)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(NAME, num_classes=4))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def refused(file: Path, **arguments: Any) -> str:
    """The error's text, which is one line that names the file."""
    with pytest.raises(ValueError) as caught:
        create(**{"name": NAME, "num_classes": 4, "checkpoint": file, **arguments})
    text = str(caught.value)
    assert text.startswith(f"models.create: checkpoint {file}") and len(text.splitlines()) == 1
    rest = text.removeprefix(f"models.create: checkpoint {file}")
    assert len(rest) < 400
    return rest


# --- what is read


class LightningModule(nn.Module):
    """As users write them; Lightning's checkpoints hold its state_dict."""

    def __init__(self, prefix: str, model: nn.Module) -> None:
        super().__init__()
        setattr(self, prefix, model)
        self.teacher = nn.Linear(2, 2)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(4))


@pytest.mark.parametrize("prefix", ["model", "net", "student"])
def test_lightning(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    for i, inner in enumerate((model, torch.compile(model), nn.DataParallel(model))):
        # the keys of pytorch_lightning 2.6's Trainer.save_checkpoint
        content = {"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6",
                   "state_dict": LightningModule(prefix, inner).state_dict(),
                   "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {},
                   "optimizer_states": [], "lr_schedulers": [], "hparams_name": "kwargs",
                   "hyper_parameters": {"lr": 0.1}}  # fmt: skip
        torch.save(content, file := tmp_path / f"{i}.ckpt")
        created = create(NAME, num_classes=4, checkpoint=file)
        assert same(created, model)
        assert (
            str(Origin.of(created)) == f"checkpoint {file}; 3 tensors outside '{prefix}' left out"
        )


def test_wrappers_and_old_files(model: nn.Module, tmp_path: Path) -> None:
    states = [nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model)),
              torch.compile(nn.DataParallel(model))]  # fmt: skip
    for i, wrapped in enumerate(states):
        torch.save({"model_state_dict": wrapped.state_dict()}, file := tmp_path / f"{i}.pth")
        assert same(created := create(NAME, num_classes=4, checkpoint=file), model)
        assert Origin.of(created) == Origin(f"checkpoint {file}")
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert same(create(NAME, num_classes=4, checkpoint=file), model)
    safetensors.torch.save_file(model.state_dict(), file)  # named .pth
    assert same(create(NAME, num_classes=4, checkpoint=file), model)


def test_timms_training(model: nn.Module, tmp_path: Path) -> None:
    import argparse

    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters()),
        args=argparse.Namespace(model=NAME, lr=0.1),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    for file in (tmp_path / "last.pth.tar", tmp_path / "model_best.pth.tar"):
        assert same(create(NAME, num_classes=4, checkpoint=file), model)


TORCHVISION = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
}


@pytest.mark.parametrize("theirs", TORCHVISION)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "lightning"])
@torch.no_grad()
def test_torchvision(theirs: str, kind: str, tmp_path: Path, x: Tensor) -> None:
    """The same logits, before and after our own file."""
    name = TORCHVISION[theirs]
    peer = randomize(torchvision.models.get_model(theirs, num_classes=7))
    state, file = peer.state_dict(), tmp_path / f"weights.{kind}"
    if kind == "safetensors":  # which sorts its keys
        safetensors.torch.save_file(state, file)
    elif kind == "pth":
        torch.save(state, file)
    else:
        torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, file)
    ours = create(name, num_classes=7, checkpoint=file)
    expected = peer(x)
    assert expected.std() > 0.01
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(ours.eval()(x), expected, **close)
    save(tmp_path / "ours.safetensors", torch.compile(ours), name=name, options={}, num_classes=7,
         pixels=Pixels.of(ours), classes="abcdefg")  # fmt: skip
    torch.testing.assert_close(load(tmp_path / "ours.safetensors").model(x), expected, **close)
    with pytest.raises(ValueError, match=rf"options \{{'typo': 1\}} does not fit {name}: .*'typo'"):
        create(name, num_classes=7, checkpoint=file, options={"typo": 1})


@torch.no_grad()
def test_torchvision_with_a_new_head_and_where_it_does_not_fit(tmp_path: Path, x: Tensor) -> None:
    peer = randomize(torchvision.models.mobilenet_v3_small(num_classes=7))
    torch.save(peer.state_dict(), file := tmp_path / "v3.pth")
    ours = create("mobilenetv3_small_100", num_classes=3, checkpoint=file, new_head=True).eval()
    body = peer.classifier[:-1](peer.avgpool(peer.features(x)).flatten(1))
    torch.testing.assert_close(ours.forward_head(ours.forward_features(x), True), body)
    assert ours(x).shape == (2, 3)
    assert Origin.of(ours).new_head == "new classifier: 3 classes for 7"
    assert Origin.of(ours).options == {"bn_eps": 0.001}
    for name, why in {
        "tf_mobilenetv3_small_100": "pads both sides alike, and this network as TensorFlow does",
        "mobilenetv3_small_050": "another shape",
        "mobilenetv3_large_100": "torchvision's network has 210 tensors, timm's 266",
        "mobilenetv4_conv_small": "torchvision's MobileNetV3",
        "vit_tiny_patch16_224": "torchvision's MobileNetV3",
    }.items():
        assert why in refused(file, name=name, num_classes=7)
    kept = create("mobilenetv3_small_100", num_classes=7, checkpoint=file, options={"bn_eps": 1e-5})
    assert kept.bn1.eps == 1e-5 and Origin.of(kept).options == {}


@pytest.mark.parametrize("old", [False, True])
@torch.no_grad()
def test_torchvisions_vit(old: bool, tmp_path: Path) -> None:
    peer = torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=7).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = peer.state_dict()
    if old:  # the keys of MLPBlock's version 1
        rename = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
        for new, name in rename.items():
            state = {key.replace(new, name): value for key, value in state.items()}
    torch.save(state, file := tmp_path / "vit.pth")
    options = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    ours = create(
        "vit_tiny_patch16_224", num_classes=7, checkpoint=file, image_size=32, options=options
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), peer(x), rtol=0, atol=1e-5 * peer(x).abs().max())


# --- what is refused


class Runs:
    """A pickle that runs a command when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_run(zipped: bool, model: nn.Module, tmp_path: Path) -> None:
    file, ran = tmp_path / "a.pth", tmp_path / "ran"
    torch.save({"state_dict": model.state_dict(), "x": Runs(ran)}, file,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    assert "holds Python objects beside its weights (" in refused(file)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()  # the file does run when it is unpickled
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "too")))
    refused(tmp_path / "b.pkl")
    assert not (tmp_path / "too").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_pickles(zipped: bool, tmp_path: Path) -> None:
    peer = torchvision.models.mobilenet_v3_small(num_classes=4)
    for content in (peer, {"model": peer, "epoch": 3}):
        file = tmp_path / "whole.pth"
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        why = refused(file)
        assert why.startswith(
            " holds a whole pickled model (torchvision.models.mobilenetv3.MobileNetV3), and reading"
        )
        assert "save model.state_dict() alone" in why


def test_objects_beside_the_weights(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": model.state_dict(), "best": np.float64(1)}, file := tmp_path / "a.pt")
    assert "holds Python objects beside its weights (numpy." in refused(file)


def test_files_that_hold_no_weights(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    assert refused(file) == ": no such file"
    assert refused(tmp_path) == ": expected a file of weights, got a folder"
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"a{suffix}"
        file.write_bytes(b"")
        assert refused(file) == " is empty"
        file.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10306551\n"
        )
        assert "is a Git LFS pointer, not the weights: `git lfs pull` gets them" in refused(file)
    file.write_bytes(b"<!DOCTYPE html>\n<html>")
    assert "is damaged or no safetensors file" in refused(file)
    file = file.rename(tmp_path / "page.pth")
    assert "neither safetensors nor by torch.save: it begins with b'<!DOCTYPE" in refused(file)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    assert "is a TorchScript program" in refused(file)
    torch.export.save(
        torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file.with_suffix(".pt2")
    )
    assert "damaged or not by torch.save" in refused(file.with_suffix(".pt2"))
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    assert "damaged or not by torch.save" in refused(tmp_path / "a.npz")
    for content, why in (
        (torch.ones(2), ": expected a state dict, got a Tensor"),
        ([torch.ones(2)], ": expected a state dict, got a list"),
        ({"student": model.state_dict(), "epoch": 1}, ", got 'student', which is no tensor"),
        ({"state_dict": {}}, ": expected a state dict, bare or under"),
    ):
        torch.save(content, file)
        assert why in refused(file)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [3, 100, 5000, -30])
def test_truncated_files(kind: str, kept: int, model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    file.write_bytes(file.read_bytes()[:kept])
    assert "is damaged or" in refused(file) or "is damaged, or" in refused(file)


def test_misfits_are_counted(model: nn.Module, tmp_path: Path) -> None:
    state, file = dict(model.state_dict()), tmp_path / "a.pth"
    state["extra.weight"] = state.pop("conv_stem.weight")
    state["bn1.bias"] = torch.ones(3)
    torch.save(state, file)
    assert refused(file) == (
        f" does not fit {NAME}: missing 1 (first conv_stem.weight), unexpected 1 "
        "(first extra.weight), of another shape 1 (first bn1.bias, [3] for [16])"
    )
    torch.save(model.state_dict(), file)
    assert "of another shape" in refused(file, name="mobilenetv2_050")
    state = {**model.state_dict(), "blocks.0.0.bn1.weight": torch.full((16,), torch.nan)}
    torch.save(state, file)
    with_nan = refused(file)
    assert with_nan == " has NaN or Inf in blocks.0.0.bn1.weight"


def test_transformers(tmp_path: Path) -> None:
    """Their files, by the keys that transformers 5.24 writes, and their folders."""
    for i, keys in enumerate((
        ("mobilenet_v2.conv_stem.conv_3x3.convolution.weight", "classifier.weight"),
        ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.key.bias"),
        ("embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.bias"),
    )):  # fmt: skip
        file = tmp_path / f"{i}.safetensors"
        safetensors.torch.save_file({key: torch.ones(2) for key in keys}, file, {"format": "pt"})
        why = refused(file)
        assert f"does not fit {NAME}: these are weights of transformers; timm's of the same" in why
    folder = tmp_path / "vit"
    folder.mkdir()
    file.rename(folder / "model.safetensors")
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in ({"name": f"local-dir:{folder}"}, {"name": NAME, "checkpoint": folder}):
        with pytest.raises(ValueError, match=r"vit: expected a model of timm's, got .* \(vit\)"):
            create(**arguments)
    # what TimmWrapperForImageClassification saves
    config = {"architecture": NAME, "model_args": None, "model_type": "timm_wrapper"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"vit: expected a model of timm's, got transformers' wrapper of {NAME}"
    ):
        create(f"local-dir:{folder}")
    wrapped = {f"timm_model.{k}": v for k, v in timm.create_model(NAME).state_dict().items()}
    safetensors.torch.save_file(wrapped, folder / "model.safetensors")
    assert Origin.of(create(NAME, checkpoint=folder / "model.safetensors")).trained


# --- another number of classes


def test_a_new_head(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), file := tmp_path / "four.pth")
    for classes in (3, None):
        why = refused(file, num_classes=classes)
        assert why.startswith(f" has 4 classes, and {NAME} with num_classes={classes} others")
    assert " has 4 classes" in refused(file, num_classes=None, new_head=True)
    created = create(NAME, num_classes=3, checkpoint=file, new_head=True)
    state, given = created.state_dict(), model.state_dict()
    assert created.classifier.weight.shape == (3, 1024) and created.num_classes == 3
    assert all(state[key].equal(given[key]) for key in state if not key.startswith("classifier"))
    assert created.classifier.weight.std() > 0.01
    origin = Origin.of(created)
    assert not origin.trained and origin.classes is None
    assert str(origin) == f"checkpoint {file}; new classifier: 3 classes for 4"
    # with its own number nothing is new
    assert same(whole := create(NAME, num_classes=4, checkpoint=file, new_head=True), model)
    assert Origin.of(whole).trained


def test_a_new_head_hides_no_misfit(model: nn.Module, tmp_path: Path) -> None:
    """timm takes any weights for a model of another number of classes than they say."""
    state = dict(model.state_dict())
    del state["conv_stem.weight"]
    torch.save(state, file := tmp_path / "a.pth")
    assert "missing 1 (first conv_stem.weight)" in refused(file, num_classes=4, new_head=True)
    assert "missing 1 (first conv_stem" in refused(file, num_classes=3, new_head=True)
    assert "missing" in refused(file, num_classes=None, options={"num_classes": 3}, new_head=True)
    torch.save({"a": torch.ones(2)}, file)
    assert "missing" in refused(file, num_classes=3, new_head=True)


def test_a_new_head_of_transformers(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    arguments: dict[str, Any] = {"checkpoint": file, "new_head": True, "options": VIT}
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **VIT)
    torch.save(deit.state_dict(), file)  # two heads
    created = create("deit_tiny_distilled_patch16_224", num_classes=3, **arguments)
    assert created.head_dist.weight.shape == (3, 48) and created.pos_embed.equal(deit.pos_embed)
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    torch.save(headless.state_dict(), file)
    created = create("vit_tiny_patch16_224", num_classes=3, **arguments)
    assert created.pos_embed.equal(headless.pos_embed)
    assert Origin.of(created).new_head == "new classifier: 3 classes for 0"
    assert "missing 2 (first head.weight)" in refused(
        file, name="vit_tiny_patch16_224", num_classes=3, options=VIT
    )


# --- where weights come from, and what comes with them


def test_origin_of_random_weights() -> None:
    origin = Origin.of(create(NAME))
    assert origin == Origin() and not origin.trained and str(origin) == "random"
    unknown = Origin.of(nn.Linear(2, 2))
    assert unknown.weights == "unknown" and unknown.classes is None


def test_origin_of_our_file(model: nn.Module, tmp_path: Path, x: Tensor) -> None:
    """A file's classes and pixels are the model's wherever it goes, and also timm's view of it."""
    pixels = Pixels(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    file = tmp_path / "a.safetensors"
    save(file, model, name=NAME, options=None, num_classes=4, pixels=pixels, classes="abcd")
    loaded = load(file).model
    expected = Origin(f"file {file}", classes=("a", "b", "c", "d"), pixels=pixels)
    for wrapped in (loaded, copy.deepcopy(loaded), torch.compile(loaded), nn.DataParallel(loaded)):
        assert Origin.of(wrapped) == expected and Origin.of(wrapped).trained
    assert Pixels.of(loaded) == pixels
    uint8 = (x * 40 + 128).clamp(0, 255).to(torch.uint8)
    assert predictor(loaded)(uint8).equal(predictor(loaded, pixels)(uint8))
    created = create(NAME, num_classes=4, checkpoint=file, image_size=64)
    assert Origin.of(created).classes == ("a", "b", "c", "d")
    assert Pixels.of(created).mean == pixels.mean and Pixels.of(created).image_size == 64
    created = create(NAME, num_classes=3, checkpoint=file, new_head=True)
    assert Origin.of(created).classes is None and Origin.of(created).pixels == pixels
    about = json.dumps({"version": 99})
    safetensors.torch.save_file(model.state_dict(), file, {"vitkd_fast": about})
    with pytest.raises(
        ValueError,
        match=r"models.create: checkpoint .* cannot be read: version: expected 1, got 99",
    ):
        create(NAME, num_classes=4, checkpoint=file)


def hub_folder(folder: Path, model: nn.Module, **config: Any) -> Path:
    """As timm writes it."""
    timm.models.save_for_hf(model, folder, config, safe_serialization=True)
    return folder


def test_local_folders_are_named_for_their_weights(model: nn.Module, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", model, label_names=["ant", "bee", "cat", "dog"])
    name = f"local-dir:{folder}"
    for pretrained in (False, True):
        created = create(name, pretrained=pretrained)
        assert same(created, model)
        expected = Origin(name, classes=("ant", "bee", "cat", "dog"), pixels=Pixels.of(model))
        assert Origin.of(created) == expected
    assert load(name).classes == ("ant", "bee", "cat", "dog")
    assert same(create(name, num_classes=4), model)
    created = create(name, num_classes=3)
    assert created.conv_stem.weight.equal(model.conv_stem.weight)
    assert str(Origin.of(created)) == f"{name}; new classifier: 3 classes for 4"
    assert Origin.of(created).classes is None
    torch.save(model.state_dict(), file := tmp_path / "a.pth")
    assert Origin.of(create(name, checkpoint=file)).weights == f"checkpoint {file}"
    # a file of ours needs no weights but its own
    save(
        file := tmp_path / "a.safetensors", created,
        name=name, options=None, num_classes=3, pixels=Pixels.of(created), classes="abc",
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    assert same(load(file).model, created)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"0": "ant", "1": "bee", "2": "cat", "3": "dog"}, ("ant", "bee", "cat", "dog")),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], None),  # transformers' placeholders
        (["ant", "bee"], None),
        ({"0": "ant", "2": "bee", "3": "cat", "7": "dog"}, None),
    ],
)
def test_label_names(
    names: Any, expected: tuple[str, ...] | None, model: nn.Module, tmp_path: Path
) -> None:
    name = f"local-dir:{hub_folder(tmp_path / 'hub', model, label_names=names)}"
    assert Origin.of(create(name)).classes == expected
    assert load(name).classes == (expected or ("0", "1", "2", "3"))


def test_local_folders_that_are_bad(model: nn.Module, tmp_path: Path) -> None:
    def says(why: str) -> None:
        with pytest.raises(ValueError, match=rf"^models\.create: name local-dir: .*{why}"):
            create(f"local-dir:{folder}", num_classes=3)

    folder = tmp_path / "hub"
    says("hub has no config.json that can be read: .*No such file")
    hub_folder(folder, model)
    file = folder / "model.safetensors"
    weights = file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    says("model.safetensors is a Git LFS pointer")
    file.write_bytes(weights[:-9])
    says("model.safetensors is damaged")
    file.unlink()
    says("hub: expected one of model.safetensors, ")
    torch.save(model.state_dict(), folder / "weights.bin")
    assert same(create(f"local-dir:{folder}"), model)
    for content in ("{", "[1]", "1"):
        (folder / "config.json").write_text(content)
        says("hub has no config.json that can be read: ")
    (folder / "config.json").write_text("{}")
    says("hub: expected a model of timm's, got one of another library")
    (folder / "config.json").write_text('{"architecture": "mobilenet_v9"}')
    with pytest.raises(ValueError, match=r"Unknown model .mobilenet_v9"):
        create(f"local-dir:{folder}")
    # the weights of another network, which timm lets pass
    hub_folder(folder, timm.create_model("mobilenetv2_050", num_classes=4))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": NAME}))
    for classes in (3, 4, None):
        with pytest.raises(ValueError, match=r"local-dir:.* does not fit local-dir:.*: missing"):
            create(f"local-dir:{folder}", num_classes=classes)
    with pytest.raises(ValueError, match="hub: expected a file of weights, or local-dir:"):
        create(NAME, checkpoint=folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache, which it reads without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def in_hub(cache: Path, repository: str, folder: Path) -> None:
    inside, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, inside / "snapshots" / commit)
    (inside / "refs").mkdir()
    (inside / "refs" / "main").write_text(commit)


def test_hub(hub: Path, model: nn.Module, tmp_path: Path) -> None:
    in_hub(hub, "org/net", hub_folder(tmp_path / "a", model, label_names=list("abcd")))
    options = {"cache_dir": str(hub)}
    for classes in (None, 4):
        created = create("hf-hub:org/net", num_classes=classes, options=options)
        assert same(created, model)
        assert Origin.of(created).weights == "hf-hub:org/net"
        assert Origin.of(created).classes == ("a", "b", "c", "d")
    created = create("hf-hub:org/net", num_classes=3, options=options)
    assert created.conv_stem.weight.equal(model.conv_stem.weight)
    assert str(Origin.of(created)) == "hf-hub:org/net; new classifier: 3 classes for 4"
    transformers = tmp_path / "b"
    transformers.mkdir()
    (transformers / "config.json").write_text('{"model_type": "vit"}')
    in_hub(hub, "org/vit", transformers)
    with pytest.raises(ValueError, match=r"hf-hub:org/vit is no model of timm's: .*'architecture'"):
        create("hf-hub:org/vit", options=options)
    with pytest.raises(
        ValueError, match=r"models\.create: hf-hub:org/gone has no weights that can"
    ):
        create("hf-hub:org/gone", options=options)


def test_timms_own_weights(hub: Path, tmp_path: Path) -> None:
    whole = randomize(timm.create_model(NAME))
    in_hub(hub, "timm/mobilenetv3_small_050.lamb_in1k", hub_folder(tmp_path / "a", whole))
    options = {"cache_dir": str(hub)}
    created = create(NAME, pretrained=True, options=options)
    assert same(created, whole)
    origin = Origin.of(created)
    assert origin.weights == "timm's mobilenetv3_small_050.lamb_in1k" and origin.trained
    assert origin.classes is not None and origin.classes[0] == "tench, Tinca tinca"
    assert origin.pixels == Pixels.of(created)
    created = create(NAME, pretrained=True, num_classes=3, options=options)
    assert str(Origin.of(created)) == f"{origin.weights}; new classifier: 3 classes for 1000"
    assert Origin.of(created).classes is None and not Origin.of(created).trained
    with pytest.raises(ValueError, match="mobilenetv1_100h has no weights that can be loaded"):
        create("mobilenetv1_100h", pretrained=True, options=options)


def test_nothing_of_the_file_stays_in_the_model(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), file := tmp_path / "a.pth")
    created = create(NAME, num_classes=4, checkpoint=file)
    assert "state_dict" not in created.pretrained_cfg
    assert len(pickle.dumps(created)) < 1.1 * file.stat().st_size
