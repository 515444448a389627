"""Time, memory and energy of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.audit_tools import Trained
from vitkd_fast.audit import cost


def counters(root: Path, *microjoules: int, most: int = 10_000_000) -> list[Path]:
    """Counters of packages, as Linux shows them, each with a part that is not counted again."""
    files = []
    for i, value in enumerate(microjoules):
        for name, what in ((f"intel-rapl:{i}", f"package-{i}"), (f"intel-rapl:{i}:0", "core")):
            folder = root / name
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{what}\n")
            (folder / "energy_uj").write_text(f"{value}\n")
            (folder / "max_energy_range_uj").write_text(f"{most}\n")
        files.append(root / f"intel-rapl:{i}" / "energy_uj")
    other = root / "intel-rapl:9"
    other.mkdir()
    (other / "name").write_text("psys\n")
    return files


def test_energy_is_what_all_packages_used_also_over_the_end_of_a_counter(tmp_path: Path) -> None:
    files = counters(tmp_path, 1_000_000, 9_900_000)

    def call() -> None:  # 0.25 J on the one, 0.5 J on the other
        for file, used in zip(files, (250_000, 500_000), strict=True):
            file.write_text(str((int(file.read_text()) + used) % 10_000_001))

    assert cost.energy(call, seconds=0, root=tmp_path) == cost.Energy(0.75)
    assert cost.energy(call, seconds=0.01, root=tmp_path).joules == pytest.approx(0.75, abs=0.5)


def test_energy_is_not_guessed(tmp_path: Path) -> None:
    found = cost.energy(lambda: None, root=tmp_path)
    assert found == cost.Energy(None, f"not available: no counter of RAPL under {tmp_path}")
    [file] = counters(tmp_path, 5)
    file.unlink()
    assert cost.energy(lambda: None, root=tmp_path).joules is None


def test_energy_that_only_the_administrator_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(tmp_path, 5)

    def refused(_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cost._Zone, "read", refused)
    found = cost.energy(lambda: None, root=tmp_path)
    assert found == cost.Energy(None, "not available: only the administrator may read it")


def test_cost_of_an_int8_file(trained: Trained) -> None:
    found = cost.cost(str(trained.int8))
    assert 0 < found["latency_ms"] <= found["latency_p90_ms"]
    # a busy machine may not have answered a hundred times
    assert (found["latency_p99_ms"] is None) == (found["latency_calls"] < 100)
    # without torch
    assert 0 < found["memory_before_bytes"] <= found["memory_bytes"] < 300 << 20
    assert found["file_bytes"] == trained.int8.stat().st_size
    assert (found["energy_j"] is None) == found["energy_note"].startswith("not available: ")


def test_cost_of_what_is_no_model(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    with pytest.raises(RuntimeError, match=f"audit: cost of {missing}: .*is not a file"):
        cost.cost(str(missing))
