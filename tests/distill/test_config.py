"""Configurations: recipes, overrides, schedules, and every error by the key it names."""

import math
from pathlib import Path

import pytest
import yaml

from vitkd_fast.distill import config
from vitkd_fast.distill.config import Config, ConfigError, load, validate
from vitkd_fast.distill.losses import CE, KD, Losses, Ramp

# the least that can run
LEAST = ("student.model=mobilenetv2_050", "losses.ce={}", "data.train=images")


def changed(*overrides: str) -> Config:
    return load(None, [*LEAST, *overrides])


@pytest.mark.parametrize("name", config.recipes())
def test_recipe(name: str) -> None:
    given = ["data.train=a", "data.val=b", "teacher.checkpoint=c", "student.checkpoint=d"]
    whole = load(name, given)
    assert whole.student.model and list(whole.losses.terms())
    text = yaml.safe_dump(whole.model_dump())
    assert validate(yaml.safe_load(text)) == whole
    assert load(name, [*given, "run.epochs=7"]).run.epochs == 7 != whole.run.epochs


def test_file_and_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data: {train: x}\nstudent: {model: m}\nlosses: {ce: {}}\noptimizer: {lr: 2e-3}"
    )
    whole = load(file)
    assert whole.optimizer.lr == 0.002 and whole.data.train == "x"
    assert load(str(file), ["optimizer.lr=1E+2"]).optimizer.lr == 100.0
    assert changed().model_dump() == {
        **Config.model_construct().model_dump(),
        "data": {**config.Data().model_dump(), "train": "images"},
        "student": {**config.Student().model_dump(), "model": "mobilenetv2_050"},
        "losses": {**Losses().model_dump(), "ce": CE().model_dump()},
    }


def test_overrides() -> None:
    run = changed("run.seeds=[3, 4]", "run.max_steps=5", "run.max_steps=null").run
    assert run.seeds == [3, 4] and run.max_steps is None
    assert changed("data.train=a=b=c").data.train == "a=b=c"
    nested = changed("student.options={a: {b: [1, null]}, lr: 1e-3}", "student.options.a.c=2")
    assert nested.student.options == {"a": {"b": [1, None], "c": 2}, "lr": 0.001}
    distilled = "teacher.model=vit_tiny_patch16_224"
    losses = changed(distilled, "losses.ce=null", "losses.kd={temperature: 4}").losses
    assert [name for name, _ in losses.terms()] == ["kd"] and losses.kd == KD(temperature=4)
    # a section that is null begins anew
    again = changed("teacher.optimizer=null", "teacher.optimizer.lr=.5")
    assert again.teacher.optimizer == config.Optimizer(lr=0.5)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", "1.e-3", ".1e-2"])
def test_number(number: str) -> None:
    assert changed(f"optimizer.lr={number}").optimizer.lr == 0.001
    assert changed(f"student.model='{number}'").student.model == number


def test_only_numbers_are_read_as_numbers() -> None:
    """YAML 1.1 makes 8 of 010, a date of 2026-01-31, and False of no."""
    assert changed("run.epochs=010").run.epochs == 10
    for text in ("2026-01-31", "no", "on", "1:30:00", "0b1", "1_0"):
        assert changed(f"run.folder={text}").run.folder == text
    options = changed("student.options={a: &x {b: 1}, c: {<<: *x, d: null}}").student.options
    assert options == {"a": {"b": 1}, "c": {"b": 1, "d": None}}


def test_losses_that_are_not_named() -> None:
    student, images = "student.model=mobilenetv2_050", "data.train=images"
    alone = load(None, [student, images]).losses
    assert alone == Losses(ce=CE())
    distilled = load(None, [student, images, "teacher.model=vit_tiny_patch16_224"]).losses
    assert distilled == Losses(kd=KD(temperature=4))


def test_schedule() -> None:
    ce = changed("losses.ce.weight={start: 1, end: 0.5, until: 0.5}").losses.ce
    assert ce is not None
    assert [ce.weight.at(x) for x in (0, 0.25, 0.5, 0.75, 1)] == [1, 0.75, 0.5, 0.5, 0.5]
    cosine = Ramp(start=2, end=0, shape="cosine")
    for x in (0.0, 0.2, 0.5, 1.0):
        assert cosine.at(x) == pytest.approx(1 + math.cos(math.pi * x))
    constant = changed("losses.ce.weight=3").losses.ce
    assert constant is not None and [constant.weight.at(x) for x in (0, 0.3, 1)] == [3, 3, 3]


