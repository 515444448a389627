"""Models: taps against what timm computes itself, saving and loading, and every error."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from vitkd_fast.models import Normalize, Pixels, create, load, save
from vitkd_fast.taps import TapOutputs, Taps

VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
SWIN = {"depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 4}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "qk_norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", VIT),
    "eva": ("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}),
    "eva_bias_apart": ("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}),
    "eva_three_projections": ("eva02_tiny_patch14_224", {**VIT, "qkv_fused": False}),
    "mixed_rope": ("vit_small_patch16_rope_mixed_224", VIT),
    "shared_keys": ("eva02_tiny_patch14_224", {**VIT, "qkv_fused": False, "num_kv_heads": 1,
                                               "attn_type": "rope"}),
    "beit": ("beit_base_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    # 4 x 4 and 2 x 2 positions, behind stages of convolutions
    "visformer": ("visformer_tiny", {"embed_dim": 96, "depth": (1, 2, 1)}),
    "coatnet": ("coatnet_nano_rw_224", {"embed_dim": (16, 32, 64, 96), "depths": (1, 1, 2, 1),
                                        "stem_width": (8, 16)}),
}  # fmt: skip
STUDENTS = [
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "mobilenetv4_conv_small",
]


def randomize(model: nn.Module) -> nn.Module:
    """Makes every weight count: timm starts biases, layer scales and some heads at 0 or 1."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() < 2 else nn.init.normal_(p, std=0.15)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def teacher(kind: str) -> nn.Module:
    name, options = TEACHERS[kind]
    model = randomize(create(name, num_classes=5, image_size=64, options=options))
    for module in model.modules():
        if kind == "eva_bias_apart" and hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def attentions(model: nn.Module) -> list[Any]:
    return [m.attn for m in model.modules() if getattr(m, "attn", None) is not None]


