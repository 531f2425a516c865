"""A headless Chromium that opens a page from its file and answers what a script there found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_RESULT = re.compile(r'<pre id="driven">(.*?)</pre>', re.S)


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(_NAMES)})")
    return found


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
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
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
