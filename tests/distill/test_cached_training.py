"""Runs whose teacher is a cache: the online run's losses, without a teacher, or a refusal."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.cache_tools import config, good_teacher, losses, make, save_teacher, trainer
from support.loop_tools import student
from vitkd_fast import models
from vitkd_fast.distill import datasets, identity, nonfinite, pack, preflight, sources
from vitkd_fast.distill.cache import CacheError, Plan, shared
from vitkd_fast.distill.cache.read import CachedTeacher
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.experiment import distill
from vitkd_fast.distill.loop import NonFiniteError, Trainer
from vitkd_fast.distill.losses import KD, StepOutputs
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.functional import kd_loss, kd_loss_topk
from vitkd_fast.images import DataError
from vitkd_fast.taps import TapOutputs

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = ["run.epochs=3", "run.log_every=1", "run.max_steps=25", "run.eval_every=3"]
FEATURES = {"features": ["pooled", "patch:0", "patch:-1"]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def caches(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of two epochs; nothing changes them."""
    root, threads = tmp_path_factory.mktemp("caches"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        every: dict[str, dict[str, Any]] = {
            "whole": {}, "top": {"topk": 3}, "features": FEATURES,
            "int8": FEATURES | {"feature_dtype": "int8"},
        }  # fmt: skip
        for name, options in every.items():
            make(file, root / name, monkeypatch=patch, **options)
    torch.set_num_threads(threads)
    return {name: root / name for name in every}


def images(folder: Path) -> list[str]:
    """Fewer, for runs that evaluate."""
    return ["data.dataset=''", f"data.train={folder}/train", f"data.val={folder}/val"]


TERMS = {
    "kd": "{kd: {temperature: 4, ce_weight: 0.5}}",
    "entropy": "{kd: {temperature: entropy, standardize: true}}",
    "dkd": "{dkd: {}}",
    "dist": "{dist: {}, ce: {}}",
    "mlkd": "{mlkd: {}}",
}


@pytest.mark.parametrize("term", TERMS)
def test_all_classes_give_the_online_loss_and_gradient(
    term: str, file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [*RUN, f"losses={TERMS[term]}"]
    online = trainer(tmp_path, config(file, *overrides))
    cached = trainer(tmp_path, config(file, *overrides, cache=caches["whole"]))
    assert not list(cached.task.teachers)
    for epoch in (0, 1):
        for batch, other in itertools.islice(
            zip(online.loader.epoch(epoch), cached.loader.epoch(epoch), strict=True), 3
        ):
            assert torch.equal(batch.images, other.images)
            found = []
            for run in (online, cached):
                said = run.task.cached_outputs(batch, epoch)
                assert (said is None) == (run is online)
                loss = run.task(batch.images, batch.labels, 0.0, said)["loss"]
                gradients = torch.autograd.grad(loss, list(run.model.parameters()))
                found.append((loss, torch.cat([x.flatten() for x in gradients])))
            (loss, gradient), (ours, other_gradient) = found
            torch.testing.assert_close(ours, loss, rtol=2**-11, atol=2**-11)
            error = (other_gradient - gradient).norm() / gradient.norm()
            # dist divides by the spread of a class, of which an untrained teacher has little
            assert error < (2**-7 if term == "dist" else 2**-8)
    assert losses(cached, 12).isfinite().all()


def test_logits_of_several_labels_are_kept_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sigmoid is not invariant to a shift."""
    lines = ["file," + ",".join("0123456789")]
    for i, (image, label) in enumerate(map(datasets.Digits().read, range(48))):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png," + ",".join("1" if x in (label, 0) else "0" for x in range(10)))
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    file = save_teacher(tmp_path / "teacher.safetensors", multilabel=True)
    overrides = [
        "data.dataset=''", f"data.train={tmp_path}", "data.labels=labels.csv", "data.holdout=0.2",
        "losses={binary_kd: {temperature: 2, bce_weight: 0.5}}",
    ]  # fmt: skip
    make(file, tmp_path / "cache", *overrides, monkeypatch=monkeypatch)
    assert Plan.read(tmp_path / "cache").record["shift"] == "none"
    runs = [
        trainer(tmp_path / "run", config(file, *overrides, cache=cache))
        for cache in (None, tmp_path / "cache")
    ]
    batch = next(runs[0].loader.epoch(1))
    found = [
        run.task(batch.images, batch.labels, 0.0, run.task.cached_outputs(batch, 1))["loss"]
        for run in runs
    ]
    torch.testing.assert_close(found[1], found[0], rtol=2**-11, atol=2**-11)
    make(file, tmp_path / "top", *overrides, monkeypatch=monkeypatch, topk=4)
    cached = config(file, *overrides, cache=tmp_path / "top")
    with pytest.raises(ConfigError, match=r"losses\.binary_kd: needs the logits of all classes"):
        preflight.open_cache(cached, sources.open_data(cached.data))


def test_the_largest_logits_alone_give_kd_loss_topk(
    file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cached = config(file, *RUN, "losses.kd={temperature: 4, tail: bin}", cache=caches["top"])
    run = trainer(tmp_path, cached)
    batch = next(run.loader.epoch(1))
    [said] = run.task.cached_outputs(batch, 1) or []
    with torch.inference_mode():
        logits = models.predictor(models.load(file).model)(batch.images)
    answers = torch.randn(16, 10)
    found = KD(temperature=4.0, tail="bin")(
        StepOutputs(TapOutputs(answers), said, batch.labels), 0.0, None
    )
    values, indices = logits.topk(3)
    expected = kd_loss_topk(
        answers, indices, values, log_sum_exp=(logits / 4).logsumexp(1), temperature=4.0, tail="bin"
    )
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-4)
    whole = kd_loss(answers, logits, temperature=4.0)
    assert abs(float(whole - found)) > 10 * abs(float(expected - found))  # the tail matters
    assert losses(run, 3).isfinite().all()


def test_features_are_those_of_the_online_teacher(
    file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    terms = "losses={features: {block: 0, stride: 8}, feature: {stride: 8}, sp: {}, kd: {}}"
    overrides = [*RUN, terms, "optimizer={name: sgd, lr: 1e-6}", "run.max_steps=8"]
    online = losses(trainer(tmp_path / "online", config(file, *overrides)), 6)
    found = {}
    for name, error in (("features", 2**-9), ("int8", 0.02)):
        run = trainer(tmp_path / name, config(file, *overrides, cache=caches[name]))
        found[name] = losses(run, 6)
        torch.testing.assert_close(found[name], online, rtol=error, atol=error)
        # only what a term reads is read
        alone = trainer(tmp_path / f"{name}-kd", config(file, *RUN, cache=caches[name]))
        assert alone.task.cache
        assert alone.task.cache.columns == ["log_sum_exp", "pixels", "values"]
    assert not torch.equal(found["int8"], found["features"])


def test_seeds_of_students_share_a_cache_and_its_epochs_come_again(
    file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cached = config(file, *RUN, cache=caches["whole"])
    runs = [trainer(tmp_path / str(seed), cached, seed=seed) for seed in (0, 1)]

    def seen(run: Trainer, epoch: int) -> dict[int, bytes]:
        return {
            int(i): x.numpy().tobytes()
            for batch in run.loader.epoch(epoch)
            for i, x in zip(batch.indices, batch.images, strict=True)
        }

    one, two = (seen(run, 0) for run in runs)
    assert list(one) != list(two)  # in another order
    both = one.keys() & two.keys()
    assert len(both) > 150 and all(one[i] == two[i] for i in both)
    later = seen(runs[0], 2)
    assert list(later) != list(one) and all(later[i] == one[i] for i in later.keys() & one.keys())
    other = [x != one[i] for i, x in seen(runs[0], 1).items() if i in one]
    assert sum(other) > 0.9 * len(other)


def test_a_resumed_run_gives_the_same_weights(
    file: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(file, tmp_path / "cache", *images(image_folder), monkeypatch=monkeypatch)
    overrides = [*RUN, *images(image_folder), "run.save_every=10", "run.max_steps=14"]
    cached = config(file, *overrides, cache=tmp_path / "cache")
    trainer(tmp_path / "one", cached).run()
    stopped = trainer(tmp_path / "two", cached)
    update = stopped.update

    def stop(batches: Any) -> None:
        if stopped.step == 11:
            raise KeyboardInterrupt
        update(batches)

    stopped.update = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = trainer(tmp_path / "two", cached)
    again.restore()
    assert again.step == 10
    again.run()
    one, two = (load_file(tmp_path / x / "last.safetensors") for x in ("one", "two"))
    assert all(torch.equal(one[name], x) for name, x in two.items())
    begun = {"classes": [], "train": {}, "val": {}, "cache": "a"}
    with pytest.raises(DataError, match=r"begun with another teacher\.cache.*was a, and is None"):
        identity.check_resumed(begun, {"classes": [], "train": {}, "val": {}})


def test_a_step_that_fails_is_taken_again_without_a_teacher(
    file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cached = config(file, *RUN, "optimizer={name: sgd, lr: 1e30}", cache=caches["top"])
    with pytest.raises(NonFiniteError):
        trainer(tmp_path, cached).run()
    found = nonfinite.replay(tmp_path / nonfinite.NAME)
    assert list(found.layers) == ["student"]
    assert "not finite" in str(found)


OTHERS: dict[str, tuple[list[str], str]] = {
    "size": (["data.image_size=64"], "data.image_size: 32 there, 64 here"),
    "resize": (["data.interpolation=nearest"], "data.interpolation: bicubic there, nearest here"),
    "images": (["data.holdout=0.8"], "data.images: 179 there, 359 here; data.names: "),
    "crop": (["augmentation.scale=[0.5, 1.0]"], r"augmentation.scale: [0.6, 1.0] there, [0.5"),
    "flip": (["augmentation.hflip=0.5"], "augmentation.hflip: 0.0 there, 0.5 here"),
    "colours": (["augmentation.auto_augment=rand-m9"], "augmentation.auto_augment:  there, rand"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_of_something_else_is_refused_by_name(
    other: str, file: Path, caches: dict[str, Path]
) -> None:
    overrides, why = OTHERS[other]
    cached = config(file, *overrides, cache=caches["whole"])
    splits = sources.open_data(cached.data)
    with pytest.raises(CacheError, match=re.escape(f"made with another {why}")):
        preflight.open_cache(cached, splits)


def test_another_teacher_or_library_is_refused(
    file: Path, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(file)
    name = "blocks.0.mlp.fc1.bias"
    weights[name][3] += 1e-3
    loaded = models.load(file)
    loaded.model.load_state_dict(weights)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    models.save(
        tmp_path / "other.safetensors", loaded.model, name="vit_tiny_patch16_224",
        options=options, num_classes=10, pixels=loaded.pixels, classes=loaded.classes,
    )  # fmt: skip
    cached = config(tmp_path / "other.safetensors", cache=caches["whole"])
    splits = sources.open_data(cached.data)
    theirs = Plan.read(caches["whole"]).teacher["weights"]
    with pytest.raises(CacheError, match=rf"another teacher\.weights: {theirs[:12]}\.\.\. there"):
        preflight.open_cache(cached, splits)
    # moved and renamed weights are the same
    (tmp_path / "moved.safetensors").write_bytes(file.read_bytes())
    moved = config(tmp_path / "moved.safetensors", cache=caches["whole"])
    cache, notes = preflight.open_cache(moved, splits)
    assert cache and len(notes) == 1
    # weights that are not here: the name counts
    gone = config(tmp_path / "gone.safetensors", cache=caches["whole"])
    with pytest.raises(CacheError, match=r"another teacher\.name: .* there, .*gone"):
        preflight.open_cache(gone, splits)
    monkeypatch.setattr(shared, "version", lambda name: "0.1")
    with pytest.raises(CacheError, match=r"versions\.torchvision: .* there, 0\.1 here; versions"):
        preflight.open_cache(moved, splits)


LACKS = {
    "{attention: {stride: 8}, ce: {}}": "losses.attention: {} lacks queries and keys",
    "{feature: {stride: 8}, ce: {}}": "losses.feature: {} lacks patches of block -1 (--features",
    "{rkd: {}, ce: {}}": "losses.rkd: {} lacks pooled features (--features pooled)",
    "{feature: {stride: 8, teacher_stride: 8}, ce: {}}": "losses.feature: {} lacks maps",
    "{dkd: {}}": "losses.dkd: needs the logits of all classes; {} holds 3 of 10 classes",
    "{dist: {}, ce: {}}": "losses.dist: needs the logits of all classes",
    "{kd: {temperature: 2}}": "losses.kd: needs log-sum-exps at temperature 2, not at 4",
    "{kd: {temperature: 4, standardize: true}}": "losses.kd: needs the logits of all classes for",
    "{kd: {temperature: curriculum}}": "losses.kd: needs the logits of all classes for temper",
}


@pytest.mark.parametrize("terms", LACKS)
def test_a_loss_that_needs_more_than_the_cache_holds_is_refused_by_name(
    terms: str, file: Path, caches: dict[str, Path]
) -> None:
    cached = config(file, f"losses={terms}", cache=caches["top"])
    why = LACKS[terms].replace("{}", str(caches["top"]))
    with pytest.raises(ConfigError, match=re.escape(why)):
        preflight.open_cache(cached, sources.open_data(cached.data))


def test_costs_of_classes_need_the_teachers_classifier(file: Path, caches: dict[str, Path]) -> None:
    cached = config(file, "losses={wkd_logit: {}}", cache=caches["features"])
    splits = sources.open_data(cached.data)
    cache, _ = preflight.open_cache(cached, splits)
    with pytest.raises(ConfigError, match="losses: wkd_logit: teacher: expected a classifier"):
        preflight.check_losses(cached, student(), [], cache)


def test_a_run_with_a_cache(
    tmp_path: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    of_folder = images(image_folder)
    whole = load("digits", [*of_folder, "data.workers=0"])
    teacher = good_teacher(tmp_path / "teacher.safetensors", whole)
    make(teacher, tmp_path / "cache", *of_folder, monkeypatch=monkeypatch, topk=3)
    real = DistillationTask.create

    def create(*arguments: Any) -> DistillationTask:
        task = real(*arguments)
        assert not list(task.teachers)
        return task

    monkeypatch.setattr(DistillationTask, "create", create)
    run = [*RUN, *of_folder, "run.max_steps=4", "run.log_every=2"]
    cached = config(teacher, *run, f"run.folder={tmp_path / 'run'}", cache=tmp_path / "cache")
    found = distill(cached)
    assert re.search(r"2 epochs in .*, 3 of 10 classes; top-1 \d\d\.\d%", capsys.readouterr().out)
    rows = {row["role"]: row for row in found["models"]}
    assert list(rows) == ["teacher", "baseline", "distilled"]
    assert rows["teacher"]["mean"]["top1"] > 0.2
    assert "agreement" in rows["distilled"]["mean"]
    assert not any("teacher.cache" in note for note in found["notes"])
    assert any("3 of 10 classes, 2 epochs of" in note for note in found["notes"])
    begun = json.loads((tmp_path / "run" / "data.json").read_text())
    assert begun["cache"] == Plan.read(tmp_path / "cache").fingerprint
    # on a machine without the weights, from another folder, and from one file of the images
    teacher.rename(tmp_path / "elsewhere.safetensors")
    pack.write(tmp_path / "train.pack", pack.choose(f"{image_folder}/train"))
    run += [f"run.folder={tmp_path / 'other'}", "run.baseline=false"]
    run += [f"data.train={os.path.relpath(tmp_path / 'train.pack')}"]
    cached = config(teacher, *run, cache=tmp_path / "cache")
    distill(cached, dry_run=True)
    found = distill(cached)
    assert [row["role"] for row in found["models"]] == ["distilled"]
    assert any("are not here" in note for note in found["notes"])
    one, two = (load_file(tmp_path / x / "distilled-3/last.safetensors") for x in ("run", "other"))
    assert all(torch.equal(one[name], x) for name, x in two.items())


def test_a_cache_that_knows_nothing_is_refused(
    file: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cached = config(file, *RUN, f"run.folder={tmp_path}", cache=caches["top"])
    with pytest.raises(ConfigError, match=r"teacher\.cache: .* of 179 training images right"):
        distill(cached)


def test_choices_are_the_classes_of_the_largest_logits(file: Path, caches: dict[str, Path]) -> None:
    chosen = np.arange(0, 179, 7)
    whole, top = (CachedTeacher(caches[name]).choices(chosen) for name in ("whole", "top"))
    assert np.array_equal(whole, top)
