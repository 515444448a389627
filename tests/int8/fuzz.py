"""Damaged and hostile int8 files and graphs: each is refused by its own error, or loads and runs.

    python tests/int8/fuzz.py --files 10000 --sanitize

Half of the cases are files with flipped bytes, cut short, or with other JSON, offsets, shapes and
arrays, most of them with a right checksum; the other half are Graph objects. What loads and needs
little memory runs one image, on two instruction sets, which must agree. A process of its own does
all that, so that a crash is a finding. Then as many files go through the C API, each with eight
variants (tests/cpp/fuzz_capi.cpp). --sanitize builds the engine for both with AddressSanitizer and
UndefinedBehaviorSanitizer (some minutes), and looks for leaks behind the C API.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
KEY = "vitkd_fast.int8"
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 5, 8, 9, 31, 32, 128, 255, 256, 4096, 65536, 2**31 - 1, 2**31, -(2**31)),
    *(2**32 + 1, 2**63, -(2**63), 2**64 + 3, 10**400, 0.5, -0.0, 1e-320, 1e-38, 2.0**39, 1e39),
    *(1e308, -1e308, float("nan"), float("inf"), -float("inf"), True, False),
]
OTHERS: list[Any] = [None, "", "x", "same", "\ud800", [], [[]], {}, {"a": 1}, [0] * 5, [1, 1]]
Rng = np.random.Generator


def one_of(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def pack(header: dict[str, Any], document: Any, section: bytes, checksum: bool) -> bytes:
    if checksum:
        document["crc32"] = zlib.crc32(section)
    metadata = {"__metadata__": {KEY: json.dumps(document)}}
    text = json.dumps(metadata | header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + section


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def edit(rng: Rng, value: Any) -> None:
    """Changes something in a JSON value: replaced, nudged, removed, added, swapped."""
    if not (found := list(places(value))):
        return
    numbers = [(c, k) for c, k in found if isinstance(c[k], int)]
    gentle = bool(numbers) and rng.random() < 0.6
    container, key = one_of(rng, numbers if gentle else found)
    old, kind = container[key], rng.integers(3, 8)
    if gentle:
        near = int(old) + int(rng.integers(-2, 3))
        container[key] = near if kind > 4 else int(rng.integers(-1, 33))
    elif kind <= 4:
        container[key] = one_of(rng, NUMBERS if rng.random() < 0.7 else OTHERS)
    elif kind == 5:
        del container[key]
    elif kind == 6:
        new = one_of(rng, NUMBERS + OTHERS)
        container.insert(key, new) if isinstance(container, list) else container.update(new=new)
    else:
        other, at = one_of(rng, found)
        container[key], other[at] = json.loads(json.dumps([other[at], old]))


def changed_file(rng: Rng, data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    kind, checksum = rng.integers(6), rng.random() < 0.8
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            changed[rng.integers(end if rng.random() < 0.7 else len(data))] = rng.integers(256)
        return bytes(changed)
    if kind == 1:
        return data[: rng.integers(len(data))] + rng.bytes(rng.integers(20)) * rng.integers(2)
    header, section = json.loads(data[8:end]), data[end:]
    document = json.loads(header.pop("__metadata__")[KEY])
    if kind == 2:
        edit(rng, header)
    elif kind == 3:
        changed = bytearray(section)
        for _ in range(rng.integers(1, 9)):
            changed[rng.integers(len(section))] = one_of(rng, [0, 1, 60, 127, 128, 129, 255])
        section = bytes(changed)
    else:
        # most edits where they are of consequence: in the nodes
        for _ in range(rng.integers(1, 3)):
            nodes = document.get("nodes")
            inner = [n for n in nodes if isinstance(n, dict)] if isinstance(nodes, list) else []
            edit(rng, one_of(rng, inner) if inner and rng.random() < 0.8 else document)
    return pack(header, document, section, checksum)


def hostile_array(rng: Rng, array: np.ndarray) -> Any:
    shape = list(array.shape)
    shape[rng.integers(len(shape))] = one_of(rng, [0, 1, 2, 15, 17, 33])
    unaligned = np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    dtype = one_of(rng, [np.float64, np.int64, np.uint8, np.dtype(">i4"), object])
    flat = array.reshape(-1)
    choices: list[Any] = [np.zeros(shape, array.dtype), array.astype(dtype), unaligned, None]
    choices += [np.full(array.shape, value, array.dtype) for value in (0, 127, -128, 100)]
    choices += [array[..., ::-1], array.T, array[None], flat, array[:0], array.tolist()]
    choices += [np.broadcast_to(flat[:1], (2**10, 2**10)), np.array(flat[0])]
    return one_of(rng, choices)


def hostile_value(rng: Rng, old: Any) -> Any:
    if isinstance(old, np.ndarray):
        return hostile_array(rng, old)
    if isinstance(old, tuple) and rng.random() < 0.7:
        values = [v if rng.random() < 0.5 else one_of(rng, NUMBERS) for v in old]
        return tuple(values[: rng.integers(len(values) + 1)] if rng.random() < 0.2 else values)
    if isinstance(old, int) and rng.random() < 0.5:
        return int(old) + int(rng.integers(-2, 3))
    return one_of(rng, NUMBERS if rng.random() < 0.7 else OTHERS)


def changed_graph(rng: Rng, graph: Any) -> Any:
    nodes = list(graph.nodes)
    for _ in range(rng.integers(1, 3)):
        at, kind = int(rng.integers(len(nodes))), rng.integers(12)
        if kind == 0:
            nodes[at] = one_of(rng, [None, 3, graph, nodes[0], nodes[-1]])
        elif kind == 1:
            nodes.insert(int(rng.integers(len(nodes))), nodes.pop(at))
        elif kind == 2 and len(nodes) > 1:
            del nodes[at]
        elif kind == 3:
            return replace(graph, padding_bytes=hostile_value(rng, graph.padding_bytes))
        elif hasattr(nodes[at], "inputs"):
            name = one_of(rng, [f.name for f in fields(nodes[at])])
            nodes[at] = replace(nodes[at], **{name: hostile_value(rng, getattr(nodes[at], name))})
    made: Any = tuple(nodes)
    if rng.random() < 0.05:
        # not a tuple
        made = (deepcopy(node) for node in nodes)
    elif rng.random() < 0.03:
        made = one_of(rng, [None, [], (), nodes * 200, "nodes"])
    return replace(graph, nodes=made)


def run_cases(folder: Path, seed: int, first: int, count: int) -> None:
    """Raises at the first finding; folder/case says which case it was."""
    from vitkd_fast import _int8, int8

    warnings.simplefilter("error")
    isas = _int8.isa()
    corpus = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    honest = [(int8.load(data)._engine, len(data)) for data in corpus]
    need = [s.weight_bytes + s.arena_bytes + length for s, length in honest]
    graphs = [int8.file.read(data) for data in corpus]
    counts = dict.fromkeys(["files", "loaded", "graphs", "made", "run"], 0)

    def run(rng: Rng, session: Any, source: Any, size: int) -> None:
        counts["run"] += 1
        image = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        options = {"isa": one_of(rng, isas), "fuse": bool(rng.integers(2))}
        options |= {"threads": int(rng.integers(1, 3)), "poison": True}
        logits = []
        other = _int8.Session(int8.file.opened(source), image_size=size, **options)
        for engine in (session, other):
            logits.append(np.full((1, engine.classes), np.nan, np.float32))
            engine.run(image, logits[-1])
        assert logits[0].tobytes() == logits[1].tobytes(), f"{session.isa} and {options} differ"

    for case in range(first, first + count):
        (folder / "case").write_text(str(case))
        rng = np.random.default_rng([seed, case])
        i = int(rng.integers(len(corpus)))
        counts["graphs" if case % 2 else "files"] += 1
        if case % 2 == 0:
            data = changed_file(rng, corpus[i])
            tracemalloc.start()
            try:
                loaded = int8.load(data)
                counts["loaded"] += 1
            except int8.FileError as error:
                assert len(str(error)) < 1000
                continue
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak < 2 * need[i] + (1 << 20), f"{peak} bytes for a file of {len(data)}"
            if loaded._engine.arena_bytes <= 2 * need[i]:
                run(rng, loaded._engine, data, loaded.image_size)
            continue
        graph = changed_graph(rng, graphs[i])
        size = graphs[i].image_size if rng.random() < 0.8 else one_of(rng, NUMBERS)
        options: dict[str, Any] = {"image_size": size, "isa": one_of(rng, isas)}
        if rng.random() < 0.1:
            options[one_of(rng, ["threads", "isa", "fuse"])] = one_of(rng, NUMBERS + OTHERS)
        try:
            made = _int8.Session(int8.file.opened(graph), **options)
        except (ValueError, TypeError):
            continue
        counts["made"] += 1
        if made.arena_bytes <= 2 * need[i]:
            run(rng, made, graph, int(size))
    print("fuzz:", ", ".join(f"{count} {what}" for what, count in counts.items()), "no finding")


def feed(program: Path, folder: Path, seed: int, first: int, count: int) -> int:
    """Changed files to the fuzzer of the C API; its exit code."""
    corpus = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    with subprocess.Popen([program, "8"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            for case in range(first, first + count):
                rng = np.random.default_rng([seed, case])
                data = changed_file(rng, one_of(rng, corpus))
                process.stdin.write(len(data).to_bytes(4, "little") + data)
            process.stdin.close()
        except BrokenPipeError:
            pass  # a finding
    return process.wait()


def build(folder: Path) -> tuple[Path, Path]:
    """The engine and the fuzzer of its C API under both sanitizers; but for the stack of the
    largest kernels.
    """
    import pybind11

    include = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-Wno-maybe-uninitialized", *(f"-I{path}" for path in include)]
    # accumulators in registers: ten minutes less for the compiler
    kernels = ["--param", "asan-stack=0", "-fno-sanitize-address-use-after-scope"]
    kernels += ["-fno-sanitize=null,alignment,object-size,vptr,return"]
    compiler = os.environ.get("CXX", "g++")

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.parent.name}_{source.stem}.o"
        more = kernels if source.stem == "avx512vnni" else []
        subprocess.run([compiler, *flags, *more, "-c", source, "-o", to], check=True)
        return to

    folders = [ROOT / "csrc" / folder for folder in ("simd", "int8", "int8/cuda", "int8/kernels")]
    sources = [source for folder in folders for source in folder.glob("*.cpp")]
    sources.append(ROOT / "tests/cpp/fuzz_capi.cpp")
    sources.sort(key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module, program = folder / "_int8.so", folder / "fuzz_capi"
    for to, other, more in ((module, program.name, ["-shared"]), (program, "bind", ["-pthread"])):
        parts = [path for path in objects if not path.stem.endswith(f"_{other}")]
        subprocess.run([compiler, *more, *flags[5:8], *parts, "-o", to], check=True)
    return module, program


def write_corpus(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from support.int8_builder import Builder, mobilenet_v2
    from support.int8_graphs import random_graph
    from vitkd_fast.int8 import file

    small = (1, 3, 16, 17, 33, 65)
    graphs = [random_graph(s, image_size=9 + s, blocks=s % 5 + 1, channels=small) for s in range(8)]
    chain = Builder()
    chain.conv(48, 3, inputs=(-1,), padding="same")
    chain.conv(None, 3, stride=(2, 2), padding=(1, 1, 1, 1))
    chain.conv(20, fine=True)
    chain.conv(20, inputs=(2, 2), residual_multiplier=0.5)
    for i, graph in enumerate([*graphs, mobilenet_v2(8, 64), chain.graph(65)]):
        file.save(graph, folder / f"{i}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("--files", 300), ("--seed", 0), ("--first", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--program", type=Path, help="the C API's fuzzer, and nothing else")
    for name in ("--engine", "--folder"):  # of the process that runs the cases
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        if given.engine:
            spec = importlib.util.spec_from_file_location("vitkd_fast._int8", given.engine)
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return run_cases(given.folder, given.seed, given.first, given.files)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        environment, more, program = dict(os.environ), [], given.program
        if given.sanitize:
            module, program = build(folder)
            more = ["--engine", module]
            # the second, because the first must find its exceptions
            names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
            paths = [subprocess.check_output(["g++", name], text=True).strip() for name in names]
            environment |= {"LD_PRELOAD": " ".join(paths), "UBSAN_OPTIONS": "print_stacktrace=1"}
            environment |= {"ASAN_OPTIONS": "detect_leaks=0:max_allocation_size_mb=96"}
        command = [sys.executable, __file__, "--folder", folder, "--seed", given.seed]
        command += ["--first", given.first, "--files", given.files, *more]
        if not given.program:
            code = subprocess.run([*map(str, command)], env=environment, check=False).returncode
            if code:
                case = f"--seed {given.seed} --first {(folder / 'case').read_text()} --files 1"
                sys.exit(f"fuzz: {case}: ended with {code}")
        if program:
            os.environ.setdefault("ASAN_OPTIONS", "max_allocation_size_mb=96")
            os.environ.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
            if code := feed(program, folder, given.seed, given.first, given.files):
                sys.exit(f"fuzz: the C API, --seed {given.seed}: ended with {code}")


if __name__ == "__main__":
    main()
