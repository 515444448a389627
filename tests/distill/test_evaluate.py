"""Every metric against scikit-learn, scipy or numpy; costs against hand counts."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics as sk
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from support.process_tools import run_ranks
from vitkd_fast import _timing
from vitkd_fast._timing import Timing, measure
from vitkd_fast.distill import evaluate as module
from vitkd_fast.distill.evaluate import (
    Evaluation,
    Remembered,
    cost,
    evaluate,
    paired_test,
    per_class,
    summarize,
)

CLOSE = {"rel": 1e-5, "abs": 1e-6}


def problem(n: int, classes: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Random logits, better than chance, and labels among which every class occurs."""
    labels = torch.arange(n) % classes
    logits = scale * torch.randn(n, classes)
    logits[torch.arange(n), labels] += scale
    return logits, labels


def random_images(n: int) -> Tensor:
    """[n, 3, 1, 2]: the first two bytes of an image are its number."""
    x = torch.zeros(n, 3, 1, 2, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(n) // 256, torch.arange(n) % 256
    return x


def table(logits: Tensor, form: Callable[[Tensor], object] = lambda x: x) -> Callable:
    """A predictor that looks an image's logits up."""
    return lambda x: form(logits[x[:, 0, 0, 0].long() * 256 + x[:, 0, 0, 1].long()])


def uneven(labels: Tensor, start: int = 0, stop: int | None = None) -> Iterator:
    """Batches of 1, 2, 3, ... images."""
    x, size = random_images(len(labels)), 1
    stop = stop or len(labels)
    while start < stop:
        end = min(start + size, stop)
        yield x[start:end], labels[start:end]
        start, size = end, size + 1


def expected(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics, by scikit-learn in fp64."""
    z, y = logits.double().numpy(), labels.numpy()
    p, guess, classes = scipy.special.softmax(z, 1), z.argmax(1), np.arange(z.shape[1])
    scores = sk.precision_recall_fscore_support(y, guess, average="macro", zero_division=0)
    confidence, gap = p.max(1), 0.0
    for i in range(15):
        inside = np.minimum((confidence * 15).astype(int), 14) == i
        gap += abs((guess == y)[inside].sum() - confidence[inside].sum())
    present = [c for c in classes if (y == c).any()]
    return {
        "top1": sk.accuracy_score(y, guess),
        "top5": np.mean((np.argsort(-z, 1)[:, : min(5, len(classes))] == y[:, None]).any(1)),
        **dict(zip(("precision", "recall", "f1"), scores[:3], strict=True)),
        "kappa": sk.cohen_kappa_score(y, guess),
        "quadratic_kappa": sk.cohen_kappa_score(y, guess, labels=classes, weights="quadratic"),
        "mcc": sk.matthews_corrcoef(y, guess),
        "auroc": np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in present]),
        "ece": gap / len(y),
        "nll": sk.log_loss(y, p, labels=classes),
    }


def run(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Evaluation:
    other = None if teacher is None else table(teacher)
    return evaluate(table(logits), uneven(labels), classes=logits.shape[1], teacher=other)


@pytest.mark.parametrize("classes", [2, 3, 5, 12, 100])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    logits, labels = problem(307, classes)
    result = run(logits, labels)
    assert result.metrics == pytest.approx(expected(logits, labels), **CLOSE)
    if classes == 12:
        z = logits.numpy()
        assert result.metrics["top5"] == pytest.approx(sk.top_k_accuracy_score(labels, z, k=5))
    assert result.fidelity == {} and result.teacher is None and result.teacher_confidence is None
    assert torch.equal(result.labels, labels) and result.labels.dtype == torch.int64
    assert torch.equal(result.student, logits.argmax(1))
    assert torch.equal(result.confidence, logits.softmax(1).amax(1))
    matrix = sk.confusion_matrix(labels, result.student, labels=range(classes))
    assert (result.confusion.numpy() == matrix).all() and result.confusion.dtype == torch.int64


def test_logits_like_probabilities_are_logits() -> None:
    logits, labels = torch.rand(50, 4), torch.arange(50) % 4
    assert run(logits, labels).metrics == pytest.approx(expected(logits, labels), **CLOSE)


def test_saturated_confidences_are_in_the_last_bin() -> None:
    # 95% and always right; exactly 1 in float32, and sometimes wrong: in one bin the two cancel
    logits = torch.tensor([[2.9444, 0.0]] * 100 + [[30.0, 0.0]] * 100)
    labels = torch.tensor([0] * 195 + [1] * 5)
    found, direct = run(logits, labels), expected(logits, labels)
    assert (found.confidence == 1).sum() == 100
    assert found.metrics["ece"] == pytest.approx(direct["ece"], abs=1e-6)


def test_absent_classes_are_left_out(recwarn: pytest.WarningsRecorder) -> None:
    logits, labels = problem(200, 8)
    labels = labels.clamp(max=5)  # two classes are predicted, and never right
    logits[:, 0] = -25  # another occurs, and is never predicted
    assert run(logits, labels).metrics == pytest.approx(expected(logits, labels), **CLOSE)
    logits[:, 7] = -25  # neither a label nor predicted
    assert run(logits, labels).metrics == pytest.approx(expected(logits, labels), **CLOSE)
    assert not [w for w in recwarn if "samples in targets" in str(w.message)]
    assert math.isnan(run(logits, torch.zeros_like(labels)).metrics["auroc"])


@pytest.mark.parametrize("form", [Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.numpy])
def test_any_form_of_logits(form: Callable) -> None:
    logits, labels = problem(120, 6)
    logits = logits.bfloat16().float()  # exact in every form
    result = evaluate(table(logits, form), uneven(labels), classes=6, teacher=table(logits))
    assert result.metrics == run(logits, labels).metrics
    assert result.confidence.dtype == torch.float32
    assert result.fidelity == pytest.approx({"agreement": 1, "kl": 0, "correlation": 1}, abs=1e-6)


def test_from_a_loader() -> None:
    logits, labels = problem(64, 3)
    loader = DataLoader(TensorDataset(random_images(64), labels), batch_size=10, num_workers=1)
    result = evaluate(table(logits), loader, classes=3, device=torch.device("cpu"))
    assert result.metrics == pytest.approx(run(logits, labels).metrics, **CLOSE)


def test_binned_auroc_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = problem(400, 50, scale=4.0)
    exact = run(logits, labels).metrics["auroc"]
    monkeypatch.setattr(module, "_EXACT_AUROC", 400 * 50)
    assert run(logits, labels).metrics["auroc"] == exact
    monkeypatch.setattr(module, "_EXACT_AUROC", 200 * 50)
    assert run(logits, labels).metrics["auroc"] == pytest.approx(exact, abs=2e-3)
    assert run(logits, labels).metrics["auroc"] != exact
    assert torch.are_deterministic_algorithms_enabled()


def test_fidelity() -> None:
    (logits, labels), teacher = problem(90, 7), 3 * torch.randn(90, 7)
    teacher[4], logits[9] = 0.1, -1e4 / 3  # constant rows
    result = run(logits, labels, teacher)
    s, t = logits.double().numpy(), teacher.double().numpy()
    kl = scipy.stats.entropy(scipy.special.softmax(t, 1), scipy.special.softmax(s, 1), axis=1)
    r = [0 if i in (4, 9) else scipy.stats.pearsonr(s[i], t[i])[0] for i in range(90)]
    agreement = np.mean(s.argmax(1) == t.argmax(1))
    want = {"agreement": agreement, "kl": kl.mean(), "correlation": np.mean(r)}
    assert result.fidelity == pytest.approx(want, **CLOSE)
    assert torch.equal(result.teacher, teacher.argmax(1))
    assert torch.equal(result.teacher_confidence, teacher.softmax(1).amax(1))
    assert result.metrics == run(logits, labels).metrics


@pytest.mark.parametrize(("most", "asked"), [(1 << 28, 3), (2 * 8 * 5, 4), (0, 6)])
def test_a_teacher_is_asked_once(most: int, asked: int) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    batches = torch.rand(3, 8, 3, 32, 32).split(1)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    remembered = Remembered(model, most)
    with torch.inference_mode():
        epochs = [
            [predict(x[0]) for x in batches] for predict in (remembered.epoch(), remembered.epoch())
        ]
    assert len(calls) == asked
    for first, second in zip(*epochs, strict=True):
        assert first.equal(second)
    assert not epochs[0][0].equal(epochs[0][1])


def test_errors() -> None:
    logits, labels = problem(40, 4)
    for name in ("student", "teacher"):
        bad = {"student": logits, "teacher": logits} | {name: logits.clone()}
        bad[name][3, 0], bad[name][17] = torch.nan, torch.inf
        with pytest.raises(ValueError, match=f"{name}: .* NaN or Inf for 2 of 40 images"):
            run(bad["student"], labels, bad["teacher"])
        bad[name] = torch.randn(40, 5)
        with pytest.raises(ValueError, match=rf"{name}: .*\[1, 4\].*\[1, 3, 1, 2\], got \[1, 5\]"):
            evaluate(
                table(bad["student"]), uneven(labels), classes=4, teacher=table(bad["teacher"])
            )
    for outside in (-1, 4):
        with pytest.raises(ValueError, match=rf"labels: .* from 0 to 3, got .*{outside}"):
            run(logits, labels.where(labels != 2, outside))
    with pytest.raises(ValueError, match=r"labels: expected \[1\] ids .*, got \[1, 4\]"):
        run(logits, nn.functional.one_hot(labels))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        evaluate(table(logits), [], classes=4)
    with pytest.raises(ValueError, match="classes: expected 2 or more, got 1"):
        evaluate(table(logits), uneven(labels), classes=1)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    url = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", url, rank=rank, world_size=2)
    logits, labels, teacher = torch.load(f"{folder}/problem.pt")
    start, stop = (0, 170) if rank == 0 else (170, len(labels))
    student, other = table(logits), table(teacher)
    results = [evaluate(student, uneven(labels, start, stop), classes=9, teacher=other)]
    # more than a rank's half of the exact probabilities on one rank: both bin
    module._EXACT_AUROC = 2 * 9 * 100
    results.append(evaluate(student, uneven(labels, start, stop), classes=9))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        evaluate(student, uneven(labels) if rank else [], classes=9)
    torch.save([vars(result) for result in results], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    (logits, labels), teacher = problem(230, 9), torch.randn(230, 9)
    torch.save((logits, labels, teacher), tmp_path / "problem.pt")
    run_ranks(__file__, tmp_path)
    one = run(logits, labels, teacher)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for exact, binned in ranks:
        assert exact["metrics"] == pytest.approx(one.metrics, **CLOSE)
        assert exact["fidelity"] == pytest.approx(one.fidelity, **CLOSE)
        assert torch.equal(exact["confusion"], one.confusion)
        assert binned["metrics"] == ranks[0][1]["metrics"]
        assert binned["metrics"]["auroc"] == pytest.approx(one.metrics["auroc"], abs=2e-3)
    for name in ("labels", "student", "confidence", "teacher", "teacher_confidence"):
        assert torch.equal(torch.cat([x[0][name] for x in ranks]), getattr(one, name))


def macs(model: nn.Module, size: int) -> int:
    return cost(lambda x: x, model, image_size=size, device="cpu", batch=2).macs


def test_macs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda *_, **__: Timing(1.0, 1.0, 1.0, 1.0, 1))
    separable = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    assert macs(separable, 32) == 16 * 16 * (27 * 8 + 9 * 8 + 8 * 16) + 160
    assert separable.training and separable[1].num_batches_tracked == 0
    assert macs(separable.bfloat16(), 32) == macs(separable.float(), 32)
    assert macs(timm.create_model("mobilenetv2_100"), 224) == pytest.approx(300.8e6, rel=0.01)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    tokens, dim = 17, 24
    block = tokens * dim * dim * (3 + 1 + 4 + 4) + 2 * tokens * tokens * dim
    assert macs(vit, 32) == 16 * 3 * 8 * 8 * dim + 2 * block + dim * 5


def test_cost(tmp_path: Path) -> None:
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)), set()

    def predictor(x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and torch.is_inference_mode_enabled()
        seen.add(tuple(x.shape))
        torch.mm(torch.ones(len(x), 999), torch.ones(999, 999))
        return x

    result = cost(predictor, model, image_size=4, device="cpu", batch=7)
    assert seen == {(1, 3, 4, 4), (7, 3, 4, 4)}
    assert result.parameters == 48 * 5 + 5 + 10 and result.macs == 240
    assert result.bytes == 4 * (result.parameters + 10) + 8
    assert 0 < result.latency_ms <= result.latency_p90_ms <= result.latency_p99_ms
    assert 0 < result.latency_cpu_ms < 1000 and result.latency_calls >= 100
    assert result.images_per_s > 0 and result.batch == 7
    (file := tmp_path / "model").write_bytes(b"12345")

    def measured(call: Callable, synchronize: Callable, calls: int = 100) -> Timing:
        synchronize()
        seconds = len(call()) / 10
        return Timing(seconds, 2 * seconds, None, 3 * seconds, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", measured)
        sized = cost(predictor, model, image_size=4, device="cpu", batch=20, file=file)
    assert (sized.bytes, sized.latency_ms, sized.images_per_s) == (5, 100, 10)
    assert (sized.latency_p90_ms, sized.latency_p99_ms, sized.latency_cpu_ms) == (
        200,
        None,
        1e3 * (3 * 0.1),
    )
    with pytest.raises(ValueError, match="batch: expected 1 or more, got 4, 0"):
        cost(predictor, model, image_size=4, device="cpu", batch=0)


def test_one_noisy_moment_is_no_latency() -> None:
    began, stalled, calls = time.perf_counter(), [], []

    def call() -> None:
        calls.append(0)
        # once, past the warm-up, and longer than all that is measured was once
        if time.perf_counter() - began > 0.3 and not stalled:
            stalled.append(time.sleep(1.2))
        time.sleep(1e-3)

    found = measure(call)
    assert 1e-3 <= found.p50 <= found.p90 and found.p50 < 0.1
    assert 100 <= found.calls <= len(calls)
    assert found.cpu < found.p50  # it slept


def test_quantiles_of_a_known_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "_LIMIT", 5.0)
    waits, used = iter(range(10**9)), []

    def call() -> None:
        used.append(1.5e-3 * (next(waits) % 10 + 1))
        time.sleep(used[-1])

    found = measure(call, calls=150)
    waited = used[-found.calls :]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert getattr(found, name) >= np.percentile(waited, percent), name
    assert found.calls >= 150 and found.p50 < found.p90 < found.p99 + 1e-9


def test_cpu_time_is_what_a_call_computes() -> None:
    def call() -> None:
        start = time.thread_time()
        while time.thread_time() - start < 2e-3:
            pass

    found = measure(call)
    assert 2e-3 <= found.cpu < 4e-3 and found.p50 > 1.9e-3


def test_a_slow_call_has_no_p99(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_WARM_UP", 0.01), ("_ENOUGH", 0.1), ("_LIMIT", 0.3)):
        monkeypatch.setattr(_timing, name, seconds)
    found = measure(lambda: time.sleep(0.02), calls=10)
    assert 10 <= found.calls < 100 and found.p99 is None and found.p90 >= 0.02
    assert measure(lambda: time.sleep(0.4)).calls == 1


def test_figures_of_each_class() -> None:
    logits, labels = problem(200, 6, scale=1.0)
    labels = labels.clamp(max=3)
    logits[:, 5] = -25  # no label, never predicted; class 4 is predicted, and no label
    result = run(logits, labels)
    names = list("abcdef")
    rows = per_class(result.confusion, names)
    scores = sk.precision_recall_fscore_support(
        labels, result.student, labels=range(6), zero_division=np.nan
    )
    assert [row["class"] for row in rows] == names
    for row, precision, recall, f1, images in zip(rows, *scores, strict=True):
        assert row["images"] == images
        for value, key in ((precision, "precision"), (recall, "recall"), (f1, "f1")):
            assert row[key] == (None if np.isnan(value) else pytest.approx(value)), (row, key)
    assert rows[4]["recall"] is None and rows[5]["f1"] is None
    wrong = (result.confusion - result.confusion.diagonal().diag())[:4]
    assert [row["confused_with"] for row in rows[:4]] == [names[i] for i in wrong.argmax(1)]
    assert rows[4]["confused_with"] is rows[5]["confused_with"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    with pytest.raises(ValueError, match=r"per_class: confusion: .*\[2, 2\], got \[6, 6\]"):
        per_class(result.confusion, ["a", "b"])


def test_summarize() -> None:
    mean, std = summarize([{"a": 1.0, "b": 0.5}, {"b": 0.5, "a": 2.0}])
    assert mean == {"a": 1.5, "b": 0.5} and std == {"a": pytest.approx(0.5**0.5), "b": 0}
    assert summarize([{"a": 3.0}]) == ({"a": 3.0}, {"a": 0.0})
    for runs in ([], [{"a": 1.0}, {"b": 1.0}]):
        with pytest.raises(ValueError, match="summarize: runs"):
            summarize(runs)


def test_paired_test() -> None:
    a, b = [0.71, 0.74, 0.72, 0.75], [0.70, 0.70, 0.71, 0.72]
    d, result = np.subtract(a, b), paired_test(a, b)
    error = d.std(ddof=1) / 2
    t = d.mean() / error
    p = 2 * scipy.stats.t.sf(abs(t), 3)
    want = {"seeds": 4, "difference": d.mean(), "standard_error": error, "t": t, "p": p}
    assert result == pytest.approx(want | {"standard_errors": t})
    assert paired_test(b, a)["t"] == pytest.approx(-t)
    for shift, p in ((0.0, 1), (0.1, 0), (-0.1, 0)):
        result = paired_test([x + shift for x in b], b)
        assert result["standard_error"] == 0 and result["p"] == p and result["t"] is None
        assert json.loads(json.dumps(result, allow_nan=False))["standard_errors"] is None
    for x, y in (([0.1], [0.2]), (a, b[:3]), ([0.1, math.nan], [0.1, 0.2])):
        with pytest.raises(ValueError, match="paired_test: distilled"):
            paired_test(x, y)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
