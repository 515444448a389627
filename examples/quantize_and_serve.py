"""Quantize a MobileNet to int8, and answer requests with it where there is no torch.

    python examples/quantize_and_serve.py quantize student.int8.safetensors    # with torch, once
    python examples/quantize_and_serve.py serve student.int8.safetensors --port 8000
    curl --data-binary @image.png localhost:8000          # {"class": "7", "probability": 0.98}

Here the student first learns scikit-learn's digits; yours is trained already.
"""

import argparse
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from vitkd_fast import images, int8


def quantize(file: Path, epochs: int) -> None:
    """Trains a small student on digits, and writes it in int8."""
    import timm
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = [Image.fromarray((15.9 * x).astype(np.uint8)).resize((32, 32)) for x in digits.images]
    images = np.stack([x.convert("RGB") for x in large])  # uint8 [1797, 32, 32, 3]
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    labels = torch.from_numpy(digits.target).long()
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(900).split(32):
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

    half, names = (0.5, 0.5, 0.5), list("0123456789")
    int8.quantize(model.eval(), images[:200], mean=half, std=half, classes=names).save(file)
    right = int8.load(file)(images[900:]).argmax(1) == digits.target[900:]
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, top-1 {right.mean():.1%}")


def serve(file: Path, port: int) -> None:
    """Answers an image that is posted; a session may be called by many threads at once."""
    session = int8.load(file)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                image = images.prepare(images.open_rgb(io.BytesIO(body)), session)
            except images.UNREADABLE as error:
                return self.send_error(400, "not an image", str(error))
            logits = session(image[None])[0]
            p = 1 / float(np.exp(logits - logits.max()).sum())
            answer = {"class": session.classes[logits.argmax()], "probability": p}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    server = ThreadingHTTPServer(("localhost", port), Handler)
    print(f"port {server.server_port}, torch: {'torch' in sys.modules}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["quantize", "serve"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    command, file, epochs, port = vars(parser.parse_args()).values()
    quantize(file, epochs) if command == "quantize" else serve(file, port)
