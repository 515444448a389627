"""Terms of the loop that compare features: each learns, and its gradient arrives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vitkd_fast import models
from vitkd_fast.distill import datasets
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.losses import BCE, BinaryKD, ClassCosts, StepOutputs
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.functional import (
    at_loss,
    binary_kd_loss,
    cc_loss,
    deit_hard_loss,
    feature_loss,
    kd_loss,
    mlkd_loss,
    mmd_loss,
    nst_loss,
    ofa_loss,
    pkt_loss,
    relation_loss,
    rkd_loss,
    sliced_wasserstein_loss,
    sp_loss,
    spearman_loss,
    wkd_cost,
    wkd_feature_loss,
    wkd_logit_loss,
)
from vitkd_fast.nn import DistillationHead, OFABranches
from vitkd_fast.taps import TapOutputs

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = [
    "at: {stride: 8}",
    "at: {stride: 4, p: 1.0, teacher_stride: 8}",
    "feature: {stride: 8}",
    "feature: {stride: 8, kind: cosine, block: 0}",
    "feature: {stride: 4, kind: smooth_l1, normalize_teacher: layer_norm, teacher_stride: 8}",
    "feature: {features: pooled}",
    "features: {stride: 8}",
    "features: {stride: 4, teacher_stride: 8, cosine: 1.0, smooth_l1: 0, parts: patches}",
    "features: {parts: pooled, normalize_teacher: none}",
    "nst: {stride: 8}",
    "rkd: {}",
    "relation: {stride: 8}",
    "relation: {stride: 8, heads: 4, kind: js}",
    "relation: {stride: 4, teacher_stride: 8, similarity: cosine, temperature: 0.2}",
    "sp: {stride: 8}",
    "sp: {features: pooled}",
    "pkt: {}",
    "cc: {}",
    "mmd: {stride: 8}",
    "mmd: {stride: 4, teacher_stride: 8, bandwidth: 0.5}",
    "wkd_feature: {stride: 8}",
    "wkd_feature: {stride: 4, cells: 2, block: 0}",
    "sliced_wasserstein: {stride: 8}",
    "sliced_wasserstein: {stride: 4, teacher_stride: 8, p: 1.0}",
]
OF_LOGITS = [
    "mlkd: {}",
    "mlkd: {temperatures: [4], kd_weight: 0}",
    "spearman: {softness: 0.5}",
    "wkd_logit: {}",
]
OF_FEATURES = [*dict.fromkeys(of.split(":")[0] for of in TERMS)]
SLOW = ["pkt"]  # to learn, in a batch of 32


def every_day_once(terms: list[str]) -> list[Any]:
    """Each term once; with other options it is slow."""
    first = {of.split(":")[0]: of for of in reversed(terms)}
    return [pytest.param(x, marks=() if x in first.values() else pytest.mark.slow) for x in terms]


def task(losses: str, **teacher: Any) -> DistillationTask:
    config = load("digits", [f"losses={{ce: {{weight: 0}}, {losses}}}", "data.image_size=32"])
    torch.manual_seed(0)
    student = models.create("mobilenetv2_035", num_classes=10)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **teacher}
    made = models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, options=options)
    return DistillationTask.create(config, student, made, Runtime(torch.device("cpu")))


@functools.cache
def batch() -> tuple[Tensor, Tensor]:
    digits = datasets.Digits()
    small = torch.as_tensor(digits.images[:32])[:, None].expand(-1, 3, -1, -1)
    return interpolate(small, 32), torch.as_tensor(digits.labels[:32])


@pytest.mark.parametrize("losses", every_day_once([*TERMS, *OF_LOGITS]))
def test_a_term_learns(losses: str) -> None:
    made = task(losses).train()
    name = losses.split(":")[0]
    learned = made.trainable_module.learned
    widths_differ = name in ("feature", "features", "wkd_feature")
    assert bool([*learned.parameters()]) == widths_differ
    optimizer = torch.optim.Adam(made.trainable_module.parameters(), 2e-3)
    before = {key: x.clone() for key, x in learned.named_parameters()}
    course = []
    for _ in range(48 if name in SLOW else 16):
        result = made(*batch(), 0.0)
        optimizer.zero_grad()
        result["loss"].backward()
        for x in (made.student.get_parameter("conv_stem.weight"), *learned.parameters()):
            assert x.grad is not None and x.grad.abs().sum() > 0
        optimizer.step()
        course.append(result["terms"][1].item())
    assert sum(course[-3:]) < 0.8 * sum(course[:3]), course
    assert all(not torch.equal(x, before[key]) for key, x in learned.named_parameters())
    assert all(x.grad is None for x in made.teachers.parameters())


def outputs() -> StepOutputs:
    """A student and a teacher, as if they had been tapped: 4x4 patches behind a class token."""
    student = TapOutputs(
        torch.randn(3, 10), pooled=torch.randn(3, 24), maps={8: torch.randn(3, 8, 4, 4)}
    )
    teacher = TapOutputs(
        torch.randn(3, 10),
        pooled=torch.randn(3, 16),
        tokens={-1: torch.randn(3, 17, 16)},
        prefix_tokens=1,
        grid=(4, 4),
    )
    return StepOutputs(student, teacher, torch.tensor([1, 2, 3]))


def value(losses: str, given: StepOutputs, x: float = 0.0, learned: nn.Module | None = None):
    """Of the term that a configuration describes."""
    name = losses.split(":")[0]
    made = getattr(load("digits", [f"losses={{ce: {{}}, {losses}}}"]).losses, name)
    return made(given, x, learned)


def test_terms_are_the_functions() -> None:
    """Of the map and the patches without the class token, times the weight."""
    given = outputs()
    assert given.teacher is not None and given.teacher.pooled is not None
    assert given.student.pooled is not None
    f_s, f_t = given.student.maps[8], given.teacher.tokens[-1][:, 1:]
    pooled = given.student.pooled, given.teacher.pooled
    layer, wide = nn.Linear(8, 16), nn.Linear(24, 16)
    learned = [nn.ModuleDict({"projection": x}) for x in (layer, wide)]
    conv = nn.Conv2d(8, 16, 1)
    found = [
        value("at: {stride: 8, p: 3.0}", given),
        value("nst: {stride: 8}", given),
        value("rkd: {angle_weight: 2}", given),
        value("relation: {stride: 8, heads: 2}", given),
        value("feature: {stride: 8}", given, learned=learned[0]),
        value("feature: {features: pooled, kind: cosine}", given, learned=learned[1]),
        value("sp: {stride: 8}", given),
        value("sp: {features: pooled}", given),
        value("pkt: {}", given),
        value("cc: {gamma: 0.5, order: 3}", given),
        value("mmd: {stride: 8, bandwidth: median}", given),
        value("mmd: {stride: 8, bandwidth: 2}", given),
        value("wkd_feature: {stride: 8, cells: 2}", given, learned=conv),
        value("sliced_wasserstein: {stride: 8, projections: 3, seed: 4}", given),
    ]
    heads = [x.unflatten(2, (2, -1)).transpose(1, 2) for x in (f_s.flatten(2).mT, f_t)]
    points = [nn.functional.normalize(x, dim=2) for x in (f_s.flatten(2), f_t.mT)]
    wanted = [
        at_loss(f_s, f_t, p=3.0),
        nst_loss(f_s, f_t),
        rkd_loss(*pooled, angle_weight=2),
        relation_loss(*heads),
        feature_loss(f_s, f_t, layer.weight, layer.bias),
        1 - nn.functional.cosine_similarity(wide(pooled[0]), pooled[1]).mean(),
        sp_loss(f_s.flatten(1), f_t.flatten(1)),
        sp_loss(*pooled),
        pkt_loss(*pooled),
        cc_loss(*pooled, gamma=0.5, order=3),
        mmd_loss(f_s, f_t, bandwidth="median"),
        mmd_loss(f_s, f_t, bandwidth=2),
        wkd_feature_loss(conv(f_s), f_t, cells=2),
        sliced_wasserstein_loss(*points, projections=3, seed=4),
    ]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_terms_of_several_labels() -> None:
    """Multi-hot labels, and those of mixed images."""
    given = outputs()
    assert given.teacher is not None
    s, t = given.student.logits, given.teacher.logits
    a, b = (torch.rand(3, 10) < 0.4).float(), (torch.rand(3, 10) < 0.4).float()
    share = torch.tensor([0.2, 0.5, 1.0])
    term = BinaryKD.model_validate({"temperature": 2.0, "weight": 0.5, "bce_weight": 0.3})
    for labels, y in ((a, a), ((a, b, share), a * share[:, None] + b * (1 - share[:, None]))):
        seen = given._replace(labels=labels)
        want = binary_kd_loss(s, t, y, temperature=2.0, kd_weight=0.5, bce_weight=0.3)
        torch.testing.assert_close(term(seen, 0.0, None), want)
        bce = nn.functional.binary_cross_entropy_with_logits(s, y)
        twice = BCE.model_validate({"weight": 2})
        torch.testing.assert_close(twice(seen, 0.0, None), 2 * bce)


HEADS = [
    "ofa: {eps: 1.5}",
    "ofa: {strides: [8, 32], temperature: 2.0}",
    "token: {}",
    "token: {kind: soft, temperature: 2.0}",
    "deit_hard: {label_smoothing: 0.1}",
]


@pytest.mark.parametrize("losses", HEADS)
def test_a_head_learns_from_labels_and_teacher(losses: str) -> None:
    """Without another term, and its layer with it."""
    name = losses.split(":")[0]
    made = task(losses).train()
    learned = made.trainable_module.learned
    assert [*learned] == ([] if name == "deit_hard" else [name])
    optimizer = torch.optim.Adam(made.trainable_module.parameters(), 2e-3)
    course = []
    for _ in range(16):
        result = made(*batch(), 0.0)
        optimizer.zero_grad()
        result["loss"].backward()
        for x in (*made.student.get_classifier().parameters(), *learned.parameters()):
            assert x.grad is not None and x.grad.isfinite().all()
        assert made.student.get_parameter("conv_stem.weight").grad.abs().sum() > 0
        optimizer.step()
        course.append(result["terms"][1].item())
    falls_to = 0.9 if name == "ofa" else 0.8  # of ofa, the teacher's entropy is a part
    assert sum(course[-3:]) < falls_to * sum(course[:3]), course
    load("digits", [f"losses={{{losses}}}"])  # and trains a classifier by itself


def test_a_student_of_two_heads_keeps_them() -> None:
    """A distilled DeiT's: what it returns is their mean."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    student = models.create(
        "deit_tiny_distilled_patch16_224", num_classes=10, image_size=32, options=options
    )
    config = load("digits", ["losses={token: {}}", "data.image_size=32"])
    teacher = models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, options=options)
    made = DistillationTask.create(config, student, teacher, Runtime(torch.device("cpu"))).eval()
    assert not made.trainable_module.learned
    images, labels = batch()
    seen: list[Tensor] = []
    for head in (student.head, student.head_dist):
        torch.nn.init.normal_(head.weight)
        head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = made(images, labels, 0.0)["loss"]
    (choice,) = made.teacher_outputs(images)
    want = deit_hard_loss((seen[0], seen[1]), choice.logits, labels)
    torch.testing.assert_close(found, want)