def own_map(model: nn.Module, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of the model's unfused attention, and the bias and mask that were added."""
    model = copy.deepcopy(model)
    attn, seen = attentions(model)[block], []
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn.register_forward_pre_hook(lambda _, a, kw: seen.append(kw.get("mask")), with_kwargs=True)
    model(x)
    mask, softmax = seen
    added = torch.zeros(())
    if getattr(attn, "relative_position_bias_table", None) is not None:
        added = attn._get_rel_pos_bias()
    elif getattr(attn, "rel_pos", None) is not None:
        added = attn.rel_pos.get_bias()
    elif hasattr(attn, "cpb_mlp"):
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        area = attn.window_size[0] * attn.window_size[1]
        bias = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        added = 16 * torch.sigmoid(bias)
    if mask is not None:
        added = added + mask.repeat(len(softmax) // len(mask), 1, 1)[:, None]
    return softmax, added


@pytest.mark.parametrize("block", [2, -2])  # Swin: a shifted and a last stage but one
@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_the_map_of_queries_and_keys_is_the_models_own(kind: str, block: int, x: Tensor) -> None:
    model = teacher(kind)
    taps = Taps(model, attention=[block])
    tapped = taps(x)
    q, k = tapped.queries[block], tapped.keys[block]
    expected, added = own_map(model, block, x)
    logits = taps.scales[block] * q @ k.transpose(-2, -1) + added
    assert q.shape == k.shape and logits.shape == expected.shape
    assert expected.std() > 1e-3  # a uniform map would show nothing
    # a softmax passes on the rounding of its logits
    rounding = 16 * torch.finfo(torch.float32).eps * (1 + logits.abs().max().item())
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_teacher_taps_are_timms_and_leave_the_model_alone(kind: str, x: Tensor) -> None:
    model = teacher(kind)
    state = copy.deepcopy(model.state_dict())
    plain = model(x)
    blocks = [0, 2, -1]
    stride = 32 if "swin" in kind else model.feature_info[-1]["reduction"]
    taps = Taps(model, pooled=True, maps=[stride], tokens=blocks, attention=blocks)
    first, tapped = taps(x), taps(x)
    assert tapped.logits.equal(plain) and first.logits.equal(plain) and model(x).equal(plain)
    assert all(model.state_dict()[key].equal(value) for key, value in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    features = model.forward_features(x)
    if kind == "deit":
        assert taps.prefix_tokens == 2 and tapped.pooled.equal(features[:, 0])
        assert tapped.logits_dist.equal(model.head_dist(features[:, 1]))
        assert ((model.head(tapped.pooled) + tapped.logits_dist) / 2).equal(plain)
    else:
        assert tapped.pooled.equal(model.forward_head(features, pre_logits=True))
        assert tapped.logits_dist is None
    if taps.grid is None:  # several stages
        outputs = model.forward_intermediates(x, indices=[-1], intermediates_only=True, norm=False)
        assert taps.prefix_tokens == 0 and kind in ("swin", "swinv2", "visformer", "coatnet")
        assert tapped.tokens[-1].equal(outputs[-1].flatten(2).transpose(1, 2))
    else:
        last = model.forward_intermediates(
            x, indices=blocks, intermediates_only=True, return_prefix_tokens=True
        )
        # timm gives each block once: 0, and 2, which is also -1
        for i, (patches, prefix) in zip(blocks, [last[0], last[1], last[1]], strict=True):
            whole = tapped.tokens[i][:, taps.prefix_tokens :]
            assert whole.equal(patches.flatten(2).transpose(1, 2))
            assert tapped.tokens[i][:, : taps.prefix_tokens].equal(prefix)
        outputs = [last[-1][0]]
        assert taps.grid == outputs[0].shape[-2:]
    assert tapped.maps[stride].equal(outputs[-1])


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_student_maps_are_timms_features(name: str, x: Tensor) -> None:
    model = randomize(create(name, num_classes=7))
    plain = model(x)
    features = timm.create_model(name, features_only=True).eval()
    missing, _ = features.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    strides = [8, 32, 2, 16, 4]
    tapped = Taps(model, pooled=True, maps=strides)(x)
    assert tapped.logits.equal(plain)
    assert tapped.pooled.equal(model.forward_head(model.forward_features(x), pre_logits=True))
    assert list(tapped.maps) == strides
    for stride, expected in zip(sorted(strides), features(x), strict=True):
        assert tapped.maps[stride].equal(expected) and expected.shape[-1] == 64 // stride


def test_gradients_flow_through_student_taps(x: Tensor) -> None:
    model = create("mobilenetv3_small_050", num_classes=3)
    tapped = Taps(model, pooled=True, maps=[16])(x)
    tapped.maps[16].sum().backward(retain_graph=True)
    assert model.conv_stem.weight.grad.any() and model.classifier.weight.grad is None
    (grad,) = torch.autograd.grad(tapped.pooled.sum(), model.conv_head.weight, retain_graph=True)
    assert grad.any()
    vit = teacher("vit")
    tapped = Taps(vit, attention=[1])(x)
    (tapped.queries[1] * tapped.keys[1]).sum().backward()
    assert vit.blocks[1].attn.qkv.weight.grad[:96].any() and vit.blocks[0].mlp.fc1.weight.grad.any()
    assert not vit.blocks[1].attn.qkv.weight.grad[96:].any()  # the values are no part of it


def test_a_pair_gives_its_first_and_a_wrapper_is_called(x: Tensor) -> None:
    model = teacher("deit").train()
    model.set_distilled_training()
    logits, logits_dist = model(x)
    taps = Taps(model, tokens=[0])
    tapped = taps(x)
    assert tapped.logits.equal(logits) and tapped.logits_dist.equal(logits_dist)
    taps.model = lambda x: model(2 * x)  # as DistributedDataParallel would
    assert taps(x / 2).logits.equal(logits)


def test_an_exception_leaves_no_hooks(x: Tensor) -> None:
    model = teacher("deit")
    taps = Taps(model, pooled=True, maps=[16], tokens=[0], attention=[0])
    plain, wrong = model(x), torch.randn(2, 3, 60, 60)
    with pytest.raises(AssertionError):
        taps(wrong)
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taps(x)
    model.norm._forward_hooks.clear()
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())
    assert model(x).equal(plain) and isinstance(taps(x), TapOutputs)


def test_taps_errors() -> None:
    vit, student = teacher("vit"), create("mobilenetv3_small_050")
    with pytest.raises(ValueError, match=r"maps: expected \[2, 4, 8, 16, 32\] of Mobile.*, got 64"):
        Taps(student, maps=[16, 64])
    with pytest.raises(
        ValueError, match=r"tokens: .*\[-3, -2, -1, 0, 1, 2\] of VisionTra.*, got 3"
    ):
        Taps(vit, tokens=[0, 3])
    with pytest.raises(ValueError, match=r"attention: expected .*, got -4"):
        Taps(vit, attention=[-4])
    with pytest.raises(ValueError, match="attention: expected none of MobileNetV3, got 0"):
        Taps(student, attention=[0])
    other = create("xcit_nano_12_p16_224", options={"depth": 1, "embed_dim": 16, "num_heads": 2})
    with pytest.raises(ValueError, match=r"attention 0: expected .*EvaAttention.*, got .*XCA"):
        Taps(other, attention=[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalize(dtype: torch.dtype, layout: torch.memory_format) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.arange(256).repeat(24).view(2, 3, 32, 32).to(dtype).contiguous(memory_format=layout)
    y = Normalize(mean, std)(x)
    m, s = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    expected = (x.double() / 255 - m) / s
    # two roundings of terms up to 3, whose difference may cancel
    assert (y - expected).abs().max() < 3 * 2 * torch.finfo(torch.float32).eps
    assert y.is_contiguous(memory_format=layout) and y.dtype == torch.float32
    low = Normalize(mean, std, dtype=torch.bfloat16)
    assert low(x).equal(y.bfloat16()) and not low.state_dict()


def test_normalize_errors() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, 3, H, W\], got \[2, 1, 4, 4\]"):
        Normalize((0, 0, 0), (1, 1, 1))(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError):
        Normalize((0, 0, 0), (1, 1))


def test_pixels() -> None:
    inception = Pixels(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)
    for options in ({"img_size": 64}, {"img_size": (64, 64)}):
        assert Pixels.of(create("vit_tiny_patch16_224", options={**VIT, **options})) == inception
    student = create("mobilenetv3_small_050")
    assert Pixels.of(student).image_size == 224
    assert Pixels.of(student).mean == timm.data.IMAGENET_DEFAULT_MEAN
    assert Pixels.of(nn.Identity()).std == timm.data.IMAGENET_DEFAULT_STD
    assert Pixels.of(create("mobilenetv3_small_050", image_size=96)).image_size == 96
    for kind in ("eva", "swin", "dinov2"):
        assert Pixels.of(teacher(kind)).image_size == 64
    with pytest.raises(ValueError, match="model: expected square images, got 64 x 32"):
        Pixels.of(create("vit_tiny_patch16_224", options={**VIT, "img_size": (64, 32)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (123.7, 116.3, 103.5)}, "Pixels: mean: .*, 103.5.; divide by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "Pixels: std: .*; divide by 255"),
        (
            {"std": (0.5, 0.5, 0.0)},
            r"Pixels: std: expected three numbers in \(0, 1\], got \(0.5, 0.5, 0.0\)",
        ),
        (
            {"mean": (0.5, float("nan"), 0.5)},
            r"Pixels: mean: expected three numbers in \[0, 1\], got .*nan",
        ),
        ({"mean": (0.5,)}, r"Pixels: mean: expected three numbers in \[0, 1\], got \(0.5,\)"),
        ({"crop_pct": 87.5}, "Pixels: crop_pct: .*, got 87.5; .* by 100"),
        ({"crop_pct": 0.0}, "Pixels: crop_pct: expected 0.1 to 2, got 0.0"),
    ],
)
def test_pixels_out_of_bounds(change: dict[str, Any], message: str) -> None:
    half = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=message):
        Pixels(**{"image_size": 64, "mean": half, "std": half, "interpolation": "bicubic",
                  "crop_pct": 0.9, **change})  # fmt: skip


def test_timms_models_are_in_bounds() -> None:
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        for crop_pct in {config.crop_pct, config.test_crop_pct or config.crop_pct}:
            Pixels(64, config.mean, config.std, config.interpolation, crop_pct)


def same(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return list(a_state) == list(b_state) and all(a_state[k].equal(b_state[k]) for k in a_state)


def test_create_reads_checkpoints(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    model = randomize(create(name, num_classes=4))
    state, other = model.state_dict(), create(name, num_classes=4).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    averaged = {"state_dict": other, "state_dict_ema": state}
    for i, content in enumerate((state, {"state_dict": state}, {"model": wrapped}, averaged)):
        torch.save(content, file := tmp_path / f"{i}.pth")
        assert same(create(name, num_classes=4, checkpoint=file), model)
    safetensors.torch.save_file(state, file := tmp_path / "bare.safetensors")
    assert same(create(name, num_classes=4, checkpoint=str(file)), model)


def test_create_resamples_position_embeddings(tmp_path: Path) -> None:
    vit = teacher("vit")
    torch.save(vit.state_dict(), file := tmp_path / "vit.pt")
    arguments: dict[str, Any] = {"num_classes": 5, "checkpoint": file, "options": VIT}
    small = create("vit_tiny_patch16_224", image_size=32, **arguments)
    assert small.pos_embed.shape == (1, 1 + 4, 48) and small.head.weight.equal(vit.head.weight)
    assert same(create("vit_tiny_patch16_224", image_size=64, **arguments), vit)


def test_create_errors(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    with pytest.raises(ValueError, match=r"got 'mobilenet_v3_smal_050'; .*nearest.* " + name):
        create("mobilenet_v3_smal_050")
    with pytest.raises(ValueError, match=r"nearest are .*mobilenetv3_small_050\.lamb_in1k"):
        create("mobilenetv3_small_050.lamb_in22k")
    with pytest.raises(ValueError, match=r"options \{'dept': 3\} does not fit .*'dept'"):
        create(name, image_size=64, options={"dept": 3})
    with pytest.raises(ValueError, match="'img_size'"):
        create(name, options={"img_size": 64})
    with pytest.raises(ValueError, match=r"checkpoint no\.pth: no such file"):
        create(name, checkpoint="no.pth")
    torch.save(create(name, num_classes=4).state_dict(), file := tmp_path / "four.pth")
    for classes in (3, None):
        fits_not = rf"four\.pth has 4 classes, and {name} with num_classes={classes} .*classifier"
        with pytest.raises(ValueError, match=fits_not):
            create(name, num_classes=classes, checkpoint=file)
    with pytest.raises(ValueError, match=r"four\.pth .* not fit mobilenetv2_050: .*blocks\.3\.2"):
        create("mobilenetv2_050", num_classes=4, checkpoint=file)
    for content in (b"", b"not a model", file.read_bytes()[:5000]):
        for suffix in (".pth", ".safetensors"):
            (damaged := tmp_path / f"damaged{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=rf"damaged{suffix} is (damaged|empty)"):
                create(name, num_classes=4, checkpoint=damaged)


def saved(file: Path, model: Any, **changes: Any) -> Path:
    about = {"name": "mobilenetv3_small_050", "options": {"drop_rate": 0.1, "num_classes": 2},
             "num_classes": 2,
             "pixels": Pixels(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9),
             "classes": ("cat", "dog")}  # fmt: skip
    save(file, model, **{**about, **changes})
    return file


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(1)
    return randomize(create("mobilenetv3_small_050", num_classes=2, options={"drop_rate": 0.1}))


def test_save_and_load(tmp_path: Path, student: nn.Module, x: Tensor) -> None:
    channels_last = copy.deepcopy(student).to(memory_format=torch.channels_last)
    wrapped = {f"_orig_mod.{key}": value for key, value in student.state_dict().items()}
    for i, given in enumerate((student, student.state_dict(), channels_last, wrapped)):
        file = saved(tmp_path / f"{i}.safetensors", given)
        model, pixels, classes = load(file)
        assert same(model, student) and not model.training and model(x).equal(student(x))
        assert model.drop_rate == 0.1 and load(file, options={"drop_rate": 0.3})[0].drop_rate == 0.3
        assert pixels == Pixels(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
        assert classes == ("cat", "dog") and hash(pixels)
        assert same(create("mobilenetv3_small_050", num_classes=2, checkpoint=file), student)


@pytest.mark.parametrize("kind", ["vit", "eva", "dinov3", "swin"])
def test_save_and_load_transformers(tmp_path: Path, kind: str, x: Tensor) -> None:
    model, (name, options) = teacher(kind), TEACHERS[kind]
    pixels = Pixels.of(model)
    file = saved(
        tmp_path / "a.safetensors", model,
        name=name, options=options, num_classes=5, pixels=pixels, classes="abcde",
    )  # fmt: skip
    loaded = load(file)
    assert same(loaded.model, model) and loaded.model(x).equal(model(x))
    assert loaded.pixels == pixels == Pixels.of(loaded.model)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_save_changes_nothing(
    tmp_path: Path, student: nn.Module, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path / "a.safetensors", student)
    before = file.read_bytes()

    def full(*args: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # what is written lies beside
        raise OSError("No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        saved(file, create("mobilenetv3_small_050", num_classes=2))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_save_and_load_errors(tmp_path: Path, student: nn.Module) -> None:
    file = saved(tmp_path / "a.safetensors", student)
    with pytest.raises(ValueError, match=r"path: expected a name in \.safetensors, got .*a\.pth"):
        saved(tmp_path / "a.pth", student)
    with pytest.raises(ValueError, match="classes: expected 2 names, got 1"):
        saved(file, student, classes=["cat"])
    whole = file.read_bytes()
    for content in (b"", whole[:4], whole[:500], whole[:-1], b"GIF89a" * 9):
        (damaged := tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"source .*damaged\.safetensors is (damaged|empty)"):
            load(damaged)
    safetensors.torch.save_file(student.state_dict(), bare := tmp_path / "bare.safetensors")
    torch.save(student.state_dict(), torchs := tmp_path / "bare.pth")
    for path in (bare, torchs):
        with pytest.raises(ValueError, match=r"bare.*timm's name: models\.create\(name, checkp"):
            load(path)
    metadata = {"vitkd_fast": json.dumps({"version": 99})}
    safetensors.torch.save_file(student.state_dict(), bare, metadata)
    with pytest.raises(ValueError, match=r"bare\.safetensors .*: version: expected 1, got 99"):
        load(bare)
    with pytest.raises(FileNotFoundError, match=r"source gone\.safetensors is not a file"):
        load("gone.safetensors")
    with pytest.raises(ValueError, match=r"name: expected .*, got 'mobilenet_v9'"):
        load("mobilenet_v9")


def test_load_names_timms_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: build(name, **k))
    model, pixels, classes = load("mobilenetv3_small_050")
    assert not model.training and len(classes) == 1000 and pixels == Pixels.of(model)
    assert classes[0] == "tench, Tinca tinca"
    assert load("mobilenetv3_small_050", options={"num_classes": 3}).classes == ("0", "1", "2")
    assert replace(pixels, image_size=96).image_size == 96


def test_readmes_example_of_attention() -> None:
    """It runs as it stands, and student and projection learn from it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("\n## Teach attention and features\n")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"] > 0
    assert names["attention"].projection.weight.grad.abs().sum() > 0
    assert names["student"].model.conv_stem.weight.grad.abs().sum() > 0
