"""timm's tasks with the fused losses: the same loss and gradient as timm's, and timm's habits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import DistillationTeacher, LogitDistillationTask, resume_task_checkpoint
from torch import Tensor, nn
from torch.testing import assert_close

from support.process_tools import run_ranks
from vitkd_fast.taps import Taps
from vitkd_fast.timm_task import AttentionDistillationTask, FusedLogitDistillationTask

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}


def student() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("mobilenetv2_035", num_classes=10)


def teacher(**options: object) -> nn.Module:
    torch.manual_seed(2)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT | options)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


def step(task: nn.Module, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """One forward and backward, as timm's train script has it."""
    result = task.train()(input, target)
    result["loss"].backward()
    return result


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


# logits: parity with timm


def pair(criterion: nn.Module, **options: object) -> list[LogitDistillationTask]:
    """timm's task and ours, of the same weights."""
    kinds = LogitDistillationTask, FusedLogitDistillationTask
    return [kind(student(), teacher(), criterion, verbose=False, **options) for kind in kinds]


def assert_parity(criterion: nn.Module, input: Tensor, target: Tensor, **options: object) -> None:
    """Down to every parameter's gradient in float64; to the logits' gradient in float32.

    (Batch norms over four values make float32's rounding large on the way to the parameters.)
    """
    target_dtype = torch.float64 if target.is_floating_point() else target.dtype
    theirs, ours = (task.double() for task in pair(criterion, **options))
    double = input.double(), target.to(target_dtype)
    want, got = step(theirs, *double), step(ours, *double)
    assert list(got) == list(want)
    assert_close(got, want, rtol=1e-9, atol=1e-12)
    grads = gradients(ours.trainable_module)
    assert None not in grads.values()
    assert_close(grads, gradients(theirs.trainable_module), rtol=1e-7, atol=1e-9)

    results = [task.train()(input, target) for task in pair(criterion, **options)]
    want, got = ({"grad": torch.autograd.grad(r["loss"], r["output"])[0]} | r for r in results)
    assert_close(got, want, rtol=1e-5, atol=1e-6)