def test_terms_of_heads_are_the_functions() -> None:
    given = outputs()
    assert given.teacher is not None and given.student.pooled is not None
    head = DistillationHead(24, 10)
    nn.init.normal_(head.difference.weight)
    of_labels, of_teacher = head(given.student.pooled, given.student.logits)
    teacher, labels = given.teacher.logits, given.labels
    entropy = nn.functional.cross_entropy(of_labels, labels)
    branches = OFABranches([8], 10, 24).eval()
    both = [*branches([given.student.maps[8]]), given.student.logits]
    options = {"temperature": 2.0, "eps": 1.5}
    found = value("ofa: {weight: 3, strides: [8], temperature: 2.0, eps: 1.5}", given, 0, branches)
    torch.testing.assert_close(found, 3 * ofa_loss(both, teacher, labels, **options))
    for losses, want in (
        ("token: {weight: 2, alpha: 0.3}",
         2 * deit_hard_loss((of_labels, of_teacher), teacher, labels, alpha=0.3)),
        ("token: {weight: 2, kind: soft, alpha: 0.3, temperature: 2.0}",
         1.4 * entropy + 0.6 * kd_loss(of_teacher, teacher, temperature=2.0)),
        ("deit_hard: {weight: 2, alpha: 0.3}",
         2 * deit_hard_loss(given.student.logits, teacher, labels, alpha=0.3)),
    ):  # fmt: skip
        learned = head if losses.startswith("token") else None
        torch.testing.assert_close(value(losses, given, learned=learned), want)


