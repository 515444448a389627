"""Google Cloud Storage as its reference states it: what gcsfs needs of the JSON API.

https://cloud.google.com/storage/docs/json_api/v1: uploads in one request and resumable ones, whose
condition ifGenerationMatch=0 refuses with 412 where the object is there.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

of_gcs = pytest.mark.skipif(find_spec("gcsfs") is None, reason="needs gcsfs, of the extra store")


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *given: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, tree: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(tree).encode(), **{"Content-Type": "application/json"})

    def _about(self, name: str) -> dict[str, str]:
        data = self.server.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(data)),
            "md5Hash": b64encode(hashlib.md5(data).digest()).decode(), "generation": "1",
            "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
        }  # fmt: skip

    def _store(self, name: str, data: bytes, query: dict[str, str]) -> None:
        with self.server.lock:
            if query.get("ifGenerationMatch") == "0" and name in self.server.objects:
                self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
                return
            self.server.objects[name] = data
        self._json(self._about(name))

    def _query(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: x[-1] for key, x in parse_qs(parts.query).items()}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        (_, query), body = self._query(), self._body()
        if "upload_id" in query:
            self._part(query["upload_id"], body)
            return
        self.server.writes.append((query["uploadType"], query.get("ifGenerationMatch")))
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            _, about, content, _ = body.split(b"--" + boundary[1].encode())
            name = json.loads(about.split(b"\n\n", 1)[1])["name"]
            self._store(name, content.split(b"\n\n", 1)[1].removesuffix(b"\n"), query)
            return
        key = str(len(self.server.sessions))
        self.server.sessions[key] = (json.loads(body)["name"], query, bytearray())
        host = f"http://{self.headers['Host']}"
        self._answer(200, Location=f"{host}/session?upload_id={key}&padding=of-a-long-location")

    def _part(self, key: str, body: bytes) -> None:
        name, query, so_far = self.server.sessions[key]
        so_far += body
        first, last, whole = re.findall(r"\d+", self.headers["Content-Range"])
        assert int(first) <= int(last)
        if len(so_far) < int(whole):
            self._answer(308, Range=f"bytes=0-{len(so_far) - 1}")
        else:
            self._store(name, bytes(so_far), query)

    def do_DELETE(self) -> None:
        self.server.sessions.pop(self._query()[1]["upload_id"], None)
        self._answer(204)

    def do_GET(self) -> None:
        path, query = self._query()
        name = unquote(path.partition("/o/")[2])
        if not name:
            found = [
                x for x in sorted(self.server.objects) if x.startswith(query.get("prefix", ""))
            ]
            self._json({"items": [self._about(x) for x in found]})
        elif name not in self.server.objects:
            self._json({"error": {"code": 404, "message": "No such object"}}, 404)
        elif query.get("alt") == "media":
            self._answer(200, self.server.objects[name])
        else:
            self._json(self._about(name))


@contextmanager
def gcs_server() -> Iterator[Any]:
    """A bucket named `bucket`: `objects` are its bytes, `writes` the uploads and conditions."""
    import fsspec

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.objects, server.writes, server.sessions = {}, [], {}
    server.lock = threading.Lock()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google
        kind = fsspec.get_filesystem_class("gs")
        kind.clear_instance_cache()
        yield server
        kind.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()
