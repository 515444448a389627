"""Instructions of an inference on ARM, and the cycles that LLVM predicts: ours beside LiteRT.

`make bench-arm` writes benches/results/arm-counts.json with it. There is no ARM hardware in that:
QEMU runs both engines, a plugin counts (count_instructions.c), and llvm-mca takes each block of
code as a loop of its own, whose cycles are weighted by its runs. Counts repeat to 0.01%. Cycles
leave out caches and branches: they compare two engines on one core, and are no milliseconds.

Ours is the file of `quantize`. LiteRT's MobileNetV2 is the one that int8_peers.py has; the others
come from the same float models by litert-torch and ai-edge-quantizer (its static_wi8_ai8), which
are needed once: the files are kept in build/arm/models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import int8_peers
from support import arm_tools
from vitkd_fast import int8

HERE = Path(__file__).parent

MODELS = ("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small")
LITERT = "ai-edge-litert==2.3.0"
# QEMU's CPU, what it has, and cores of LLVM's that have it
RUNS = (
    ("cortex-a72", "Armv8.0", ["cortex-a72"]),
    ("cortex-a76", "dotprod", ["neoverse-n1", "neoverse-v2", "cortex-a55", "apple-m1"]),
    ("max,sve=off,sme=off", "i8mm", ["neoverse-n2", "neoverse-v2"]),
)
# of /proc/cpuinfo, without which LiteRT does not start: they must agree with the CPU
FEATURES = {
    "Armv8.0": ("0xd08", "fp asimd"),
    "dotprod": ("0xd0b", "fp asimd asimdhp asimdrdm asimddp"),
    "i8mm": ("0xd40", "fp asimd asimdhp asimdrdm asimddp i8mm"),
}


class Count(NamedTuple):
    instructions: int
    blocks: list[tuple[int, list[str]]]  # runs, and instructions in assembly


def network(name: str) -> int8_peers.Network:
    images = int8_peers.smooth_images(32)
    if name == "mobilenetv2_100" and (folder := os.environ.get("VITKD_DATA")):
        return int8_peers.trained_network(Path(folder), images)
    return int8_peers.random_network(name, images)


def convert(net: int8_peers.Network, path: Path) -> None:
    """A LiteRT file with int8 tensors from end to end, channels last."""
    if peer := int8_peers.litert_int8(net):
        shutil.copy(peer, path)
        return
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    module = litert_torch.to_channel_last_io(net.module, args=[0])
    batches = [net.pixels.floats(image[None]).transpose(0, 2, 3, 1) for image in net.images]
    edge = litert_torch.convert(module, (torch.from_numpy(batches[0]),))
    edge.export(str(whole := path.with_suffix(".float")))
    quantizing = quantizer.Quantizer(whole, recipe.static_wi8_ai8())
    ranges = quantizing.calibrate({"serving_default": [{"args_0": batch} for batch in batches]})
    path.write_bytes(quantizing.quantize(ranges).quantized_model)
    whole.unlink()


def files(folder: Path, name: str) -> dict[str, Path]:
    """The model's file for each engine, made where it is missing."""
    found = {"vitkd_fast": folder / f"{name}.int8.safetensors", "litert": folder / f"{name}.tflite"}
    if not all(path.exists() for path in found.values()):
        folder.mkdir(exist_ok=True)
        net = network(name)
        pixels = {"mean": (net.pixels.mean,) * 3, "std": (net.pixels.std,) * 3}
        int8.quantize(net.module, net.images, **pixels).save(found["vitkd_fast"])
        convert(net, found["litert"])
    return found


def write_cpuinfo(machine: arm_tools.Machine, kind: str) -> None:
    """What programs read of the CPU, which QEMU 7.2 shows as this machine's otherwise."""
    part, features = FEATURES[kind]
    lines = {"processor": 0, "Features": features, "CPU implementer": "0x41"}
    lines |= {"CPU architecture": 8, "CPU variant": "0x1", "CPU part": part, "CPU revision": 1}
    path = machine.root / "proc/cpuinfo"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n")