@pytest.mark.parametrize(
    "name", ["at", "nst", "rkd", "relation", "sp", "pkt", "cc", "mmd", "sliced_wasserstein"]
)
def test_weights_are_schedules(name: str) -> None:
    given = outputs()
    stride = "" if name in ("rkd", "pkt", "cc") else "stride: 8, "
    one = value(f"{name}: {{{stride}weight: 1}}", given)
    text = f"{name}: {{{stride}weight: {{start: 0, end: 3, until: 0.5}}}}"
    for x, factor in ((0.0, 0.0), (0.25, 1.5), (1.0, 3.0)):
        torch.testing.assert_close(value(text, given, x), factor * one)


def test_features_are_pooled_and_patches_through_a_layer_each() -> None:
    """Beside the maths written out, without the functions of losses."""
    given = outputs()
    assert given.teacher is not None and given.teacher.pooled is not None
    layers = nn.ModuleDict({"pooled": nn.Linear(24, 16), "patches": nn.Linear(8, 16)})
    pairs = {
        "pooled": (given.student.pooled, given.teacher.pooled),
        "patches": (given.student.maps[8].flatten(2).mT, given.teacher.tokens[-1][:, 1:]),
    }
    errors = {}
    for part, (f_s, f_t) in pairs.items():
        assert f_s is not None
        found, wanted = layers[part](f_s), nn.functional.layer_norm(f_t, (16,))
        apart = 1 - nn.functional.cosine_similarity(found, wanted, dim=-1).mean()
        errors[part] = 0.7 * apart + 0.2 * nn.functional.smooth_l1_loss(found, wanted, beta=0.5)
    options = "stride: 8, cosine: 0.7, smooth_l1: 0.2, beta: 0.5"
    both = value(f"features: {{weight: 3, {options}}}", given, learned=layers)
    torch.testing.assert_close(both, 1.5 * (errors["pooled"] + errors["patches"]))
    for part, wanted in errors.items():
        found = value(f"features: {{{options}, parts: {part}}}", given, learned=layers)
        torch.testing.assert_close(found, wanted)


