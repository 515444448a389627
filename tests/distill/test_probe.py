"""What features alone are worth: nearest neighbours, a linear classifier."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from vitkd_fast import models
from vitkd_fast.distill import probe
from vitkd_fast.distill.data import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(images: int, classes: int = 5, noise: float = 1.0, seed: int = 0) -> probe.Features:
    """A cloud around a point of each class."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(classes, 12, generator=generator)
    generator.manual_seed(seed)
    labels = torch.arange(images) % classes
    x = points[labels] + noise * torch.randn(images, 12, generator=generator)
    return probe.Features(x, labels)


def test_neighbours_vote_by_their_cosine() -> None:
    """Beside the formula, image by image."""
    bank, x = drawn(60), drawn(31, seed=2).x
    found = probe.nearest(bank, x, 5)
    for row, answer in zip(x.double(), found.tolist(), strict=True):
        cosines = [float(row @ g / row.norm() / g.norm()) for g in bank.x.double()]
        votes = [0.0] * 5
        for i in sorted(range(60), key=lambda i: -cosines[i])[:20]:
            votes[int(bank.labels[i])] += math.exp(cosines[i] / 0.07)
        assert answer == max(range(5), key=votes.__getitem__)
    assert len(set(found.tolist())) > 1


def test_neighbours_see_directions_alone_and_fewer_than_k() -> None:
    bank, x = drawn(7), drawn(9, seed=2).x
    found = probe.nearest(bank, x, 5)
    assert torch.equal(probe.nearest(bank._replace(x=1e-3 * bank.x), 1e3 * x, 5), found)
    nearest_one = (nn.functional.normalize(x) @ nn.functional.normalize(bank.x).T).argmax(1)
    assert torch.equal(probe.nearest(bank, x, 5, k=1), bank.labels[nearest_one])
    assert len(probe.nearest(bank, x[:0], 5)) == 0


def test_knn_is_chance_for_noise_and_certain_for_points() -> None:
    bank, scored = drawn(200, noise=0.1), drawn(100, noise=0.1, seed=2)
    assert probe.knn(bank, scored, 5) == 1.0
    shuffled = scored._replace(labels=scored.labels.roll(1))
    assert probe.knn(bank, shuffled, 5) == 0.0


@pytest.mark.parametrize("classes", [2, 5])
def test_a_head_is_scikit_learns_on_features_as_they_are(classes: int) -> None:
    bank, x = drawn(80, classes), drawn(20, classes, seed=2).x
    bank.x[:, 3] = 2.5  # the same everywhere: no standard deviation
    x[:, 3] = 2.5
    bank.x[:, 4] *= 1e3
    x[:, 4] *= 1e3
    head = probe.fit(bank, classes)
    assert [*head.weight.shape] == [classes, 12] and [*head.bias.shape] == [classes]
    spread = bank.x.std(0, correction=0).clamp(min=1e-9)
    model = LogisticRegression(max_iter=1000)
    model.fit(((bank.x - bank.x.mean(0)) / spread).double().numpy(), bank.labels.numpy())
    wanted = model.predict_proba(((x - bank.x.mean(0)) / spread).double().numpy())
    found = (x @ head.weight.T + head.bias).softmax(1)
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=0, atol=1e-3)


def test_features_are_gathered_and_checked() -> None:
    def batch(value: float) -> Batch:
        images = torch.full((2, 3, 4, 4), int(value), dtype=torch.uint8)
        return Batch(images, torch.tensor([0, 1]), torch.arange(2), [])

    found = probe.features(lambda x: x.float().mean((2, 3)) / 2, map(batch, (1, 5)), "cpu")
    assert found.x[:, 0].tolist() == [0.5, 0.5, 2.5, 2.5]
    assert found.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="expected finite features, got NaN or Inf for 2 of 4"):
        probe.features(lambda x: (x.float() - 1).mean((2, 3)).log(), map(batch, (1, 5)), "cpu")
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        probe.features(lambda x: x, [], "cpu")


BODIES = {
    "vit_small_patch14_dinov2": 28,
    "vit_small_patch16_dinov3": 32,
    "vit_base_patch16_224.mae": 32,
    "vit_base_patch16_clip_224": 32,
    "mobilenetv1_100": 0,
    "mobilenetv2_035": 0,
    "mobilenetv3_small_050": 0,
    "mobilenetv4_conv_small_035": 0,
}


@pytest.mark.parametrize("name", BODIES)
def test_a_model_without_its_classifier_returns_what_that_would_read(name: str) -> None:
    side = BODIES[name]
    options = {"depth": 1, "img_size": side} if side else {}
    model = models.create(name, num_classes=3, options=options).eval()
    torch.manual_seed(0)
    x = torch.randn(2, 3, side or 64, side or 64)
    head = model.get_classifier()
    seen: list[Tensor] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        body = models.headless(model)
        assert torch.equal(body(x), seen[0].flatten(1))
        weight, bias = torch.randn(7, seen[0].shape[1]), torch.randn(7)
        made = models.with_classifier(body, weight, bias)
        torch.testing.assert_close(made(x), nn.functional.linear(body(x), weight, bias))
        assert torch.equal(body(x), seen[0].flatten(1))  # which stays as it was
    with pytest.raises(ValueError, match="with_classifier: weight: expected the shape of Linear"):
        models.with_classifier(body, weight[:, 1:], bias)
