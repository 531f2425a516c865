"""A headless Chromium that opens a page from its file: answers what a script there found, or makes
a picture of it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_RESULT = re.compile(r'<pre id="driven">(.*?)</pre>', re.S)
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--disable-dev-shm-usage",  # a container's /dev/shm holds 64 MiB, less than a picture takes
)  # fmt: skip

#: The system's colour scheme, by what CSS calls it.
SCHEMES = {
    scheme: f"--blink-settings=preferredColorScheme={number}"
    for number, scheme in enumerate(("dark", "light"))
}


def chromium() -> str:
    """The browser's path; skips the test where there is none that opens files."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(_NAMES)})")
    if not _opens_files(found):
        pytest.skip(f"{found} opens no file: a stub, or a snap that sees no temporary folder")
    return found


@functools.cache
def _opens_files(browser: str) -> bool:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "page.html"
        page.write_text("<p>it is open</p>", encoding="utf-8")
        done = subprocess.run(
            [browser, *_OPTIONS, f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return "it is open" in done.stdout


def driven(page: Path, script: str, *options: str) -> dict[str, Any]:
    """Open *page* with *script* added, the body of an async function, and give what it returns.

    In *script*, `key(name)` presses a key where the focus is, `$` and `$$` are the usual two, and
    `pause()` waits for the next frame.
    """
    text = page.read_text(encoding="utf-8")
    nonce = re.search(r'nonce="([^"]+)"', text)
    allowed = f' nonce="{nonce[1]}"' if nonce else ""
    copy = page.with_name(f"driven-{page.name}")
    copy.write_text(
        text.replace(
            "</body>",
            f"<script{allowed}>{_PRELUDE}(async () => {{ {script} }})()"
            ".then(answer, error => answer({ error: String(error) }));</script></body>",
        ),
        encoding="utf-8",
    )
    dom = subprocess.run(
        [
            chromium(), *_OPTIONS,
            f"--user-data-dir={page.parent / 'profile'}", "--window-size=1280,900",
            "--virtual-time-budget=5000", *options, "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    found = _RESULT.search(dom)
    assert found is not None, "no script ran in the page"
    answer: dict[str, Any] = json.loads(bytes.fromhex(found[1]).decode())
    assert "error" not in answer, answer["error"]
    return answer


def photographed(page: Path, picture: Path, *, size: tuple[int, int], scheme: str) -> bytes:
    """The page in a window of *size* under the colour *scheme*, left as a PNG at *picture* to be
    looked at; gives the grey of every pixel, a byte each, row by row."""
    subprocess.run(
        [
            chromium(), *_OPTIONS, SCHEMES[scheme], f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={size[0]},{size[1]}", "--force-device-scale-factor=1",
            f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    return _greys(picture.read_bytes(), size)


def _greys(png: bytes, size: tuple[int, int]) -> bytes:
    """Chromium's PNG (8 bits a channel, not interlaced), decoded (https://www.w3.org/TR/png/)."""
    place, data, header = 8, b"", b""
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        body = png[place + 8 : place + 8 + length]
        header = body if kind == b"IHDR" else header
        data += body if kind == b"IDAT" else b""
        place += length + 12
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", header)
    assert ((width, height), depth, interlaced) == (size, 8, 0)
    channels = {2: 3, 6: 4}[colour]
    raw, row_bytes = zlib.decompress(data), width * channels
    before, greys = bytearray(row_bytes), bytearray()
    for start in range(0, len(raw), row_bytes + 1):
        row = bytearray(raw[start + 1 : start + 1 + row_bytes])
        _unfilter(raw[start], row, before, channels)
        greys += bytes(sum(row[n : n + 3]) // 3 for n in range(0, row_bytes, channels))
        before = row
    return bytes(greys)


def _unfilter(kind: int, row: bytearray, above: bytearray, step: int) -> None:
    """Undo a row's filter in place."""
    for n in range(len(row) if kind else 0):
        left, up = row[n - step] if n >= step else 0, above[n]
        corner = above[n - step] if n >= step else 0
        if kind == 4:
            guess = left + up - corner
            near = min((abs(guess - v), rank, v) for rank, v in enumerate((left, up, corner)))[2]
            row[n] = (row[n] + near) & 255
        else:
            row[n] = (row[n] + (left, up, (left + up) // 2)[kind - 1]) & 255


_PRELUDE = """
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
document.addEventListener("securitypolicyviolation", event => faults.push(event.violatedDirective));
const $ = selector => document.querySelector(selector);
const $$ = selector => [...document.querySelectorAll(selector)];
const pause = () => new Promise(done => setTimeout(done, 50));
const key = async name => {
  (document.activeElement ?? document.body).dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  await pause();
};
const answer = value => {
  const pre = document.createElement("pre");
  pre.id = "driven";
  pre.textContent = [...new TextEncoder().encode(JSON.stringify(value))]
    .map(byte => byte.toString(16).padStart(2, "0")).join("");
  document.body.append(pre);
};
"""