def test_features_are_standardised_by_the_first_images() -> None:
    """Each part of the teacher, normalised, gets mean 0 and variance 1; without, nothing is."""
    made = task("features: {stride: 8}")
    images = batch()[0]
    made.calibrate(iter([images[:20], images[20:]]))
    (teacher,) = made.teacher_outputs(images)
    learned = made.trainable_module.learned["features"]
    term = made.trainable_module.terms["features"]
    targets = {part: f_t for part, f_t, _ in term.targets(teacher)}
    assert targets["patches"].shape == (32, 16, 32) and targets["pooled"].shape == (32, 1, 32)
    for part, f_t in targets.items():
        found = learned[f"standardize_{part}"](f_t).flatten(0, 1)
        torch.testing.assert_close(found.mean(0), torch.zeros(32), rtol=0, atol=1e-3)
        torch.testing.assert_close(found.var(0, correction=0), torch.ones(32), rtol=0, atol=1e-2)
    plain = task("features: {stride: 8, standardize: none}").trainable_module.learned["features"]
    assert {*plain} == {"pooled", "patches"}


def test_a_projection_is_learned_where_widths_differ() -> None:
    assert not task("feature: {stride: 8}", embed_dim=16).trainable_module.learned
    assert not task("wkd_feature: {stride: 8}", embed_dim=16).trainable_module.learned
    for losses, width in (("feature: {stride: 8, projection: always}", 16), (TERMS[2], 32)):
        layer = task(losses, embed_dim=width).trainable_module.learned["feature"]["projection"]
        assert [*layer.weight.shape] == [width, 16]


def test_heads_that_do_not_divide_a_width_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^relation: heads: expected a divisor of .* 16 channels"):
        task("relation: {stride: 8, heads: 3}")(*batch())


@pytest.mark.parametrize(
    "name",
    [
        "at",
        "feature",
        "features",
        "nst",
        "rkd",
        "relation",
        "sp",
        "pkt",
        "cc",
        "mmd",
        "wkd_feature",
        "sliced_wasserstein",
    ],
)
def test_features_train_no_classifier(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^losses.{name}: trains no classifier; add losses.kd"):
        load("digits", [f"losses={yaml.safe_dump({name: {}}, default_flow_style=True)}"])
    with pytest.raises(ConfigError, match=f"^teacher.model: missing, and losses.{name} needs a t"):
        load("digits", [f"losses={{ce: {{}}, {name}: {{}}}}", "teacher.model=''"])


def test_terms_of_logits_are_the_functions() -> None:
    given = outputs()
    assert given.teacher is not None
    pair = given.student.logits, given.teacher.logits
    costs = ClassCosts(torch.randn(10, 4), 2.0)
    found = [
        value("mlkd: {temperatures: [2, 3], class_weight: 5}", given),
        value("spearman: {softness: 2}", given),
        value("wkd_logit: {iterations: 3, weight: 2}", given, learned=costs),
    ]
    wanted = [
        mlkd_loss(*pair, temperatures=(2, 3), class_weight=5),
        spearman_loss(*pair, softness=2),
        2 * wkd_logit_loss(*pair, costs.cost, given.labels, iterations=3),
    ]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_of_mixed_labels_the_larger_share_counts() -> None:
    given, costs = outputs(), ClassCosts(torch.randn(10, 4), 2.0)
    a, b = given.labels, torch.tensor([4, 5, 6])
    assert isinstance(a, Tensor)
    for share, wanted in (
        (0.7, a),
        (0.3, b),
        (torch.tensor([0.9, 0.1, 0.8]), torch.tensor([1, 5, 3])),
    ):
        of = [
            value("wkd_logit: {}", given._replace(labels=x), learned=costs)
            for x in ((a, b, share), wanted)
        ]
        assert torch.equal(*of)


def test_costs_are_those_of_the_teachers_classifier() -> None:
    made = task("wkd_logit: {}")
    (teacher,) = made.teachers
    weight = teacher[1].get_classifier().weight
    torch.testing.assert_close(made.trainable_module.learned["wkd_logit"].cost, wkd_cost(weight))
