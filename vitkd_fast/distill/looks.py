"""What the HTML reports look like: colours, the style of matplotlib's figures, and inline SVG."""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

INK = "#1c2024"  # becomes the page's text colour
ACCENT = (11, 95, 165)
COLOURS = {"teacher": "#7a828c", "baseline": "#d98200", "distilled": "#1a73c0", "int8": "#00937a",
            "int8-aware": "#7b4fc9"}  # fmt: skip
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.usetex", "text.parse_math"), False),  # a name may hold dollars
    **{"axes.grid": True, "grid.alpha": 0.15, "axes.axisbelow": True, "font.size": 10},
    **{"svg.fonttype": "none", "svg.hashsalt": "vitkd_fast"},  # text as text; same bytes each time
}


def svg(figure: Figure) -> Markup:
    """The figure as an inline SVG whose ink is the page's text colour."""
    buffer = io.StringIO()
    silent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=silent)
    # ids such as axes_1 would be there once for every image; nothing refers to them
    text = re.sub(r'<g id="\w+_\d+">', "<g>", buffer.getvalue())
    return Markup(text[text.index("<svg") :].replace(INK, "currentColor"))
