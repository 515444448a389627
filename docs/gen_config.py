"""A hook of mkdocs: the page configuration.md, from the pydantic models of vitkd_fast.distill.

Types, limits and defaults are the models'; what a key means is the comment beside or above it in
the source. The hook also adds the plot that benches draw, and refuses a page that would load a
script or a style from elsewhere.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pydantic import BaseModel

from vitkd_fast.distill import config, losses

ROOT = Path(__file__).parents[1]
# have a row instead of a table of their own
AS = {"teacher.optimizer": "as `optimizer`", "teachers": "list of: as `teacher`"}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
INTRODUCTION = """# Configuration

A run of `vitkd distill` is described by YAML: a recipe that ships with the package
(`vitkd recipes`), a file of yours, or neither. Any key can be set on the command line:

```sh
vitkd distill digits run.folder=runs/first losses.kd.temperature=2 "run.seeds=[0,1,2]"
vitkd distill mine.yaml "losses.attention={weight: 1.0, stride: 16}"
vitkd distill --dry-run mine.yaml    # checks data, models and cost, and trains nothing
```

- An unknown key is an error that names the nearest one; so is a value of another type.
- YAML is read by the rules of YAML 1.2: `no` is a string, `1e-3` is a number.
- Where the table says *schedule*, a number is a constant, and
  `{start: 1.0, end: 0.0, until: 0.5, shape: cosine}` changes over the first half of the run.

This page is generated from the pydantic models in `vitkd_fast.distill.config` and
`vitkd_fast.distill.losses`.
"""


def comments(model: type[BaseModel]) -> dict[str, str]:
    """What the source says of each field: the comment on its lines, or those just above."""
    lines = textwrap.dedent(inspect.getsource(model)).splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign):
            continue
        first, last = node.lineno - 1, node.end_lineno
        said = []
        for line in lines[first:last]:
            said += re.findall(r"(?<=\s)# (.*)", line)
        above = []
        while lines[first - 1].strip().startswith("# "):
            first -= 1
            above.insert(0, lines[first].strip()[2:])
        found[ast.unparse(node.target)] = " ".join(above + said)
    return found


def kind(annotation: Any) -> str:
    """A type, as a user of YAML would call it."""
    if annotation is losses.Ramp:
        return "schedule"
    if annotation is NoneType:
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{x}`" for x in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(kind, arguments))
    if origin is list:
        return f"list of: {kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:  # Annotated
        bounds = " and ".join(limits(getattr(arguments[1], "metadata", ())))
        return f"{kind(arguments[0])} {bounds}".strip()
    return {float: "number", int: "integer", bool: "boolean", str: "string"}[annotation]


def limits(metadata: Any) -> list[str]:
    return [
        f"{sign} {getattr(x, name):.4g}"
        for x in metadata
        for name, sign in LIMITS.items()
        if getattr(x, name, None) is not None
    ]


def shown(value: Any) -> str:
    """A default, as YAML."""
    if isinstance(value, losses.Ramp):
        return f"{value.start:g}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value) or '""'


def section(path: str, model: type[losses.Section]) -> str:
    """A heading, what the section is for, and a table of its keys that are no sections."""
    rows = []
    said = {}
    for base in reversed(model.__mro__):
        if base in (BaseModel, losses.Section) or not issubclass(base, losses.Section):
            continue
        said |= comments(base)
    for name, field in model.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        if key in AS:
            default = shown(field.default)
            rows.append((f"`{key}`", AS[key], f"`{default}`", said[name]))
        if config.sections().get(key, losses.Ramp) is not losses.Ramp:
            continue
        what = kind(field.annotation)
        if bounds := " and ".join(limits(field.metadata)):
            what = (
                f"{what.removesuffix(' or null')} {bounds}{' or null' * what.endswith(' or null')}"
            )
        default = shown(field.default)
        rows.append((f"`{key}`", what, f"`{default}`", said.get(name, "")))
    text = f"\n## {path}\n\n{inspect.getdoc(model)}\n" if path else ""
    if rows:
        text += "\n| key | accepted | default | |\n|---|---|---|---|\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return text


def page() -> str:
    """The whole page, in Markdown."""
    return INTRODUCTION + "".join(
        section(path, model)
        for path, model in config.sections().items()
        if model is not losses.Ramp and not path.startswith(tuple(AS))
    )


def on_files(files: Any, config: Any) -> Any:
    files.append(File.generated(config, "configuration.md", content=page()))
    plot = ROOT / "benches" / "attention_memory.svg"
    files.append(File.generated(config, plot.name, abs_src_path=str(plot)))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    elsewhere = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*", output)
    if elsewhere:
        raise PluginError(f"{page.url}: loads from elsewhere: {elsewhere[0]}")
    return output
