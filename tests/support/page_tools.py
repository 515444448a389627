"""What a browser makes of a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


def browse(folder: Path, *options: str) -> str:
    """What Chromium prints, run without a window."""
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium on the PATH: it shows whether a browser can read the page")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    quiet += "--disable-background-networking --disable-component-update --virtual-time-budget=2000"
    command = [chromium, *quiet.split(), f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Measured(NamedTuple):
    """Of a page at a width."""

    width: int  # that it takes
    images: list[int]  # the widths of those that are no SVG
    hidden: list[str]  # the beginnings of tables with columns that are not seen
    overlaps: list[str]  # words of an SVG that lie on one another


def measured(page: str, width: int, folder: Path) -> Measured:
    """What Chromium makes of a page with all its details open, in a frame of this width."""
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
    script = """<script>onload = () => {
        const page = frames[0].document, images = [...page.images].map(i => i.naturalWidth);
        page.querySelectorAll("details").forEach(d => d.open = true);
        setTimeout(measure, 100, page, images);
    };
    const measure = (page, images) => {
        const hidden = [...page.querySelectorAll(".scroll")].filter(
            s => s.scrollWidth > s.clientWidth + 1).map(s => s.textContent.trim().slice(0, 20));
        const overlaps = [...page.querySelectorAll("svg")].flatMap(svg => {
            const texts = [...svg.querySelectorAll("text")];
            const boxes = texts.map(t => t.getBoundingClientRect());
            return boxes.flatMap((a, i) => boxes.slice(0, i).map((b, j) => [a, b, i, j])).filter(
                ([a, b]) => a.left < b.right && b.left < a.right
                         && a.top + 1 < b.bottom && b.top + 1 < a.bottom
            ).map(([, , i, j]) => texts[i].textContent + "/" + texts[j].textContent);
        });
        const found = [page.documentElement.scrollWidth, images, hidden, overlaps];
        document.body.textContent = JSON.stringify(found);
    }</script>"""
    (folder / "framed.html").write_text(frame + script, encoding="utf-8")
    dom = browse(folder, "--dump-dom", "--hide-scrollbars", f"file://{folder}/framed.html")
    return Measured(*json.loads(html.unescape(re.search("<body>(.*?)</body>", dom, re.DOTALL)[1])))
