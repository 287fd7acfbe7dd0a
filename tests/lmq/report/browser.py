"""Opens a page in headless Chromium: its errors, its DOM after scripts, screenshots, and what it prints.

The browser is driven over a pair of pipes (Chromium's DevTools protocol), so no port is taken and nothing is installed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_COMMAND = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)
_PATIENCE_S = 90
_SAID = {"error", "warning", "assert"}


def chromium() -> str:
    """Path of the browser; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    return found


class Page:
    """One tab. `problems` collects script errors, console errors and warnings, and requests for anything else."""

    def __init__(self, pipes: _Pipes, session: str):
        self._pipes = pipes
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Answer of a DevTools method."""
        return self._pipes.call(method, parameters, self._session)

    def open(
        self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False
    ) -> None:
        """Load a file, as on a screen of that many CSS pixels and in that colour scheme, until its scripts have run."""
        self._pipes.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.emulate(dark=dark)
        self.call("Page.navigate", url=file.as_uri())
        self._pipes.wait_for("Page.loadEventFired")

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """Set the preferred colour scheme and the medium (`print`; empty: a screen)."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    @property
    def problems(self) -> list[str]:
        """What the page complained of, or asked the network for, since it was opened."""
        self.run("1")  # events that came before this answer have been read with it
        found = []
        for event in self._pipes.events:
            match event["method"], event["params"]:
                case "Runtime.exceptionThrown", given:
                    found.append(f"script error: {given['exceptionDetails']['text']}")
                case "Runtime.consoleAPICalled", given if given["type"] in _SAID:
                    found.append(f"console.{given['type']}: {given['args']}")
                case "Log.entryAdded", given if given["entry"]["level"] in _SAID:
                    found.append(f"log: {given['entry']['text']}")
                case "Network.requestWillBeSent", given if given["type"] != "Document":
                    found.append(f"request: {given['request']['url'][:200]}")
                case "Network.loadingFailed", given:
                    found.append(f"failed request: {given['errorText']}")
                case _:
                    pass
        return found

    def screenshot(self, image: Path, *, whole: bool = False) -> None:
        """Write what the page looks like as PNG: the window, or the `whole` page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        image.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, file: Path) -> None:
        """Print the page on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a browser that keeps its files in `folder` and ends with the context."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def as_three_and_four() -> None:
        # away from 3 and 4 first: either could be one of the ends
        reading, writing = os.dup(to_read), os.dup(from_write)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    process = subprocess.Popen(
        [chromium(), *_COMMAND, f"--user-data-dir={folder / 'profile'}", "about:blank"],
        preexec_fn=as_three_and_four,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    pipes = _Pipes(from_read, to_write)
    try:
        target = pipes.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        yield Page(pipes, pipes.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
        pipes.call("Browser.close", {})
    finally:
        os.close(to_write)
        os.close(from_read)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Pipes:
    """Messages of the protocol: JSON, each ended by a zero byte."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        self._rest = b""
        self._sent = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, method: str) -> None:
        """Read until an event of this name has come since the events were last cleared."""
        until = time.monotonic() + _PATIENCE_S
        while not any(event["method"] == method for event in self.events):
            assert time.monotonic() < until, f"no {method} in {_PATIENCE_S} s"
            self._next()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], _PATIENCE_S)
            assert ready, f"the browser said nothing for {_PATIENCE_S} s"
            data = os.read(self._reading, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