WEIGHTS = {
    "default": {},
    "complementary": {"task_loss_weight": 0.3},
    "independent": {"task_loss_weight": 0.5, "distill_loss_weight": 2.0},
    "distillation alone": {"task_loss_weight": 0.0, "distill_loss_weight": 1.0},
    "no distillation": {"task_loss_weight": 1.0, "distill_loss_weight": 0.0},
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_loss_and_gradient_are_timms(weights: dict[str, float], temperature: float) -> None:
    assert_parity(nn.CrossEntropyLoss(), *batch(), temperature=temperature, **weights)


@pytest.mark.parametrize(
    ("criterion", "dense"),
    [
        (LabelSmoothingCrossEntropy(0.1), False),
        (SoftTargetCrossEntropy(), True),
        (BinaryCrossEntropy(target_threshold=0.2), True),
    ],
    ids=lambda x: type(x).__name__,
)
def test_targets_are_what_the_criterion_takes(criterion: nn.Module, dense: bool) -> None:
    """Class ids, and what timm's Mixup makes of them."""
    input, target = batch()
    if dense:
        input, target = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(input, target)
        assert target.shape == (4, 10)
    assert_parity(criterion, input, target, task_loss_weight=0.4, temperature=3.0)


def test_autocast_is_timms() -> None:
    """Both form their loss of bfloat16 logits in float32."""
    theirs, ours = pair(nn.CrossEntropyLoss(), temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (task.train()(*batch()) for task in (theirs, ours))
    assert got["loss"].dtype == torch.float32
    assert_close(got["kd_loss"], want["kd_loss"], rtol=2e-2, atol=1e-4)


class Halved(DistillationTeacher):
    """A teacher with a normalisation of its own."""

    def normalize_input(self, input: Tensor, *_: object) -> Tensor:
        return input / 2


@pytest.mark.parametrize("wrap", [DistillationTeacher, Halved])
@pytest.mark.parametrize("kind", [FusedLogitDistillationTask, AttentionDistillationTask])
@pytest.mark.parametrize("mean", [0.5, None], ids=["own mean", "the student's"])
def test_the_teacher_sees_its_own_normalisation(
    kind: type, wrap: type[DistillationTeacher], mean: float | None
) -> None:
    net = student()
    model = teacher()
    for key in ("mean", "std"):
        model.pretrained_cfg[key] = (mean,) * 3 if mean else net.pretrained_cfg[key]
    task = kind(net, wrap(model), nn.CrossEntropyLoss(), verbose=False)
    seen: list[Tensor] = []
    model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    input, target = batch()
    for _ in range(2):
        task.train()(input, target)
    want = task.teacher.normalize_input(input, task.student_mean, task.student_std)
    assert torch.equal(want, input) == (mean is None and wrap is DistillationTeacher)
    assert_close(seen[-2:], [want, want])


# attention


def attention_task(**options: object) -> AttentionDistillationTask:
    options = {"stride": 8, "task_loss_weight": 0.5, "distill_loss_weight": 2.0} | options
    net, model = student(), teacher()
    return AttentionDistillationTask(net, model, nn.CrossEntropyLoss(), verbose=False, **options)


def test_attention_is_its_formula() -> None:
    task = attention_task()
    net = copy.deepcopy(task.get_eval_model()).train()
    input, target = batch()
    result = step(task, input, target)
    assert list(result) == ["loss", "output", "task_loss", "kd_loss"]
    tapped = Taps(net, maps=(8,))(input)
    for_teacher = task.teacher.normalize_input(input, task.student_mean, task.student_std)
    seen = Taps(teacher().eval(), attention=(-1,))(for_teacher)
    projection = copy.deepcopy(task.trainable_module.projection)
    kd = projection(tapped.maps[8], seen.queries[-1].detach(), seen.keys[-1].detach())
    ce = nn.functional.cross_entropy(tapped.logits, target)
    projection.zero_grad()
    (0.5 * ce + 2 * kd).backward()
    assert_close(result["output"], tapped.logits)
    assert_close([result["task_loss"], result["kd_loss"]], [ce, kd])
    assert_close(result["loss"], 0.5 * ce + 2 * kd)
    assert_close(gradients(task.trainable_module.student), gradients(net))
    assert_close(gradients(task.trainable_module.projection), gradients(projection))
    assert all(p.grad is None for p in task.teacher.parameters())


def test_options_reach_the_projection() -> None:
    task = attention_task(heads=1, head_dim=5, teacher_heads="mean", temperature=2.0, kind="mse")
    projection = task.trainable_module.projection
    kept = {"heads": 1, "teacher_heads": "mean", "temperature": 2.0, "kind": "mse"}
    assert {name: getattr(projection, name) for name in kept} == kept
    assert projection.projection.out_features == 2 * 5
    assert attention_task().trainable_module.projection.heads == VIT["num_heads"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_feature_dim": 3}, "student_feature_dim: expected None, got 3"),
        ({"stride": 5}, r"maps: expected \[2, 4, 8, 16, 32\] of .*, got 5"),
        ({"block": 2}, r"attention: expected \[-2, -1, 0, 1\] of .*, got 2"),
        ({"heads": 3}, "heads: expected a divisor of teacher_dim 32, got 3"),
        ({"teacher_model": "resnet18"}, "attention: expected none of .*, got -1"),
        ({"teacher_model": "swin_tiny_patch4_window7_224"}, "no grid of their own"),
    ],
    ids=str,
)
def test_errors_name_the_argument(options: dict[str, object], message: str) -> None:
    if name := options.pop("teacher_model", None):
        options["teacher_model"] = timm.create_model(name, num_classes=10)
    arguments = {"student_model": student(), "teacher_model": teacher(), "verbose": False} | options
    with pytest.raises(ValueError, match=message):
        AttentionDistillationTask(**arguments)


# timm's habits: what its train script does with a task

KINDS = pytest.mark.parametrize("kind", [FusedLogitDistillationTask, AttentionDistillationTask])


def of(kind: type) -> nn.Module:
    return attention_task() if kind is AttentionDistillationTask else pair(nn.CrossEntropyLoss())[1]


@KINDS
def test_train_script(kind: type, tmp_path: Path) -> None:
    """Optimiser, EMA, evaluation, and a checkpoint that another task goes on from."""
    task = of(kind)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.01)
    task.setup_ema(decay=0.5)
    input, target = batch()
    for number in range(3):
        step(task, input, target)
        nn.utils.clip_grad_norm_(task.get_clip_parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=number)
    before, after = of(kind).get_trainable_module(), task.get_trainable_module()
    moved = {
        name.split(".")[-2]
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    learned = {"projection"} if kind is AttentionDistillationTask else set()
    assert moved >= {"conv_stem", "conv_dw", "classifier"} | learned
    assert not task.teacher.training

    state = task.get_checkpoint_state() | {"optimizer": optimizer.state_dict(), "epoch": 7}
    assert list(state["state_dict"]) == list(student().state_dict())
    torch.save(state | {"version": 2}, tmp_path / "last.pth")
    again = of(kind)
    other = create_optimizer_v2(again.get_trainable_module(), opt="sgd", lr=0.01)
    assert resume_task_checkpoint(again, tmp_path / "last.pth", other, log_info=False) == 8
    for a, b in zip(again.get_trainable_module().parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
    task.eval()
    logits = [m.eval()(input) for m in (task.get_eval_model(), task.get_eval_model(ema=True))]
    assert logits[0].shape == (4, 10)
    assert not torch.equal(*logits)


@pytest.mark.slow
def test_compiled() -> None:
    """The same as eager, also when calls with taps and without take turns."""
    eager, compiled = attention_task(), attention_task()
    compiled.compile(backend="aot_eager")
    input, target = batch()
    for _ in range(2):
        want, got = step(eager, input, target), step(compiled, input, target)
        assert_close(got, want, rtol=1e-4, atol=1e-5)
        for mode in (False, True):  # a validation with running statistics, one without
            logits = [task.get_eval_model().train(mode)(input) for task in (eager, compiled)]
            assert_close(*logits, rtol=1e-4, atol=1e-4)


def ranks(rank: int, folder: Path) -> None:
    """One of two processes, each with half of the batch."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for kind in (FusedLogitDistillationTask, AttentionDistillationTask):
        task = of(kind).prepare_distributed()
        input, target = (x[2 * rank : 2 * rank + 2] for x in batch())
        task.train()
        task.get_eval_model().eval()  # each rank's batch norms would see their own half
        task(input, target)["loss"].backward()
        trained = task.get_trainable_module().module
        torch.save(gradients(trained), folder / f"{kind.__name__}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process_with_both_halves(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    for kind in (FusedLogitDistillationTask, AttentionDistillationTask):
        task = of(kind).train()
        task.get_eval_model().eval()
        task(*batch())["loss"].backward()
        want = gradients(task.get_trainable_module())
        for rank in (0, 1):
            got = torch.load(tmp_path / f"{kind.__name__}-{rank}.pt")
            assert_close({name.removeprefix("module."): g for name, g in got.items()}, want)


def test_an_old_timm_is_named(tmp_path: Path) -> None:
    """timm before 1.0.27 has no task, or one that keeps no state of its own."""
    package = tmp_path / "timm"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "1.0.20"')
    code = "import vitkd_fast.timm_task"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    last = process.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: vitkd_fast.timm_task: expected timm >= 1.0.27, got 1.0.20; "
        "pip install 'timm>=1.0.27'"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks(int(sys.argv[1]), Path(sys.argv[2]))
