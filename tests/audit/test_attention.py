"""Maps of where networks look, against direct computations, and their overlap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from support.audit_tools import PIXELS, Trained, digits
from vitkd_fast import models
from vitkd_fast.audit import attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return models.Normalize(PIXELS.mean, PIXELS.std)(digits()[0][1:7])


def direct_rollout(model, x: torch.Tensor) -> torch.Tensor:
    """From the maps that the attention itself makes when it is not fused: [B, N, N]."""
    maps, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        keep = lambda _, given: maps.append(given[0])  # noqa: E731
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(x)
    for hook, block in zip(hooks, model.blocks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    flow = torch.eye(maps[0].shape[-1])
    for each in maps:
        flow = (each.mean(1) + torch.eye(each.shape[-1])) / 2 @ flow
    return flow


def test_rollout_of_a_trained_vit(trained: Trained, x: torch.Tensor) -> None:
    model = models.load(trained.teacher).model
    flow = direct_rollout(model, x)
    found = attention.rollout(model, x)
    assert found.shape == (6, 4, 4)
    torch.testing.assert_close(found, flow[:, 0, 1:].unflatten(1, (4, 4)))
    assert (found.sum((1, 2)) < 1).all() and found.flatten(1).std(1).min() > 1e-4


@pytest.mark.parametrize("class_token", [True, False])
def test_rollout_without_a_classifying_token(class_token: bool, x: torch.Tensor) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    options |= {"global_pool": "avg", "class_token": class_token}
    model = models.create("vit_tiny_patch16_224", num_classes=10, options=options).eval()
    flow, first = direct_rollout(model, x), int(class_token)
    expected = flow[:, first:, first:].mean(1).unflatten(1, (4, 4))
    torch.testing.assert_close(attention.rollout(model, x), expected)


def test_grad_cam_of_a_trained_convnet(trained: Trained, x: torch.Tensor) -> None:
    model = models.load(trained.student).model
    kept = {}
    layer = attention.last_map(model, 32)
    hook = layer.register_forward_hook(lambda *args: kept.update(map=args[-1]))
    logits = model(x)
    hook.remove()
    [gradient] = torch.autograd.grad(logits.amax(1).sum(), kept["map"])
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * kept["map"]).sum(1).relu()
    torch.testing.assert_close(attention.grad_cam(model, x), expected)
    assert all(p.grad is None for p in model.parameters())


def test_the_last_map_is_one_that_shows_where() -> None:
    model = models.create("mobilenetv3_small_050", num_classes=10)
    layers = {x["reduction"]: model.get_submodule(x["module"]) for x in model.feature_info}
    for size, reduction in ((224, 32), (128, 32), (127, 16), (32, 8), (4, 2)):
        assert attention.last_map(model, size) is layers[reduction]


def test_look_is_normalised_and_follows_the_image(trained: Trained) -> None:
    images = digits()[0][1:4].permute(0, 2, 3, 1).numpy()
    for file in (trained.teacher, trained.student):
        found = attention.look(models.load(file), images)
        assert found.shape == (3, attention.GRID, attention.GRID)
        sums = found.sum((1, 2))
        assert torch.allclose(sums[sums > 0], torch.ones(())) and (found >= 0).all()
        assert not torch.equal(found[0], found[1])


def test_overlap_of_maps_with_themselves_and_with_others() -> None:
    maps = torch.rand(5, attention.GRID, attention.GRID)
    same = attention.overlap(maps, maps)
    assert same.top == pytest.approx(1) and same.rank == pytest.approx(1) and same.blind == 0
    # two independent quarters share a sixteenth, of seven
    assert same.top_by_chance == pytest.approx(1 / 7, abs=0.04)
    assert same.rank_by_chance == pytest.approx(0, abs=0.1)
    opposite = attention.overlap(maps, maps.max() - maps)
    assert opposite.top == pytest.approx(0) and opposite.rank == pytest.approx(-1)


def test_overlap_leaves_out_what_has_no_map() -> None:
    teacher, student = torch.rand(2, 4, attention.GRID, attention.GRID)
    student[2] = 0
    found = attention.overlap(teacher, student)
    assert found.blind == 1 and len(found.top) == 3
    for i, place in enumerate((0, 1, 3)):
        a, b = teacher[place].flatten().numpy(), student[place].flatten().numpy()
        assert found.rank[i] == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
        top = [set(np.argsort(-x)[: len(x) // 4]) for x in (a, b)]
        assert found.top[i] == pytest.approx(len(top[0] & top[1]) / len(top[0] | top[1]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
        ),
        ("beit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 1}),
    ],
)
def test_models_without_a_map_are_named(name: str, options: dict) -> None:
    model = models.create(name, num_classes=10, options=options)
    with pytest.raises(attention.NoMap, match="expected a plain vision transformer or a convnet"):
        attention.method(model)
