#!/usr/bin/env bash
# Pillow 13.0 gives a tall image that shrinks other bytes than 12.3, and a wide one the same: it chooses the order of
# its two passes, between which values are rounded to 8 bits, by the shapes, where 12.3 always takes rows first. The
# same file and the same code prepare other pixels under another Pillow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 12.3.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "pillow==$version" 2>/dev/null
done
cat >"$folder/resize.py" <<'P'
import random
import zlib

from PIL import Image

noise = random.Random(0).randbytes(600 * 1600 * 3)
for size in ((600, 1600), (1600, 600)):  # width, height
    image = Image.frombytes("RGB", size, noise)
    for to in ((500, 200), (200, 500)):
        print(*size, *to, zlib.crc32(image.resize(to, Image.Resampling.BICUBIC).tobytes()))
P
old=$("$folder/12.3.0/bin/python" "$folder/resize.py")
new=$("$folder/13.0.0/bin/python" "$folder/resize.py")
echo "width, height, to width, to height, CRC of the bytes: expected the same"
paste <(echo "$old") <(echo "$new")
[ "$old" != "$new" ] && [ "$(tail -n 2 <<<"$old")" = "$(tail -n 2 <<<"$new")" ]