def test_the_baseline_keeps_the_smoothing() -> None:
    assert Losses(kd=KD(label_smoothing=0.1)).baseline() == Losses(ce=CE(label_smoothing=0.1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learningrate=1",
            "optimizer.learningrate: unknown key; expected .*optimizer.lr",
        ),
        ("optimizer.weight_deca=1", "optimizer.weight_deca: .*the nearest is optimizer.weight_dec"),
        ("losses.kd.temprature=3", "losses.kd.temprature: .*the nearest is losses.kd.temperature"),
        ("losses.ce.weight={start: 1, ent: 1}", "ent: unknown .*nearest is losses.ce.weight.end$"),
        ("teacher.optimizer.nam=x", "teacher.optimizer.nam: .*nearest is teacher.optimizer.name"),
        ("run.alone=false", "run.alone: it is called run.baseline now"),
        ("int8.pictures=8", "int8.pictures: it is called int8.calibration_images now"),
        # a path that is alike does not make a name alike
        ("losses.foo={}", "losses.foo: unknown key; expected one of losses.kd, losses.ce"),
        ("optimiser.lr=1", "optimiser: unknown key; the nearest is optimizer"),
        ("x=1", "x: unknown key; expected one of data, teacher, teachers"),
        ("optimizer.lr=true", r"optimizer.lr: True \(bool\) given"),
        ("losses.ce.weight=true", r"losses.ce.weight: True \(bool\) given.*dictionary$"),
        ("run.epochs=true", r"run.epochs: True \(bool\)"),
        ("run.epochs=1e2", r"run.epochs: 100.0 \(float\)"),
        ("run.baseline=1", r"run.baseline: 1 \(int\)"),
        ("optimizer.lr='1e-3'", r"optimizer.lr: '1e-3' \(str\)"),
        ("optimizer.lr=.nan", "optimizer.lr: nan"),
        ("losses.ce.weight=.inf", "losses.ce.weight.start: inf"),
        ("losses.ce.weight={start: 1, end: 1, until: 0}", "losses.ce.weight.until: 0"),
        ("losses.ce={label_smoothing: 2}", "losses.ce.label_smoothing: 2"),
        ("losses.kd={temperature: 0}", "losses.kd.temperature: 0"),
        ("data.train=2012", r"data.train: 2012 \(int\) given; .* string; quote it"),
        ("run.baseline=no", r"run.baseline: 'no' \(str\)"),
        ("run.epochs=1:30", r"run.epochs: '1:30' \(str\)"),
        ("run.epochs=1_000", r"run.epochs: '1_000' \(str\)"),
        ("run.epochs=0x10", r"run.epochs: '0x10' \(str\)"),
        ("losses.kd={temperature: 2, temperature: 4}", "losses.kd: no YAML: key 'temperature' sta"),
        ("run.epochs=!!int x", "run.epochs: no YAML: "),
        ("data=null", r"data: None \(NoneType\) given; input should be a valid dictionary$"),
        ("data.holdout=1", "data.holdout: 1"),
        ("run.seeds=[]", "run.seeds: "),
        ("run.seeds=[0, true]", "run.seeds.1: True"),
        ("augmentation.scale=[0.5]", "augmentation.scale: "),
        ("run.precision=half", "run.precision: 'half' .*'float32', 'bfloat16' or 'float16'"),
        ("student.model=''", "student.model: missing"),
        ("losses.ce=null", "losses: expected one or more of kd, ce, .*, got none"),
        ("losses.kd={}", "teacher.model: missing"),
        ("data.train=''", "data.train: missing"),
        ("data.train.x=1", "data.train.x: expected a section train, got a str"),
        ("data.train", "override: expected key=value, got 'data.train'"),
        ("data.train=[", "data.train: no YAML"),
        ("data.train=!!python/name:os.system", "data.train: no YAML"),
    ],
)
def test_error(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(override)


def test_error_of_odd_batches() -> None:
    with pytest.raises(ConfigError, match=r"data.batch_size: 7 is odd"):
        changed("data.batch_size=7", "augmentation.cutmix=1")
    assert changed("data.batch_size=7").data.batch_size == 7


def test_every_error_at_once() -> None:
    with pytest.raises(ConfigError, match=r"data.trian: .*; optimizer.lr: -1"):
        changed("data.trian=x", "optimizer.lr=-1")


@pytest.mark.parametrize("text", ["- 1", "", "a: [", b"\xff"])
def test_error_of_files(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in (file, tmp_path / "none.yml", tmp_path):
        with pytest.raises(ConfigError, match=name.name):
            load(name)
    with pytest.raises(ConfigError, match=r"recipe .*, got digit; the nearest is digits"):
        load("digit")


def test_a_path_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("student: {checkpoint: ~/s.safetensors}")
    keys = "data.root data.train data.val teacher.checkpoint teacher.model run.folder".split()
    given = [*LEAST, "losses.kd.temperature=2", *(f"{key}=~/x y" for key in keys)]
    made = config.load("~/mine.yaml", given).model_dump()
    for key in keys:
        section, name = key.split(".")
        assert made[section][name] == f"{tmp_path}/x y", key
    assert made["student"]["checkpoint"] == f"{tmp_path}/s.safetensors"
    made = config.load(None, [*LEAST, "student.model=local-dir:~/x", "data.val=a/~"])
    assert (made.student.model, made.data.val) == (f"local-dir:{tmp_path}/x", "a/~")
