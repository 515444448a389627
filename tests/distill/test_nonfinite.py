"""A run that a loss stops: the step in a file, and what its replay finds."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from support.loop_tools import PLAIN, TINY, student, teacher, trainer
from support.process_tools import run_ranks
from support.run_tools import arguments
from vitkd_fast import models
from vitkd_fast.distill import nonfinite
from vitkd_fast.distill.checkpoint import CheckpointError
from vitkd_fast.distill.loop import NonFiniteError, Trainer
from vitkd_fast.distill.nonfinite import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT = {"model": "mobilenetv2_035", "options": {"drop_path_rate": 0.1}}


def saved_teacher(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Sections for `rebuild`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    models.save(
        folder / "teacher.safetensors",
        model,
        name="vit_tiny_patch16_224",
        options=options,
        num_classes=10,
        pixels=models.Pixels.of(model),
        classes=tuple("0123456789"),
    )
    return {"student": STUDENT, "teacher": {"model": str(folder / "teacher.safetensors")}}


def stopped(run: Trainer) -> str:
    with pytest.raises(NonFiniteError) as error:
        run.run()
    return str(error.value)


def test_a_run_that_explodes(run_folder: Path, image_folder: Path, tmp_path: Path, vitkd) -> None:
    """Its learning rate is 1e6: gradients overflow, then weights, then the loss."""
    folder = tmp_path / "run"
    changed = [f"teacher={{model: {run_folder}/teacher/last.safetensors}}", "run.seeds=[0]"]
    changed += ["optimizer={lr: 1e6, schedule: constant}", "run.baseline=false", "run.epochs=3"]
    result = vitkd("distill", *arguments(image_folder, folder), *changed)
    file = folder / "distilled-0" / "nonfinite.safetensors"
    assert result.code == 1
    assert f"`vitkd replay {file}` shows step " in result.err
    header, tensors = nonfinite.read(file)
    assert tensors.keys() == load_file(file).keys()  # no code: safetensors alone reads it
    assert header.lr == 1e6
    assert header.classes == [str(i) for i in range(10)]
    shown = vitkd("replay", file)
    assert shown.code == 0, shown.err
    assert shown.out.startswith(
        f"distilled-0: step {header.step} of 27, seed 0, learning rate 1e+0"
    )
    assert "\nterm kd: " in shown.out
    assert "\nteacher: every layer's output is finite\n" in shown.out
    assert nonfinite.replay(file).statistics["student blocks.1"].max > 1e5


def test_the_same_step_is_taken_again(tmp_path: Path) -> None:
    """With mixing, dropout, drop path and two batches: the same losses, bit by bit."""
    growing = ["losses.kd={weight: {start: 1, end: 1e41}, ce_weight: 0.5}", "run.log_every=4"]
    growing += ["losses.attention={stride: 8}", "optimizer.schedule=constant"]
    model = teacher()
    run = trainer(tmp_path, growing, rebuild=saved_teacher(tmp_path / "t", model), teacher=model)
    seen, update, add = [], run.update, run.meter.add

    def without_learning(batches) -> None:
        """A gradient of 1e39 would make the weights NaN in the same step as the loss."""
        kept = {name: x.clone() for name, x in run.model.state_dict().items()}
        update(batches)
        run.model.load_state_dict(kept)

    def added(terms: torch.Tensor, step: int) -> None:
        seen.append((step, terms.tolist()))
        add(terms, step)

    run.update, run.meter.add = without_learning, added  # type: ignore[method-assign]
    message = stopped(run)
    assert "loss kd is not finite at step 1" in message
    assert "shows step 1, where it began" in message
    assert run.step == 4
    found = nonfinite.replay(tmp_path / "nonfinite.safetensors")
    assert found.header.step == 1
    first, again = ([terms for step, terms in x if step == 1][:2] for x in (seen[:8], seen[8:]))
    assert first == again
    assert list(found.terms.values()) == first[0]
    assert found.terms["kd"] == math.inf
    assert math.isfinite(found.terms["attention"])
    assert found.layers == {"student": None, "teacher": None}
    assert found.header.what == "loss kd is not finite at step 1"


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_first_bad_layer_is_named(tmp_path: Path, which: str) -> None:
    pair = {"student": student(), "teacher": teacher()}
    place = {"student": "blocks.3.0.conv_pw", "teacher": "blocks.1.mlp.fc1"}[which]
    weight = pair[which].get_parameter(f"{place}.weight")
    weight.data.view(-1)[5] = math.inf
    rebuild = saved_teacher(tmp_path / "t", pair["teacher"])
    run = trainer(tmp_path, ["run.log_every=1"], rebuild=rebuild, **pair)
    if which == "student":
        assert "is not finite at step 0" in stopped(run)
    else:
        stopped(run)
    found = nonfinite.replay(tmp_path / "nonfinite.safetensors")
    layer, other = found.layers[which], found.layers[{"student": "teacher"}.get(which, "student")]
    assert layer is not None and other is None
    assert layer.name == place
    assert 0 < layer.output.share < 1
    assert f"{which}: first layer whose output is not finite: {place} (" in str(found)
    assert not math.isfinite(found.terms["kd"])
    assert "term kd: nan is not finite" in str(found)
    assert found.weights == ([f"{place}.weight"] if which == "student" else [])
    assert found.statistics[f"{which} logits"].share > 0
    assert found.statistics["images"].share == 0
    assert found.gradient  # the loss's goes back to every weight


def test_a_layer_is_what_made_it_of_finite_numbers() -> None:
    """Not the part that it was handed to: timm's batch norm calls its activation itself."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clean, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.clean(x) / 0).clamp(max=6)

    found = nonfinite.Replay(None, {})  # type: ignore[arg-type]
    model = nn.Sequential(nn.Identity(), Outer(), nn.Identity())
    with nonfinite._watching({"student": model}, found):
        model(torch.ones(2, 3))
    layer = found.layers["student"]
    assert layer is not None
    assert (layer.name, layer.kind, layer.shape, layer.output.share) == ("1", "Outer", [2, 3], 1)
    assert not model[1]._forward_hooks


