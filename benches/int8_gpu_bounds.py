"""The int8 engine on a GPU, without one: bytes, instructions and predicted time of each launch.

    python benches/int8_gpu_bounds.py [FILE...] [--batch N] [--layers]

prints a Markdown row for each int8 file, or without one for MobileNetV2 in shape; with --layers
for each launch. Nothing is measured. Bytes are those of every map, written once and
read once, and of the weights, as if each came from memory. A launch is taken to need the longest of
three: its bytes at 4.3 TB/s, its instructions at one per scheduler in 75% of the clocks, and 2 us,
assumed for a kernel of a CUDA graph to start, wait for memory and end.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# an H200: multiprocessors, clocks a second, bytes a second in a copy
CHIP, CLOCK, COPY = 132, 1.98e9, 4.29e12
ISSUED = 0.75 * 4 * 32 * CHIP * CLOCK  # instructions of threads a second
START = 2e-6

# instructions of a thread, from the machine code of sm_90 (kernel_budgets.py): those of its loop,
# which have both ways to load, for each output
DEPTHWISE = {"3_1": 24, "3_2": 38, "5_1": 41, "5_2": 68, "any": 60}
# a slice of 64 bytes of a product's depth, and what precedes the first one; then for each output
SLICE = {
    "gemm_2_64": 238, "gemm_2_32": 131, "gemm_2_16": 91, "gemm_1_32": 75, "gemm_1_16": 53,
    "conv_2_64": 362, "conv_2_32": 241, "conv_2_16": 231, "conv_1_32": 191, "conv_1_16": 174,
    "conv_image": 554,
}  # fmt: skip
BEFORE, FINISH = 150, 8
MAP = {"add": 17, "scale": 28, "sums": 2, "linear": 0}


class Launch(NamedTuple):
    name: str
    kernel: str
    shape: tuple[int, int, int]
    macs: int
    map_bytes: int
    weight_bytes: int
    blocks: int
    threads: int
    shared: int


def instructions(launch: Launch, batch: int) -> float:
    height, width, channels = launch.shape
    outputs = batch * height * width * -(-channels // 16) * 16
    kind = launch.kernel.removeprefix("vitkd_int8_")
    if kind in SLICE:
        slices = max(1.0, batch * launch.macs / outputs / 64)
        return launch.blocks * launch.threads * (slices * SLICE[kind] + BEFORE) + outputs * FINISH
    if kind.startswith("depthwise_"):
        return outputs * DEPTHWISE[kind[10:13]]
    return outputs * MAP[kind]


def moved(launch: Launch, batch: int) -> int:
    return batch * launch.map_bytes + launch.weight_bytes


def seconds(launch: Launch, batch: int) -> float:
    memory = moved(launch, batch) / COPY
    return max(memory, instructions(launch, batch) / ISSUED, START)


def networks() -> dict[str, object]:
    from support.int8_builder import mobilenet_v2

    return {"MobileNetV2, 224 (in shape)": mobilenet_v2()}


def main() -> None:
    from vitkd_fast import _int8
    from vitkd_fast.int8 import file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--layers", action="store_true")
    given = parser.parse_args()
    graphs = {path.name: file.read(path) for path in given.files} or networks()
    columns = ["layer", "kernel", "output", "blocks"] if given.layers else ["network", "launches"]
    columns += ["batch", "MB", "bound by bytes, us", "predicted, us"]
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for (name, graph), batch in itertools.product(graphs.items(), given.batch):
        chip = {"image_size": graph.image_size, "batch": batch, "multiprocessors": CHIP}
        launches = [Launch(*x) for x in _int8.cuda_launches(file.opened(graph), **chip)]
        for some in [[x] for x in launches] if given.layers else [launches]:
            row = [name, str(len(some))]
            if given.layers:
                (x,) = some
                shape = "x".join(map(str, x.shape))
                row = [x.name, x.kernel.removeprefix("vitkd_int8_"), shape, str(x.blocks)]
            total = sum(moved(x, batch) for x in some)
            numbers = [total / 1e6, total / COPY * 1e6, sum(seconds(x, batch) for x in some) * 1e6]
            row += [str(batch), *(f"{number:.1f}" for number in numbers)]
            print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
