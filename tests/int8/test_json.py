"""The JSON of int8 files: every spelling of it, and nothing else."""

import json
from dataclasses import replace
from typing import Any

import pytest

from support.int8_graphs import random_graph
from vitkd_fast.int8.file import FileError, dump, read

KEY = "vitkd_fast.int8"


def framed(text: bytes, section: bytes = b"") -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + section


def test_other_spellings_of_the_same_json() -> None:
    """Other orders of keys, space and escapes."""
    names = ('d"\\/\b\f\n\r\t\x7fö', "\U0001f408\u2028")
    data = dump(replace(random_graph(0, classes=2), classes=names, crop_pct=0.875))
    end = 8 + int.from_bytes(data[:8], "little")
    header, section = json.loads(data[8:end]), data[end:]
    document = json.loads(header.pop("__metadata__")[KEY])
    document = {key: document[key] for key in reversed(document)}
    document["nodes"] = [{k: node[k] for k in reversed(node)} for node in document["nodes"]]

    def respelled(text: str) -> bytes:
        whole = dict(reversed(header.items())) | {"__metadata__": {KEY: text}}
        return framed(json.dumps(whole).encode(), section)

    options: list[dict[str, Any]] = [{"indent": 1}, {"ensure_ascii": False}]
    for option in [*options, {"separators": (" , ", "\r\n:\t")}]:
        assert dump(read(respelled(json.dumps(document, **option)))) == data
    text = json.dumps(document).replace("nodes", "\\u006eodes").replace("0.875", "87.5E-2")
    assert dump(read(respelled(text))) == data


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"}", b"{}}", b"{} {}", b"[1,]", b"{,}", b'{"a"}', b'{"a":}', b'{"a":1,}', b"{a:1}",
     b"{'a':1}", b'{"a" 1}', b"[1 2]", b"[01]", b"[1.]", b"[.5]", b"[+1]", b"[-]", b"[1e]",
     b"[1e+]", b"[0x1]", b"[tru]", b"[nulls]", b'["a]', b'["\\x"]', b'["\\u12g4"]', b'["\\u12"]',
     b'["\n"]', b'["\0"]', b"[\0]", b"\xef\xbb\xbf[]", b'["\xc0\x80"]', b'["\xed\xa0\x80"]',
     b'["\x80"]', b'["\xf5\x80\x80\x80"]', b'["\xe2\x82"]', b'["\xf0\x8f\xbf\xbf"]', b"/**/[]"],
)  # fmt: skip
def test_no_json(text: bytes) -> None:
    with pytest.raises(ValueError):
        json.loads(text.decode())
    with pytest.raises(FileError, match=r"its JSON cannot be read: .* at byte \d+$"):
        read(framed(text + b" " * 8))
