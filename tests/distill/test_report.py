"""The report: strict JSON, a page that loads nothing, and what a browser makes of it."""

import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.page_tools import browse, measured
from vitkd_fast.distill import report

AWKWARD = '<b>&"'
ROLES = ["teacher", "baseline", "distilled", "int8"]
METRICS = "top1 top5 precision recall f1 kappa quadratic_kappa mcc auroc ece nll".split()
OPTIONAL = ["comparison", "curves", "confusion", "int8_confusion", "per_class", "disagreements"]
OPTIONAL += ["notes"]
GIF = "data:image/gif;base64,R0lGODdhAgACAIAAAAAAAAAAACwAAAAAAgACAAAIBgABCAQQEAA7"  # 2 x 2


def model(role: str, top1: float, seeds: int, size: int, latency: float) -> dict:
    fidelity = {} if role == "teacher" else {"agreement": 0.93, "kl": 0.08, "correlation": 0.9}
    metrics = [{key: top1 + 0.002 * seed for key in METRICS} for seed in range(seeds)]
    runs = [{"seed": i, "metrics": m, "fidelity": fidelity} for i, m in enumerate(metrics)]
    mean = {key: sum(m[key] for m in metrics) / seeds for key in METRICS} | fidelity
    return {
        "role": role, "model": "a_model", "parameters": size // 4, "macs": 56_500_000,
        "bytes": size, "latency_ms": latency, "latency_p90_ms": 1.1 * latency,
        "latency_p99_ms": 3 * latency, "latency_cpu_ms": latency, "latency_calls": 1234,
        "images_per_s": 1000 / latency, "batch": 64,
        "conditions": {"device": "CPU", "threads": 2, "runs": f"what runs {role}"},
        "runs": runs, "mean": mean, "std": dict.fromkeys(mean, 0.002),
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    wrong, right = {"class": AWKWARD, "probability": 0.9}, {"class": "5", "probability": 0.8}
    shown = {"image": GIF, "name": AWKWARD, "label": "5", "teacher": wrong, "student": right}
    train = [{"step": i, "epoch": i / 30, "lr": 1e-3, "loss": 2 / (1 + i)} for i in range(300)]
    val = [{"step": 30 * i, "epoch": float(i), "top1": 0.9 - 0.1 / i} for i in range(1, 11)]
    recalls = {
        role: [0.5 + 0.05 * ((i + n) % 10) for i in range(10)] for n, role in enumerate(ROLES)
    }
    names = [AWKWARD, "$x_$", "</style>", *"3456789"]
    per_class = {
        role: [{"class": name, "images": 80, "recall": recall, "precision": 0.5, "f1": 0.5,
                "confused_with": names[3]} for name, recall in zip(names, values, strict=True)]
        for role, values in recalls.items()
    }  # fmt: skip
    return {
        "version": 1, "title": "digits", "verdict": "Distilled beats the baseline by 1.2 points.",
        "config": {"loss": {"temperature": 4.0, "labels": None},
                   "data": {"train": "my images", "val": ""},
                   "run": {"folder": "runs/digits", "seeds": [0, 1, 2]}},
        "environment": {"torch": "2.11"}, "per_class": per_class,
        "data": {"train": 8, "val": 9, "classes": names},
        "models": [
            model("teacher", 0.972, 1, 22_105_384, 14.23),
            model("baseline", 0.938, 3, 6_112_424, 2.1),
            model("distilled", 0.95, 3, 6_112_424, 2.1), model("int8", 0.948, 3, 812_424, 0.6123),
        ],
        "comparison": {"metric": "top1", "seeds": 3, "difference": 0.012,
                       "standard_error": 0.0024, "standard_errors": 5.0, "t": 5.0, "p": 0.0377},
        "curves": {f"{role}, seed 0": {"train": train, "val": val} for role in ROLES[:3]},
        "confusion": {"role": ROLES[2], "seed": 0, "matrix": (np.eye(10) * 80 + 1).tolist()},
        "int8_confusion": {"role": "int8", "seed": 0, "matrix": (np.eye(10) * 70 + 2).tolist()},
        "disagreements": {"count": 12, "of": 899, "shown": [shown] * 5}, "notes": ["One thread."],
    }  # fmt: skip


def words(page: str, section: str) -> str:
    """A section's text."""
    part = page.split(f'<section id="{section}"')[1].split("</section>")[0]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", part)).split())


def test_write_then_read(results: dict, tmp_path: Path) -> None:
    page = report.write(results, tmp_path / "a" / "b")
    assert {page, page.with_name("report.json")} == set((tmp_path / "a" / "b").iterdir())
    assert page.name == "report.html" and report.read(page.parent) == results
    assert page.read_text(encoding="utf-8") == report.render(results) == report.render(results)


def test_what_json_and_utf8_lack(results: dict, tmp_path: Path) -> None:
    results["models"][1]["mean"]["auroc"] = float("nan")
    results["curves"]["baseline, seed 0"]["train"][7]["loss"] = float("inf")
    results["disagreements"]["shown"][0]["name"] = os.fsdecode(b"\xff.png")
    report.write(results, tmp_path).read_text(encoding="utf-8")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report.read(tmp_path)["models"][1]["mean"]["auroc"] is None


@pytest.mark.parametrize("text", [None, b'{"version": 1, "ti', b'{"version": 2}', b"[]", b"\xff"])
def test_read_names_a_bad_file(text: bytes | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"report\.json: "):
        report.read(tmp_path)


def test_a_failing_write_keeps_the_old_files(results: dict, tmp_path: Path, monkeypatch) -> None:
    report.write(results, tmp_path)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="JSON"):
        report.write(results | {"config": {"no JSON": object()}}, tmp_path)
    monkeypatch.setattr(os, "replace", None)  # both are written, neither is put in its place
    with pytest.raises(TypeError, match="callable"):
        report.write(results | {"title": "new"}, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_the_page_loads_nothing(results: dict) -> None:
    results["disagreements"]["shown"][0] |= {"image": "https://example.org/a.png"}
    page = report.render(results)
    for word in ("https:", "<script", "@import", "<link", "@font-face", AWKWARD, "</style> "):
        assert word not in page
    assert page.count("http:") == page.count('="http://www.w3.org/')  # SVG's names for itself
    assert page.count("</style>") == 4  # the page's and one in each image


def test_numbers(results: dict) -> None:
    page = report.render(results)
    assert "Top-1 accuracy, % ↑ 97.2 94.0 ± 0.2 95.2 ± 0.2" in words(page, "metrics")
    for text in ("97.2", "+1.20 percentage points", "0.24 points", "5.53 M",
                 "203,106", "812 kB", "6.11 MB", "2.10", "0.612", "14.2", "= 0.038"):  # fmt: skip
        assert text in page, text
    rows = report.table(results).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ROLES and len(set(map(len, rows))) == 1
    assert "94.0 ± 0.2" in rows[2] and "n/a" in rows[1] and "±" not in rows[1]
    assert max(map(len, rows)) < 120


def test_latency_has_quantiles_cpu_time_and_conditions(results: dict) -> None:
    text = words(report.render(results), "cost")
    assert "Latency p50, ms 14.2 2.10 2.10 0.612 p90, ms 15.7 2.31 2.31 0.674" in text
    assert "p99, ms 42.7 6.30 6.30 1.84 CPU time, ms 14.2 2.10 2.10 0.612" in text
    assert "images/s of a batch of 64" in text
    assert "int8: what runs int8, CPU, 2 threads, 1,234 calls" in text
    assert "busy" not in text
    results["models"][1]["latency_ms"] = 400.0
    results["models"][2]["latency_p99_ms"] = None
    text = words(report.render(results), "cost")
    assert text.count("busy") == 1 and "1,234 calls; the machine was busy" in text
    assert "p99, ms 42.7 6.30 n/a 1.84" in text
    # a GPU's time is not the CPU's
    results["models"][1]["conditions"] = {"device": "NVIDIA H200", "runs": "PyTorch, float32"}
    assert "busy" not in words(report.render(results), "cost")


def test_classes_are_the_weakest_first(results: dict) -> None:
    text = words(report.render(results), "classes")
    assert "All classes, the weakest first, by distilled" in text
    rows = [html.unescape(row) for row in re.findall(r'<th scope="row">(.+?)</th><td>[\d.]+</td>'
                                                     r"<td>[\d.]+</td><td>([\d.]+)</td>",
                                                     report.render(results))[-10:]
            for row in row[1:]]  # fmt: skip
    assert rows == sorted(rows, key=float) and rows[0] == "50.0"
    results["per_class"]["distilled"][3]["recall"] = None  # no image
    many = {role: 10 * classes for role, classes in results["per_class"].items()}
    text = words(report.render({**results, "per_class": many}), "classes")
    assert "The 20 weakest of 100 classes, by distilled" in text and "n/a" not in text


def test_the_next_commands_are_of_this_run(results: dict) -> None:
    text = words(report.render(results), "next")
    folder = "runs/digits/distilled-0"
    assert f"vitkd predict {folder}/last.safetensors IMAGE.jpg" in text
    assert f"vitkd eval {folder}/last.int8.safetensors VAL_IMAGES --json" in text
    assert "quantize" not in text
    results["models"] = results["models"][1:2]
    results["config"]["run"]["folder"] = "my runs/a"
    text = words(report.render(results), "next")
    model = "'my runs/a/baseline-0/last.safetensors' --images 'my images'"
    assert f"vitkd quantize {model} -o 'my runs/a/baseline-0/last.int8.safetensors'" in text


@pytest.mark.parametrize("empty", [{}, dict.fromkeys(OPTIONAL), {key: [] for key in OPTIONAL}])
def test_what_may_be_missing(results: dict, empty: dict) -> None:
    kept = {key: value for key, value in results.items() if key not in OPTIONAL} | empty
    kept["models"] = [{**results["models"][0], "latency_ms": None}]
    page = report.render(kept)
    assert "97.2" in page and "<svg" not in page and "97.2" in report.table(kept)
    assert re.findall(r'<section id="(\w+)"', page) == ["metrics", "cost", "configuration"]
    for key in ("conditions", "batch", "latency_p90_ms", "latency_calls"):
        del kept["models"][0][key]  # a run of an older version
    assert "p90, ms n/a" in words(report.render(kept | {"config": {}}), "cost")


def test_one_seed_and_a_thousand_classes(results: dict, tmp_path: Path) -> None:
    results["data"]["classes"] = [f"class {i}" for i in range(1000)]
    results["confusion"]["matrix"] = (np.eye(1000) + 4 * np.eye(1000, k=5)).tolist()
    results["comparison"] |= {"seeds": 1, "standard_error": None, "t": None, "p": None}
    page = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "<td>class 0</td><td>class 5</td><td>4</td><td>80.0 %</td>" in page
    assert "from 1 seed: too few" in page and len(page) < 300_000


def test_in_a_browser(results: dict, tmp_path: Path) -> None:
    page = report.write(results, tmp_path)
    dom = browse(tmp_path, "--dump-dom", page.as_uri())
    sections = "metrics comparison cost curves classes confusion disagreements next configuration"
    assert re.findall(r'<section id="(\w+)"', dom) == [*sections.split(), "notes"]
    for text in (*ROLES, results["verdict"], "$x_$", '&lt;b&gt;&amp;"', "&lt;/style&gt;"):
        assert f">{text}<" in dom, text
    browse(tmp_path, f"--screenshot={tmp_path}/a.png", "--window-size=1200,3000", page.as_uri())
    bands = np.array_split(np.asarray(Image.open(tmp_path / "a.png").convert("L")), 8)
    assert all(band.shape == (375, 1200) and band.std() > 5 for band in bands)


@pytest.mark.parametrize("width", [360, 400, 1280])
def test_at_a_width(width: int, results: dict, tmp_path: Path) -> None:
    found = measured(report.render(results), width, tmp_path)
    assert found == (width, [2] * 5, [], [])
