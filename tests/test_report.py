"""The report: strict JSON, a page that loads nothing, and what a browser makes of it."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkd_fast.distill import report

AWKWARD = '<b>&"'
ROLES = ["teacher", "alone", "distilled", "int8"]
METRICS = "top1 top5 precision recall f1 kappa quadratic_kappa mcc auroc ece nll".split()
OPTIONAL = ["comparison", "curves", "confusion", "disagreements", "notes"]
GIF = "data:image/gif;base64,R0lGODdhAgACAIAAAAAAAAAAACwAAAAAAgACAAAIBgABCAQQEAA7"  # 2 x 2


def model(role: str, top1: float, seeds: int, size: int, latency: float) -> dict:
    fidelity = {} if role == "teacher" else {"agreement": 0.93, "kl": 0.08, "correlation": 0.9}
    metrics = [{key: top1 + 0.002 * seed for key in METRICS} for seed in range(seeds)]
    runs = [{"seed": i, "metrics": m, "fidelity": fidelity} for i, m in enumerate(metrics)]
    mean = {key: sum(m[key] for m in metrics) / seeds for key in METRICS} | fidelity
    return {
        "role": role, "model": "a_model", "parameters": size // 4, "macs": 56_500_000,
        "bytes": size, "latency_ms": latency, "images_per_s": 1000 / latency,
        "runs": runs, "mean": mean, "std": dict.fromkeys(mean, 0.002),
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    wrong, right = {"class": AWKWARD, "probability": 0.9}, {"class": "5", "probability": 0.8}
    shown = {"image": GIF, "name": AWKWARD, "label": "5", "teacher": wrong, "student": right}
    train = [{"step": i, "epoch": i / 30, "lr": 1e-3, "loss": 2 / (1 + i)} for i in range(300)]
    val = [{"step": 30 * i, "epoch": float(i), "top1": 0.9 - 0.1 / i} for i in range(1, 11)]
    return {
        "version": 1, "title": "digits", "verdict": "Distilled beats alone by 1.2 points.",
        "config": {"loss": {"temperature": 4.0, "labels": None}}, "environment": {"torch": "2.11"},
        "data": {"train": 8, "val": 9, "classes": [AWKWARD, "$x_$", "</style>", *"3456789"]},
        "models": [
            model("teacher", 0.972, 1, 22_105_384, 14.23), model("alone", 0.938, 3, 6_112_424, 2.1),
            model("distilled", 0.95, 3, 6_112_424, 2.1), model("int8", 0.948, 3, 812_424, 0.6123),
        ],
        "comparison": {"metric": "top1", "seeds": 3, "difference": 0.012,
                       "standard_error": 0.0024, "standard_errors": 5.0, "t": 5.0, "p": 0.0377},
        "curves": {f"{role}, seed 0": {"train": train, "val": val} for role in ROLES[1:3]},
        "confusion": {"role": ROLES[2], "seed": 0, "matrix": (np.eye(10) * 80 + 1).tolist()},
        "disagreements": {"count": 12, "of": 899, "shown": [shown] * 5}, "notes": ["One thread."],
    }  # fmt: skip


def test_write_then_read(results: dict, tmp_path: Path) -> None:
    page = report.write(results, tmp_path / "a" / "b")
    assert {page, page.with_name("report.json")} == set((tmp_path / "a" / "b").iterdir())
    assert page.name == "report.html" and report.read(page.parent) == results
    assert page.read_text(encoding="utf-8") == report.render(results) == report.render(results)


def test_what_json_and_utf8_lack(results: dict, tmp_path: Path) -> None:
    results["models"][1]["mean"]["auroc"] = float("nan")
    results["curves"]["alone, seed 0"]["train"][7]["loss"] = float("inf")
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
    assert page.count("</style>") == 4  # the page's and one in each picture


def test_numbers(results: dict) -> None:
    page = report.render(results)
    for text in ("94.0 ± 0.2", "97.2", "+1.20 percentage points", "0.24 points", "5.53 M",
                 "203,106", "812 kB", "6.11 MB", "2.10", "0.612", "14.2", "= 0.038"):  # fmt: skip
        assert text in page, text
    rows = report.table(results).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ROLES and len(set(map(len, rows))) == 1
    assert "94.0 ± 0.2" in rows[2] and "n/a" in rows[1] and "±" not in rows[1]


@pytest.mark.parametrize("empty", [{}, dict.fromkeys(OPTIONAL), {key: [] for key in OPTIONAL}])
def test_what_may_be_missing(results: dict, empty: dict) -> None:
    kept = {key: value for key, value in results.items() if key not in OPTIONAL} | empty
    kept["models"] = [{**results["models"][0], "latency_ms": None}]
    page = report.render(kept)
    assert "97.2" in page and "<svg" not in page and "97.2" in report.table(kept)
    assert re.findall(r'<section id="(\w+)"', page) == ["metrics", "cost", "configuration"]


def test_one_seed_and_a_thousand_classes(results: dict, tmp_path: Path) -> None:
    results["data"]["classes"] = [f"class {i}" for i in range(1000)]
    results["confusion"]["matrix"] = (np.eye(1000) + 4 * np.eye(1000, k=5)).tolist()
    results["comparison"] |= {"seeds": 1, "standard_error": None, "t": None, "p": None}
    page = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "<td>class 0</td><td>class 5</td><td>4</td><td>80.0 %</td>" in page
    assert "from 1 seed: too few" in page and len(page) < 300_000


def browse(folder: Path, *options: str) -> str:
    """What Chromium prints, run without a window."""
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium on the PATH: it shows whether a browser can read the page")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    quiet += "--disable-background-networking --disable-component-update --virtual-time-budget=2000"
    command = [chromium, *quiet.split(), f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_in_a_browser(results: dict, tmp_path: Path) -> None:
    page = report.write(results, tmp_path)
    dom = browse(tmp_path, "--dump-dom", page.as_uri())
    sections = "metrics comparison cost curves confusion disagreements configuration notes"
    assert re.findall(r'<section id="(\w+)"', dom) == sections.split()
    for text in (*ROLES, results["verdict"], "$x_$", '&lt;b&gt;&amp;"', "&lt;/style&gt;"):
        assert f">{text}<" in dom, text
    browse(tmp_path, f"--screenshot={tmp_path}/a.png", "--window-size=1200,3000", page.as_uri())
    bands = np.array_split(np.asarray(Image.open(tmp_path / "a.png").convert("L")), 8)
    assert all(band.shape == (375, 1200) and band.std() > 5 for band in bands)


def test_on_a_phone(results: dict, tmp_path: Path) -> None:
    frame = f'<iframe width="390" srcdoc="{html.escape(report.render(results))}"></iframe>'
    script = """<script>onload = () => {
        const page = frames[0].document, images = [...page.images].map(i => i.naturalWidth);
        document.body.textContent = [page.documentElement.scrollWidth, ...images];
    }</script>"""
    (tmp_path / "phone.html").write_text(frame + script, encoding="utf-8")
    dom = browse(tmp_path, "--dump-dom", "--hide-scrollbars", f"file://{tmp_path}/phone.html")
    assert "<body>390,2,2,2,2,2<" in dom