def count(machine: arm_tools.Machine, plugin: Path, cpu: str, engine: str, file: Path) -> Count:
    """What one inference runs, on one thread."""
    options = ("-plugin", str(plugin), "-d", "plugin")
    site = f"{machine.site}:{machine.folder / 'litert'}"
    guest = (HERE / "arm_guest.py", engine, file)
    result = machine.run(cpu, machine.interpreter, *guest, qemu=options, PYTHONPATH=site)
    assert result.returncode == 0, result.stderr[-2000:]
    _, (first, *lines) = (part.splitlines() for part in result.stderr.split("mark ")[1:])
    blocks = [line.split()[1:] for line in lines if line.startswith("block ")]
    words = [bytes.fromhex(word)[::-1] for _, *block in blocks for word in block]
    hexadecimal = "\n".join(" ".join(map(hex, word)) for word in words)
    disassemble = ["llvm-mc-19", "-triple=aarch64", "-mattr=+all", "-disassemble"]
    code = iter(llvm(disassemble, hexadecimal).splitlines()[1:])
    return Count(int(first), [(int(runs), [next(code) for _ in block]) for runs, *block in blocks])


def llvm(command: list[str], given: str) -> str:
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def cycles(counted: Count, core: str) -> float:
    """What llvm-mca predicts for the blocks, scaled to all instructions."""
    regions = (
        "\n".join(["# LLVM-MCA-BEGIN", *code, "# LLVM-MCA-END"]) for _, code in counted.blocks
    )
    command = ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+all", "-iterations=50"]
    command += ["-instruction-info=false", "-resource-pressure=false"]
    out = llvm(command, "\n".join(regions))
    each = [int(n) / 50 for n in re.findall(r"Total Cycles:\s+(\d+)", out)]
    total = sum(runs * n for (runs, _), n in zip(counted.blocks, each, strict=True))
    seen = sum(runs * len(code) for runs, code in counted.blocks)
    return total * counted.instructions / seen


def versions() -> str:
    """Of what counts, predicts and is compared."""

    def of(*command: str) -> str:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.search(r"\d+\.\d+[.\d]*", said)[0]  # type: ignore[index]

    return (
        f"QEMU {of('qemu-aarch64', '--version')}, llvm-mca {of('llvm-mca-19', '--version')}, "
        f"GCC {of('aarch64-linux-gnu-g++', '-dumpfullversion')}, {LITERT.replace('==', ' ')}"
    )


def main() -> None:
    try:
        machine = arm_tools.machine()
    except arm_tools.Unavailable as reason:
        raise SystemExit(f"make bench-arm: unavailable: {reason}") from reason
    litert, plugin = machine.folder / "litert", machine.folder / "count.so"
    if not litert.exists():
        arm_tools.unpack_wheels(machine, [LITERT], litert)
    flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-o", plugin]
    subprocess.run(["gcc", *flags, HERE / "count_instructions.c"], check=True)
    benches: list[dict[str, Any]] = []
    made = {name: files(machine.folder / "models", name) for name in MODELS}
    for cpu, kind, cores in RUNS:
        write_cpuinfo(machine, kind)
        counts, predicted = {}, {}
        for name in MODELS:
            ours, peer = (count(machine, plugin, cpu, *file) for file in made[name].items())
            million = [c.instructions / 1e6 for c in (ours, peer)]
            counts[name] = dict(zip(("vitkd_fast, M", "LiteRT, M"), million, strict=True))
            counts[name]["ratio"] = million[0] / million[1]
            pairs = {core: [cycles(c, core) / 1e6 for c in (ours, peer)] for core in cores}
            counts[name] |= {f"cycles, {core}": a / b for core, (a, b) in pairs.items()}
            predicted[name] = pairs
            print(f"{kind}, {name}: {counts[name]}")
        extra = {"counts": counts, "million_cycles": predicted, "tools": f"{kind}; {versions()}"}
        benches.append({"name": f"arm_{kind}", "extra_info": extra})
    (machine.root / "proc/cpuinfo").unlink()
    path = HERE / "results" / "arm-counts.json"
    path.write_text(json.dumps({"benchmarks": benches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
