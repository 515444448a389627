"""Fidelity and calibration of trained networks' answers, against direct computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.audit_tools import CLASSES
from vitkd_fast.audit import calibration, fidelity

pytestmark = pytest.mark.usefixtures("one_thread")


def direct_ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """15 bins, open on the right but for the last."""
    total, bins = 0.0, np.minimum((confidence * 15).astype(int), 14)
    for i in range(15):
        of = bins == i
        total += abs(right[of].sum() - confidence[of].sum())
    return float(total / len(right))


def test_the_answers_are_those_of_the_networks(said) -> None:
    top1 = [
        float((x.argmax(1) == said.labels).float().mean()) for x in (said.teacher, said.student)
    ]
    assert min(top1) > 0.85  # or nothing that is measured on them would mean much
    found = fidelity.metrics(said, 10)
    assert [found[who]["top1"] for who in ("teacher", "student")] == pytest.approx(top1)
    nll = float(F.cross_entropy(said.student, said.labels))
    assert found["student"]["nll"] == pytest.approx(nll, rel=1e-4)


def test_fidelity(said) -> None:
    temperatures = 1.5, 0.8
    overall = fidelity.metrics(said, 10)["fidelity"]
    found, alike = fidelity.fidelity(said, CLASSES, temperatures, overall)
    same = said.student.argmax(1) == said.teacher.argmax(1)
    assert found["agreement"] == pytest.approx(float(same.double().mean()))
    low, high = found["agreement_interval"]
    assert 0 < low < found["agreement"] < high <= 1
    log_s, log_t = (x.double().log_softmax(1) for x in (said.student, said.teacher))
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    p, q = (said.student.double() / 1.5).softmax(1), (said.teacher.double() / 0.8).softmax(1)
    middle = (p + q) / 2
    js = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(1) / 2 / np.log(2)
    assert alike == pytest.approx(1 - js.numpy(), abs=1e-9)
    assert found["similarity"] == pytest.approx(float(1 - js.mean()))
    low, high = found["similarity_interval"]
    error = float(js.std()) / len(js) ** 0.5  # the interval of the mean is about two of it wide
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    for row in found["classes"]:
        of = said.labels == int(row["class"])
        assert row["images"] == int(of.sum())
        assert row["agreement"] == pytest.approx(float(same[of].double().mean()))
        assert row["kl"] == pytest.approx(float(kl[of].mean()), rel=1e-4, abs=1e-7)
        assert row["similarity"] == pytest.approx(float(1 - js[of].mean()))


def test_similarity_of_equals_and_of_strangers() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1e4, -1e4, 0.0]])
    assert fidelity.similarity(logits, logits) == pytest.approx(1)
    assert fidelity.similarity(logits[1:], -logits[1:]) == pytest.approx(0)
    # temperatures that undo a factor leave nothing that differs
    assert fidelity.similarity(3 * logits, logits, (3.0, 1.0)) == pytest.approx(1)


def test_ece_and_its_bins(said) -> None:
    right = said.student.argmax(1) == said.labels
    for temperature in (0.01, 0.3, 1, 4):  # at the first most are exactly 1 in float32
        sure = calibration.confidence(said.student, temperature)
        expected = direct_ece(sure.float().numpy(), right.numpy())
        assert calibration.ece(sure, right) == pytest.approx(expected, abs=1e-6)
        bins = calibration.reliability(sure, right)
        assert sum(x.images for x in bins) == len(right)
        gap = sum(x.images * abs(x.accuracy - x.confidence) for x in bins) / len(right)
        assert gap == pytest.approx(expected, abs=1e-6)


def test_a_temperature_minimises_the_nll(said) -> None:
    found = calibration.fit_temperature(said.student, said.labels)
    least = calibration.nll(said.student, said.labels, found)
    direct = F.cross_entropy(said.student.double() / found, said.labels)
    assert least == pytest.approx(float(direct))
    for factor in (0.5, 0.99, 1.01, 2):
        assert calibration.nll(said.student, said.labels, found * factor) > least
    # of logits that are three times as large it is three times as large
    assert calibration.fit_temperature(3 * said.student, said.labels) == pytest.approx(
        3 * found, rel=1e-4
    )


def test_scaled_is_of_images_that_the_temperature_was_not_fitted_on(said) -> None:
    logits = 4 * said.student  # too sure
    found = calibration.calibrate(logits, said.labels)
    right = logits.argmax(1) == said.labels
    sure, loss = torch.empty(len(right), dtype=torch.float64), 0.0
    for half, other in ((0, 1), (1, 0)):
        t = calibration.fit_temperature(logits[other::2], said.labels[other::2])
        sure[half::2] = (logits[half::2].double() / t).softmax(1).amax(1)
        own = F.cross_entropy(logits[half::2].double() / t, said.labels[half::2], reduction="sum")
        loss += float(own)
    assert found.ece_scaled == pytest.approx(
        direct_ece(sure.float().numpy(), right.numpy()), abs=1e-6
    )
    assert found.nll_scaled == pytest.approx(loss / len(right))
    assert found.ece_scaled < found.ece and found.nll_scaled < found.nll
    assert not found.bounded and found.temperature > 1
    low, high = found.ece_interval
    assert low < found.ece < high


def test_the_interval_of_a_calibrated_model_reaches_down_to_0() -> None:
    """Where the plain quantiles of resamples lie above the truth."""
    rng = np.random.default_rng(0)
    sure = torch.from_numpy(rng.uniform(0.5, 1, 1000))
    right = torch.from_numpy(rng.uniform(size=1000)) < sure
    low, high = calibration.ece_interval(sure, right, 0.05)
    assert low < 0.01 and calibration.ece(sure, right) > 0.01
    assert 0.01 < high < 0.1


def test_no_temperature_fits_a_model_that_is_always_right(said) -> None:
    logits = said.student.clone()
    logits[torch.arange(len(logits)), said.labels] = 100
    found = calibration.calibrate(logits, said.labels)
    assert found.bounded and found.temperature == pytest.approx(0.01, rel=0.01)
