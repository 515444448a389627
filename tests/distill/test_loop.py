"""The loop: resumed runs, signals, ranks, accumulation, averages, losses that are NaN or Inf."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from support.loop_tools import PLAIN, TINY, frozen, teacher, trainer
from support.process_tools import run_ranks
from support.run_tools import distill
from vitkd_fast import models
from vitkd_fast.distill import checkpoint, logger, optim
from vitkd_fast.distill.config import ConfigError, Optimizer, load
from vitkd_fast.distill.logger import Meter
from vitkd_fast.distill.loop import NonFiniteError, Stopped, Trainer
from vitkd_fast.distill.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# resuming


@pytest.mark.parametrize(
    ("at", "losses"),
    [
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
        (5, []),
        (3, ["losses.attention={stride: 8}"]),
    ],
    ids=str,
)
def test_resume_gives_the_same_weights(tmp_path: Path, at: int, losses: list[str]) -> None:
    whole = trainer(tmp_path / "whole", losses).run()
    cut = trainer(tmp_path / "cut", ["run.save_every=1", *losses])
    update = cut.update

    def crash(batches) -> None:
        if cut.step == at:
            raise RuntimeError("crash")
        update(batches)

    cut.update = crash  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="crash"):
        cut.run()
    torch.manual_seed(123)  # what the process drew before must not matter
    again = trainer(tmp_path / "cut", losses, resume=True)
    assert again.step == at
    assert bool(again.learned) == bool(losses)
    assert_same(again.run(), whole)
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in logger.read(folder)]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["lamb", pytest.param("sgd", marks=pytest.mark.slow), "muon"])
def test_every_optimizer_is_restored(tmp_path: Path, name: str) -> None:
    changed = [f"optimizer.name={name}", "run.max_steps=3"]
    whole = trainer(tmp_path / "whole", changed).run()
    first = trainer(tmp_path / "cut", [*changed, "run.save_every=1"])
    stop_after(first, 2)
    with pytest.raises(Stopped):
        first.run()
    assert_same(trainer(tmp_path / "cut", changed, resume=True).run(), whole)


def stop_after(run: Trainer, step: int) -> None:
    """SIGTERM comes while this step is taken."""
    update = run.update

    def interrupted(batches) -> None:
        update(batches)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    run.update = interrupted  # type: ignore[method-assign]


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_be_done(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    stop_after(run, 6)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 6 of 6"):
        run.run()
    assert not (tmp_path / "last.safetensors").exists()
    trained = trainer(tmp_path, resume=True).run()
    assert_same(models.load(tmp_path / "last.safetensors").model, trained)
    assert [row["step"] for row in logger.read(tmp_path) if row["kind"] == "val"] == [6]


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    save_model = run.save_model

    def interrupted(*arguments) -> None:
        save_model(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    run.save_model = interrupted
    with pytest.raises(Stopped):
        run.run()
    again = trainer(tmp_path, resume=True)
    assert again.evaluated == again.step == again.total


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = trainer(tmp_path).run()
    again = trainer(tmp_path, resume=True)
    assert again.step == again.total
    assert_same(again.run(), first)


def test_resumed_weights_keep_their_layout(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    again = trainer(tmp_path, resume=True)
    moments = [s["exp_avg"] for s in again.optimizer.state.values() if s["exp_avg"].dim() == 4]
    assert moments
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in moments)


def vitkd(*arguments: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "vitkd"), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


SHORT = [*TINY[:-3], "teacher.epochs=1", *TINY[-2:], "run.max_steps=8", "run.log_every=1"]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not any(row["step"] >= step for row in logger.read(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert f"report: {folder}/report.html" in distill("digits", *SHORT, f"run.folder={folder}")
    return folder


def test_kill_9_and_resume_give_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    step = random.SystemRandom().randrange(1, 8)
    print(f"killed after step {step}")
    command = ["digits", *SHORT, "run.save_every=2", f"run.folder={tmp_path / 'run'}"]
    process = vitkd("distill", *command, cwd=tmp_path)
    wait_for_step(tmp_path / "run" / "distilled-0", step, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "report.html").exists()
    assert "report.html" in distill(*command, "--resume")
    for name in ("distilled-0/last.safetensors", "distilled-0/best.safetensors"):
        ours, theirs = load_file(tmp_path / "run" / name), load_file(uninterrupted / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_with_a_message(sent: signal.Signals, tmp_path: Path) -> None:
    # the teacher's run is the first to go on
    many = [x for x in SHORT if not x.startswith("run.max_steps")] + ["teacher.epochs=50"]
    many.append("data.workers=2")
    process = vitkd("distill", "digits", *many, "run.folder=run", cwd=tmp_path)
    folder = tmp_path / "run" / "teacher"
    wait_for_step(folder, 2, process)
    os.killpg(process.pid, sent)  # as Ctrl-C and most job schedulers do: workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    line = err.strip().splitlines()[-1]
    step = checkpoint.read_header(folder / "checkpoint.safetensors")["info"]["step"]
    assert f"teacher: stopped by {sent.name} after step {step} of" in line
    assert "--resume goes on" in line
    assert step >= 2
    assert "Traceback" not in err


# the step


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in logger.read(folder) if row["kind"] == "train"]


SGD = ["optimizer.name=sgd", "optimizer.lr=0.01"]  # adam divides by what may be rounding alone


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    trainer(folder / "two", ["data.batch_size=8", *PLAIN, *SGD], student=frozen()).run()
    # with statistics that each rank sees differently, all end with those that are saved
    live = trainer(folder / "live", ["data.batch_size=8", *PLAIN])
    if rank == 1:
        stop_after(live, 5)
    try:
        live.run()
    except Stopped as stop:
        assert "after step 5" in str(stop)
    live = trainer(folder / "live", ["data.batch_size=8", *PLAIN], resume=True)
    assert live.step == 5
    trained = live.run()
    torch.save(trained.state_dict(), folder / f"trained-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_the_doubled_batch(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    torch.manual_seed(0)
    trainer(tmp_path / "one", [*PLAIN, *SGD], student=frozen()).run()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6
    assert len(set(one)) == 6  # it does change from step to step
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two))
    val = [
        [row["top1"] for row in logger.read(tmp_path / name) if row["kind"] == "val"]
        for name in ("one", "two")
    ]
    assert val[0] == val[1] != []
    saved = load_file(tmp_path / "live" / "last.safetensors")
    for rank in (0, 1):
        trained = torch.load(tmp_path / f"trained-{rank}.pt")
        assert all(torch.equal(trained[name], value) for name, value in saved.items())


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    for name, batch, accumulate in (("one", 32, 1), ("two", 16, 2)):
        torch.manual_seed(0)
        trainer(
            tmp_path / name,
            [f"data.batch_size={batch}", *PLAIN, *SGD, f"optimizer.accumulate={accumulate}"],
            student=frozen(),
        ).run()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two))


def test_the_teacher_is_a_constant(tmp_path: Path) -> None:
    constant = teacher()
    before = {name: x.clone() for name, x in constant.state_dict().items()}
    run = trainer(tmp_path, teacher=constant)
    run.run()
    assert constant.training
    assert all(torch.equal(before[name], x) for name, x in constant.state_dict().items())
    [frozen_teacher] = run.task.teachers
    assert not frozen_teacher.training
    assert not any(p.requires_grad for p in frozen_teacher.parameters())
    dtypes = {p.dtype for p in frozen_teacher.parameters()}
    assert dtypes == {run.runtime.teacher_dtype}


def test_a_student_learns_where_its_teacher_looks(tmp_path: Path) -> None:
    """Half the loss it began with, and less than that of attention which is the same everywhere."""
    constant = teacher()
    with torch.no_grad():
        for block in constant.blocks:
            block.attn.qkv.weight *= 8  # fresh weights look everywhere alike
    alone = ["losses={ce: {weight: 0.1}, attention: {stride: 8}}", *PLAIN[:3]]
    alone += ["optimizer={lr: 3e-3}", "run.epochs=100"]
    run = trainer(tmp_path, [*alone, "run.max_steps=250", "run.log_every=25"], teacher=constant)
    images = next(run.loader.epoch(0)).images
    [answers] = run.task.teacher_outputs(images)
    queries, keys = (x[-1][:, :, 1:].float() for x in (answers.queries, answers.keys))
    attention = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)
    everywhere = (attention * (attention * attention.shape[-1]).log()).sum(-1).mean()
    run.run()
    found = [row["attention"] for row in logger.read(tmp_path) if row["kind"] == "train"]
    assert found[-1] < found[0] / 2
    assert found[-1] < everywhere
    assert all(p.grad is None for p in constant.parameters())


def test_what_losses_learn_is_no_part_of_the_student(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["losses.attention={stride: 8}"])
    before = [p.clone() for p in run.learned.parameters()]
    run.run()
    assert before
    assert all(not torch.equal(x, y) for x, y in zip(before, run.learned.parameters(), strict=True))
    assert_same(models.load(tmp_path / "last.safetensors").model, run.trained)


def test_the_average_is_what_is_saved_and_scored(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    trained = run.run()
    assert trained is not run.model
    saved = models.load(tmp_path / "last.safetensors").model
    assert_same(saved, trained)
    assert any(
        not torch.equal(x, y)
        for x, y in zip(trained.parameters(), run.model.parameters(), strict=True)
    )


def test_the_schedule_warms_up_and_ends_low(tmp_path: Path) -> None:
    changed = ["run.max_steps=12", "run.log_every=1", "data.batch_size=64"]
    trainer(tmp_path, changed).run()
    rates = [row["lr"] for row in logger.read(tmp_path) if row["kind"] == "train"]
    assert len(rates) == 12
    top = rates.index(max(rates))
    assert 0 < top < 11
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.3 * max(rates)


def test_wsd_is_flat_between_warm_up_and_cooldown() -> None:
    options = Optimizer(lr=0.1, schedule="wsd", cooldown=0.2, warmup_epochs=0.5, warmup_lr=0.05)
    sgd = torch.optim.SGD([torch.zeros(1)], lr=options.lr)
    schedule = optim.create_scheduler(sgd, options, steps=20, steps_per_epoch=4)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(sgd.param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.05, 0.075]) and rates[2:16] == [0.1] * 14
    fall = [0.1 * (1 - math.sqrt(x)) for x in (0, 0.25, 0.5, 0.75)]
    assert rates[16:] == pytest.approx(fall)
    with pytest.raises(ConfigError, match="within 20 steps, got 18 and 4"):
        late = options.model_copy(update={"warmup_epochs": 4.5})
        optim.create_scheduler(sgd, late, steps=20, steps_per_epoch=4)


@pytest.mark.parametrize("attention", ["null", pytest.param("{stride: 8}", marks=pytest.mark.slow)])
def test_a_compiled_student_learns_the_same(attention: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    short = [*PLAIN, f"losses.attention={attention}", "run.max_steps=2", "run.log_every=1"]
    compiled_frames = torch._dynamo.utils.counters["frames"]
    compiled_frames.clear()
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        torch.manual_seed(0)
        trainer(tmp_path / name, [*short, f"run.compile={compiled}"], student=frozen()).run()
    assert compiled_frames["ok"] >= 2  # student and teacher
    one, two = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-3, atol=1e-4)


# losses that are NaN or Inf


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    # 1e39 is past float32's largest number: the loss is finite in the first steps
    growing = ["losses.kd={weight: {start: 1, end: 1e41, until: 1.0}}", "run.save_every=1"]
    growing += ["run.log_every=4", "optimizer={lr: 1e-9, schedule: constant}"]
    run = trainer(tmp_path, growing)
    run.update = functools.partial(_without_learning, run, run.update)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as error:
        run.run()
    assert str(error.value) == (
        f"{tmp_path.name}: loss kd is not finite at step 1 (learning rate 1e-09); checkpoint: "
        f"{tmp_path}/checkpoint.safetensors is the last good one; "
        f"`vitkd replay {tmp_path}/nonfinite.safetensors` shows step 1, where it began"
    )
    assert checkpoint.read_header(tmp_path / "checkpoint.safetensors")["info"]["step"] == 1
    assert trainer(tmp_path, growing, resume=True).step == 1


def _without_learning(run: Trainer, update, batches) -> None:
    """A gradient of 1e39 would make the weights NaN or Inf in the same step as the loss."""
    kept = {name: x.clone() for name, x in run.model.state_dict().items()}
    update(batches)
    run.model.load_state_dict(kept)


def test_it_is_noticed_at_the_log_interval(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["losses.kd.weight=1e39", "run.log_every=3", *PLAIN[:2]])
    with pytest.raises(NonFiniteError, match="loss kd is not finite at step 0"):
        run.run()
    assert run.step == 3
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_weights_that_are_no_number_are_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, ["run.save_every=2"])
    update = run.update

    def poison(batches) -> None:
        update(batches)
        if run.step == 4:
            next(run.model.parameters()).data[0] = float("nan")

    run.update = poison  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="weights are not finite after step 3"):
        run.run()
    assert checkpoint.read_header(tmp_path / "checkpoint.safetensors")["info"]["step"] == 2


def test_meter_keeps_the_first_bad_step_of_each_term() -> None:
    meter = Meter(["a", "b"], torch.device("cpu"))
    meter.add(torch.tensor([1.0, 2.0]), 7)
    meter.add(torch.tensor([3.0, 4.0]), 8)
    assert meter.first_bad() is None
    assert meter.means() == {"a": 2.0, "b": 3.0}
    meter.add(torch.tensor([1.0, float("nan")]), 9)
    meter.add(torch.tensor([float("inf"), 1.0]), 10)
    assert meter.first_bad() == (9, "b")


# files


def test_a_folder_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match=r"run.folder: .*file/run cannot be"):
        trainer(tmp_path / "file" / "run")


def test_a_full_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(checkpoint.CheckpointError, match="has 5 MiB left, and checkpoints take"):
        trainer(tmp_path)


def test_damaged_and_foreign_checkpoints_name_the_file(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    file = tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.safetensors: expected a"):
        trainer(tmp_path, resume=True)
    file.write_bytes((tmp_path / "last.safetensors").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="expected a checkpoint of version"):
        trainer(tmp_path, resume=True)
    file.write_bytes(content)
    other = models.create("mobilenetv2_050", num_classes=10)
    with pytest.raises(checkpoint.CheckpointError, match="is of another model or optimiser"):
        trainer(tmp_path, resume=True, student=other)


def test_a_failed_write_keeps_the_checkpoint(tmp_path: Path, monkeypatch) -> None:
    run = trainer(tmp_path)
    run.run()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run.path, {"student": run.model}, run.optimizer, {})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# the logger


def test_journal_on_a_plain_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logger.MetricLogger(tmp_path, "run", total=10) as written:
        written.write("train", 5, {"epoch": 0.5, "loss": 1.25, "images_per_s": 100.0})
        written.write("val", 5, {"epoch": 0.5, "top1": 0.5})
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("run: train step 5/10  loss 1.25  images_per_s 100  ")
    assert out[0].endswith(" s left")
    assert out[1].startswith("run: val   step 5/10  top1 0.5")
    assert [row["kind"] for row in logger.read(tmp_path)] == ["train", "val"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_journal_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tra')
    assert logger.read(tmp_path) == rows
    with logger.MetricLogger(tmp_path, "run", total=10, step=2) as written:
        written.write("train", 3, {"loss": 2.0})
    assert [row["loss"] for row in logger.read(tmp_path)] == [1.0, 1.0, 2.0]


# the device


@pytest.mark.gpu
def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batches = run.loader.epoch(0)
    run.forward.train()
    run.update(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.update(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_precision_by_device() -> None:
    def place(*overrides: str) -> Runtime:
        return Runtime.of(load("digits", ["run.device=cpu", *overrides]))

    assert place().student_dtype == torch.float32
    assert place("run.precision=bfloat16").student_dtype == torch.bfloat16


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
