"""Opens a page in headless Chromium: screenshots, the DOM after its scripts ran, and their errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_COMMAND = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
_HOOK = """<script>
const report = (message) => document.documentElement.setAttribute("data-error", message);
addEventListener("error", (event) => report(event.message));
addEventListener("securitypolicyviolation", (event) => report(event.blockedURI));
</script>"""


def chromium() -> str:
    """Path of the browser; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    return found


def screenshot(page: Path, image: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Write what the page looks like as PNG."""
    options = [f"--screenshot={image}", f"--window-size={width},{height}", _scheme(dark)]
    _run([*options, page.as_uri()], image.parent)


def dom_after(html: str, folder: Path, script: str = "", *, width: int = 1280, dark: bool = False) -> str:
    """The DOM once the page's scripts, then `script`, have run. Fails on a script error or a blocked request.

    A content policy forbids every request, so a page that is not self-contained fails here.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = f'<head><meta http-equiv="Content-Security-Policy" content="{policy}">{_HOOK}'
    page = folder / "page.html"
    page.write_text(html.replace("<head>", head, 1).replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    dom = _run(["--dump-dom", f"--window-size={width},900", _scheme(dark), page.as_uri()], folder)
    error = re.search(r'<html[^>]*data-error="([^"]*)"', dom)
    assert error is None, f"the page raised {error[1]}" if error else ""
    return dom


def _scheme(dark: bool) -> str:
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


def _run(options: list[str], folder: Path) -> str:
    command = [chromium(), *_COMMAND, f"--user-data-dir={folder / 'profile'}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout
