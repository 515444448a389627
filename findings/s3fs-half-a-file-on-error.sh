#!/usr/bin/env bash
# s3fs commits what was written so far when the block of an opened file raises.
# `with fs.open(path, "xb") as file:` looks atomic, since an object of S3 appears at once. But leaving the block by an
# exception closes the file, and closing it uploads: half a file has the name, and in mode "xb" keeps the whole one out.
# pipe_file(path, data, mode="create") has everything before it begins; both are conditional (If-None-Match: *), also as
# an upload of several parts. A 412 whose body lacks the element Condition is an OSError, not a FileExistsError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q s3fs==2026.9.0 "moto[server]==5.2.5"
cd "$folder"
AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=us-east-1 venv/bin/python - <<'P'
import logging
import os
import sys

import moto
import s3fs
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from s3fs.errors import translate_boto_error

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
fs = s3fs.S3FileSystem()
fs.mkdir("bucket")
print("s3fs", s3fs.__version__, "moto", moto.__version__)


def write(data, error=None):
    try:
        with fs.open("bucket/file", "xb") as file:
            file.write(data)
            if error:
                raise error
    except (FileExistsError, RuntimeError) as caught:
        return type(caught).__name__
    return "written"


first = write(b"half", RuntimeError("the disk of the other half is gone"))
second = write(b"half and half")
there = fs.cat_file("bucket/file")
print("a block that raises: expected no file, observed", there, "after", first)
print("the whole file: expected written, observed", second)
refused = {}
for size in (1, 11 << 20):  # one put, and one of several parts
    name = f"bucket/{size}"
    fs.pipe_file(name, bytes(size), mode="create", chunksize=5 << 20)
    try:
        fs.pipe_file(name, b"x" * size, mode="create", chunksize=5 << 20)
        refused[size] = False
    except FileExistsError:
        refused[size] = fs.cat_file(name) == bytes(size)
print('pipe_file(mode="create") of what is there: refused', refused)
bare = ClientError({"Error": {"Code": "PreconditionFailed", "Message": "no"}}, "PutObject")
kind = type(translate_boto_error(bare)).__name__
print("412 without Condition: expected FileExistsError, observed", kind)
server.stop()
same = (first, second, there) == ("RuntimeError", "FileExistsError", b"half")
sys.exit(not (same and all(refused.values()) and kind == "OSError"))
P
