"""Run by the emulated Python of arm_counts.py: ENGINE FILE. One inference between two marks."""

import os
import sys

import numpy as np


def open_engine(engine: str, file: str):
    """A function without arguments that runs one image."""
    if engine == "vitkd_fast":
        from vitkd_fast import int8

        session = int8.load(file)
        size = session.image_size
        image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        out = np.empty((1, len(session.classes)), np.float32)
        return lambda: session(image, out=out)
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(file, num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]
    low, high = np.iinfo(given["dtype"]).min, np.iinfo(given["dtype"]).max + 1
    image = np.random.default_rng(0).integers(low, high, given["shape"], given["dtype"])
    interpreter.set_tensor(given["index"], image)
    return interpreter.invoke


run = open_engine(sys.argv[1], sys.argv[2])
run()
os.getppid()
run()
os.getppid()
