"""An S3 server of this process: moto's, which keeps what it is given in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

_MISSING = [name for name in ("s3fs", "moto", "flask") if not find_spec(name)]
of_s3 = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs {', '.join(_MISSING)}, of the extra dev-store"
)


@contextmanager
def s3_server() -> Iterator[Any]:
    """With an empty bucket named `bucket`; the environment names it. Yields the file system."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        kind = fsspec.get_filesystem_class("s3")
        kind.clear_instance_cache()  # of another server
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("bucket")
        yield files
        kind.clear_instance_cache()
    server.stop()
