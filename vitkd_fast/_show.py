"""What this installation consists of: versions, instruction sets, each operation's backend."""

import os
import platform
import sys


def show() -> None:
    """Prints versions, CUDA, the CPU's instruction sets, and each operation's backends.

    The first thing to put into a bug report; `vitkd show` prints the same.
    """
    import torch

    from . import __version__, _ops, int8

    # not imported here: VITKD_FAST_BACKEND may have told _ops to leave it out
    core = sys.modules.get("vitkd_fast._C")
    compiled = f"{core.cuda or 'none'} in _C" if core else "_C not loaded"
    isas = int8.isa()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
    lines = {
        "vitkd_fast": __version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "CUDA": f"{torch.version.cuda or 'none'} in torch, {compiled}; {gpu}",
        "CPU": f"{isas[0]}; best first: {', '.join(isas)}",
    }
    for variable in ("VITKD_FAST_ISA", "VITKD_FAST_BACKEND"):
        if value := os.environ.get(variable):
            lines[variable] = value
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")

    rows = [("operation", "CPU", "CUDA")]
    rows += [(op, served["CPU"], served["CUDA"]) for op, served in _ops.backends().items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(f"{cell:{width}}" for cell, width in cells).rstrip())