def test_weights_that_become_bad_without_a_bad_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["run.log_every=6"])
    update = run.update

    def poison(batches) -> None:
        update(batches)
        if run.step == 3:
            next(run.model.parameters()).data[0] = math.nan

    run.update = poison  # type: ignore[method-assign]
    message = stopped(run)
    assert "loss kd is not finite at step 3" in message
    assert "shows step 2, where it began" in message  # one before the loss shows it
    header, tensors = nonfinite.read(tmp_path / "nonfinite.safetensors")
    assert (header.step, header.what) == (2, "the weights are not finite after step 2")
    assert all(x.isfinite().all() for x in tensors.values())
    assert {key for key in tensors if key.startswith("images")} == {"images.0", "images.1"}


def test_what_does_not_happen_again_leaves_no_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["run.log_every=2"])
    add, steps = run.meter.add, []

    def once(terms: torch.Tensor, step: int) -> None:
        steps.append(step)
        add(terms * math.inf if len(steps) == 4 else terms, step)

    run.meter.add = once  # type: ignore[method-assign]
    message = stopped(run)
    assert message.endswith("checkpoint: none was saved")
    assert steps == [0, 0, 1, 1] * 2
    assert not (tmp_path / "nonfinite.safetensors").exists()


def test_statistics() -> None:
    x = torch.tensor([1.0, -3.0, math.nan, math.inf, 5.0])
    assert Statistics.of(x, torch.tensor([1.0])) == (-3, 5, 1, pytest.approx(1 / 3))
    nothing = Statistics.of(torch.tensor([math.nan]))
    assert math.isnan(nothing.mean) and nothing.share == 1


def test_other_files_are_refused(tmp_path: Path, run_folder: Path, vitkd) -> None:
    other = run_folder / "teacher" / "last.safetensors"
    (tmp_path / "text").write_text("x" * 100)
    for file in (other, tmp_path / "text", tmp_path / "none"):
        with pytest.raises(
            CheckpointError, match=f"{file.name}: expected a step of `vitkd distill"
        ):
            nonfinite.replay(file)
    assert vitkd("replay", other).code == 1
    run = trainer(tmp_path / "run", ["losses.kd.weight=1e39"], rebuild={"student": STUDENT})
    stopped(run)
    header, tensors = nonfinite.read(file := tmp_path / "run" / "nonfinite.safetensors")
    model = saved_teacher(tmp_path / "t", teacher())["teacher"]
    config = header.config | {"student": {"model": "mobilenetv2_050"}, "teacher": model}
    state = {k.removeprefix("student."): x for k, x in tensors.items() if "student." in k}
    nonfinite.save(file, header._replace(config=config), {"student": state}, [])
    with pytest.raises(CheckpointError, match=r"does not fit its configuration: .*size mismatch"):
        nonfinite.replay(file)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    run = trainer(folder / "run", [*TINY, *PLAIN, "run.log_every=2", "data.batch_size=8"])
    add = run.meter.add
    bad = functools.partial(torch.full_like, fill_value=math.inf)
    run.meter.add = lambda x, step: add(bad(x) if rank and step == 1 else x, step)  # type: ignore[method-assign]
    assert "shows step 1, where it began" in stopped(run)
    dist.destroy_process_group()


def test_the_rank_with_the_bad_loss_writes(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    header, _ = nonfinite.read(tmp_path / "run" / "nonfinite.safetensors")
    assert (header.rank, header.step) == (1, 1)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
