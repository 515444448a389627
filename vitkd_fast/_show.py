"""What this installation consists of: versions, instruction sets, each operation's backend."""

import os
import platform
import sys


def show() -> None:
    """Prints versions, CUDA, the CPU's instruction sets, and each operation's backends.

    The first thing to put into a bug report; `vitkd show` prints the same.
    """
    from . import __version__, int8
    from ._extras import require

    missing = ""
    try:
        require("torch", "vitkd_fast.functional")
        from . import _ops
    except ImportError as error:  # what a bug report should say
        missing = str(error)
    lines = {
        "vitkd_fast": __version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": "not installed",
    }
    if torch := sys.modules.get("torch"):
        # not imported here: VITKD_FAST_BACKEND may have told _ops to leave it out
        core = sys.modules.get("vitkd_fast._C")
        compiled = f"{core.cuda or 'none'} in _C" if core else "_C not loaded"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
        lines["torch"] = str(torch.__version__)
        lines["CUDA"] = f"{torch.version.cuda or 'none'} in torch, {compiled}; {gpu}"
    isas = int8.isa()
    lines["CPU"] = f"{isas[0]}; best first: {', '.join(isas)}"
    for variable in ("VITKD_FAST_ISA", "VITKD_FAST_BACKEND"):
        if value := os.environ.get(variable):
            lines[variable] = value
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    print()
    if missing:
        print(f"no losses: {missing}")
        return

    rows = [("operation", "CPU", "CUDA")]
    rows += [(op, served["CPU"], served["CUDA"]) for op, served in _ops.backends().items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(f"{cell:{width}}" for cell, width in cells).rstrip())
