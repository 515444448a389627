"""Classify what a camera sees: one thread takes frames, another answers the newest of them.

    python examples/camera_loop.py student.int8.safetensors [--seconds 5] [--fps 30]

A frame waits in a slot for one: a newer one takes its place, so that the answer is never late by a
queue. Printed is the time from a frame's capture to its answer. The camera here pans over two
photographs that come with scikit-learn, with a sensor's noise; with OpenCV it would be
`cv2.VideoCapture(0).read()`. The file is one that `int8.quantize` has written; no torch is needed.
"""

import argparse
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_sample_images

from vitkd_fast import int8


def camera(fps: float) -> Iterator[np.ndarray]:
    """RGB frames, uint8 [400, 400, 3], at their time."""
    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    start = time.perf_counter()
    number = 0
    while True:
        left = 4 * number % 240
        frame = photographs[number // 60 % 2][:400, left : left + 400]
        frame = np.clip(frame + rng.normal(0, 6, (400, 400, 1)), 0, 255).astype(np.uint8)
        number += 1
        time.sleep(max(0.0, start + number / fps - time.perf_counter()))
        yield frame


def capture(fps: float, slot: queue.Queue, stop: threading.Event, counts: dict[str, int]) -> None:
    """Puts the newest frame into the slot until it is told to stop."""
    for frame in camera(fps):
        if stop.is_set():
            return
        counts["frames"] += 1
        try:
            slot.get_nowait()
            counts["dropped"] += 1
        except queue.Empty:
            pass
        slot.put((time.perf_counter(), frame))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--fps", type=float, default=30.0)
    given = parser.parse_args()
    session = int8.load(given.file, threads=1)
    slot: queue.Queue = queue.Queue(maxsize=1)
    stop, counts = threading.Event(), {"frames": 0, "dropped": 0}
    thread = threading.Thread(target=capture, args=(given.fps, slot, stop, counts))
    thread.start()
    latencies, end = [], time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        taken, frame = slot.get()
        answer = session.classes[int(session([frame], prepare=True).argmax())]
        latencies.append(1e3 * (time.perf_counter() - taken))
    stop.set()
    thread.join()
    p50, p99 = np.percentile(latencies, (50, 99))
    print(f"{counts['frames']} frames, {counts['dropped']} dropped, the last is a {answer}")
    print(f"capture to answer: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


if __name__ == "__main__":
    main()
