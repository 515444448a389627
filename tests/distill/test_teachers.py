"""Several teachers: averaged logits, a term of each one's features, and a report of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from support.run_tools import arguments
from vitkd_fast import models
from vitkd_fast.distill import checkpoint, config, nonfinite, report
from vitkd_fast.distill.config import Config, ConfigError, Teacher, load
from vitkd_fast.distill.preflight import holds_run
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.functional import average_logits, kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")

LIST = "teacher=[{model: a, weight: 3, epochs: 1}, {model: b}]"


def made(*overrides: str) -> Config:
    return load(None, ["student.model=mobilenetv2_050", "data.train=images", *overrides])


def test_a_list_of_teachers() -> None:
    several = made(LIST)
    assert several.teachers == [Teacher(model="a", weight=3, epochs=1), Teacher(model="b")]
    assert list(several.all_teachers()) == ["teacher-0", "teacher-1"]
    assert several.losses.kd is not None
    assert config.validate(yaml.safe_load(yaml.safe_dump(several.model_dump()))) == several
    assert made("teachers=[{model: a, weight: 3, epochs: 1}, {model: b}]") == several
    alone = made("teacher.model=a")
    assert made("teacher=[{model: a}]") == alone
    assert list(alone.all_teachers().items()) == [("teacher", alone.teacher)]
    assert list(made("losses.ce={}").all_teachers()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=[{model: a}, {modl: b}]"], r"teachers.1.modl: .*nearest is teachers.1.model$"),
        (["teacher=[{model: a}, {}]"], "teachers.1.model: missing"),
        (["teacher=[{model: a, weight: 0}, {model: b}]"], "teachers.0.weight: 0"),
        ([LIST, "losses={ce: {}}"], "teacher.model: a and b teaches nothing"),
        ([LIST, "teacher_average=mean"], "teacher_average: 'mean' .*'probability' or 'log'"),
        (["teacher.model=a", "teachers=[{model: b}]"], "teachers: expected none beside teacher"),
    ],
)
def test_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(*overrides)


def test_a_run_that_began_before_there_were_several(tmp_path: Path) -> None:
    """Its configuration lacks the keys: they have their defaults."""
    now = made("teacher.model=a", f"run.folder={tmp_path}")
    tree = now.model_dump()
    del tree["teachers"], tree["teacher_average"], tree["teacher"]["weight"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "distilled-0").mkdir()
    (tmp_path / "distilled-0" / "last.safetensors").write_text("")
    assert holds_run(now, resume=True)
    with pytest.raises(ConfigError, match=r"was begun with another teacher_average$"):
        holds_run(now.model_copy(update={"teacher_average": "log"}), resume=True)


def vit(embed_dim: int, seed: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    options = {"patch_size": 8, "embed_dim": embed_dim, "depth": 1, "num_heads": 2}
    model = models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, options=options)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(scale)
    return model


def task(losses: str, teachers: list[nn.Module], average: str = "probability") -> DistillationTask:
    torch.manual_seed(5)
    student = models.create("mobilenetv2_035", num_classes=10)
    given = ["data.image_size=32", f"teacher_average={average}", f"losses={losses}"]
    whole = made(*given, "teacher=[{model: a, weight: 3}, {model: b}]")
    return DistillationTask.create(whole, student, teachers, Runtime(torch.device("cpu"))).eval()


def images() -> Tensor:
    return torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("average", ["probability", "log"])
def test_logits_are_averaged_at_the_temperature(average: str) -> None:
    teachers, x = [vit(32, 1), vit(48, 2)], images()
    step = task("{kd: {temperature: 2.5}}", teachers, average)
    result = step(x, torch.zeros(16, dtype=torch.int64))
    with torch.no_grad():
        logits = [models.predictor(teacher).eval()(x) for teacher in teachers]
    mean = average_logits(logits, [3, 1], average, temperature=2.5)
    torch.testing.assert_close(result["loss"], kd_loss(result["output"], mean, temperature=2.5))
    assert not torch.allclose(mean.softmax(-1), logits[0].softmax(-1))


def test_features_have_a_term_of_each_teacher_by_its_weight() -> None:
    teachers, x = [vit(32, 1), vit(48, 2)], images()
    labels = torch.zeros(16, dtype=torch.int64)
    given = "{ce: {}, feature: {stride: 8, standardize: none}, rkd: {}}"
    both = task(given, teachers)
    found = both(x, labels)["terms"]
    wanted = []
    for i, teacher in enumerate(teachers):
        alone = task(given, [teacher])
        layer = both.trainable_module.learned[f"feature-{i}"]
        alone.trainable_module.learned["feature"].load_state_dict(layer.state_dict())
        wanted.append(alone(x, labels)["terms"])
    assert [*both.trainable_module.learned["feature-1"]["projection"].weight.shape] == [48, 16]
    torch.testing.assert_close(found[1:], 0.75 * wanted[0][1:] + 0.25 * wanted[1][1:])
    torch.testing.assert_close(found[0], wanted[0][0])


def test_a_head_of_its_own_sees_the_average() -> None:
    step, x = task("{token: {}, ofa: {strides: [8]}}", [vit(32, 1), vit(48, 2)]), images()
    assert sorted(step.trainable_module.learned) == ["ofa", "token"]
    seen = step(x, torch.zeros(16, dtype=torch.int64))
    single = task("{token: {}, ofa: {strides: [8]}}", [vit(32, 1), vit(32, 1)])
    single.trainable_module.load_state_dict(step.trainable_module.state_dict())
    alone = single(x, torch.zeros(16, dtype=torch.int64))  # whose average is the first teacher
    assert torch.equal(seen["output"], alone["output"])
    assert not torch.equal(seen["terms"], alone["terms"])


def test_no_teachers_scale_rules() -> None:
    """After calibration, features of 1000 times the size have the same share of the loss."""
    teachers, x = [vit(32, 1), vit(32, 2)], images()
    labels = torch.zeros(16, dtype=torch.int64)
    losses = []
    for scale in (1.0, 1000.0):
        step = task("{ce: {weight: 0}, feature: {stride: 8}}", teachers)
        taps = step.teacher_taps[1]
        assert taps is not None
        block = taps.model[1].blocks[0]
        block.register_forward_hook(lambda m, i, output, scale=scale: scale * output)
        step.calibrate([x])
        torch.manual_seed(0)
        for layer in step.trainable_module.learned.values():
            layer["projection"].reset_parameters()
        losses.append(step(x, labels)["loss"])
        standard = step.trainable_module.learned["feature-1"]["standardize"]
        seen = standard(step.teacher_outputs(x)[1].patches(-1)).flatten(0, 1)
        torch.testing.assert_close(seen.var(0, correction=0), torch.ones(32), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_a_run_with_two_teachers(
    run_folder: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    """One from a file, one that the run trains; both are checked, scored and reported."""
    folder = tmp_path / "run"
    own = (
        "{model: vit_tiny_patch16_224, epochs: 6, optimizer: {lr: 4e-3}, options: {patch_size: 8, "
    )
    own += "embed_dim: 48, depth: 1, num_heads: 2}}"
    given = [x for x in arguments(image_folder, folder) if not x.startswith("teacher.")]
    file = run_folder / "teacher" / "last.safetensors"
    given += [f"teacher=[{{model: {file}, weight: 2}}, {own}]", "run.seeds=[0]"]
    given += ["losses.feature={stride: 8}", "losses.kd.weight=1e39", "run.log_every=1"]
    result = vitkd("distill", *given)
    assert result.code == 1  # once with a loss that is Inf: the file names both teachers
    found = nonfinite.replay(folder / "distilled-0" / "nonfinite.safetensors")
    assert list(found.layers) == ["student", "teacher-0", "teacher-1"]
    given += ["losses.kd.weight=1.0", f"run.folder={tmp_path / 'again'}"]
    result = vitkd("distill", *given)
    assert result.code == 0, result.err
    assert f"teacher-0: {file}: top-1 " in result.out
    assert "teacher-1: vit_tiny_patch16_224: top-1 " in result.out
    results = report.read(tmp_path / "again")
    roles = [model["role"] for model in results["models"]]
    assert roles == ["teacher-0", "teacher-1", "teacher", "baseline", "distilled"]
    rows = dict(zip(roles, results["models"], strict=True))
    assert rows["teacher"]["model"] == f"{file} + vit_tiny_patch16_224"
    parts = [rows[f"teacher-{i}"] for i in (0, 1)]
    assert rows["teacher"]["macs"] == sum(part["macs"] for part in parts)
    assert rows["teacher-1"]["mean"]["agreement"] < 1
    assert "teacher-1, seed 0" in results["curves"]
    state = checkpoint.read_header(tmp_path / "again" / "distilled-0" / "checkpoint.safetensors")
    assert state["info"]["step"] == 9


def test_each_teacher_is_checked(
    run_folder: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    file = run_folder / "teacher" / "last.safetensors"
    given = [x for x in arguments(image_folder, tmp_path / "run") if not x.startswith("teacher.")]
    other = "{model: vit_tiny_patch16_224}"
    result = vitkd("distill", *given, f"teacher=[{{model: {file}}}, {other}]")
    assert result.code == 2
    assert "teacher-1.model: vit_tiny_patch16_224 would teach with random weights" in result.err
