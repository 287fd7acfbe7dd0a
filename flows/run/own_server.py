"""The Prefect server that a process starts for itself where Prefect is set to none.

Prefect would start one too, and import its whole server into this process for that, seconds before a run can begin.
This one starts while the process imports what it needs, does not hear Ctrl-C, and ends with the process, also with one
that is killed.
"""

from __future__ import annotations

import atexit
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from os import environ

import httpx
from prefect.settings import Settings, get_current_settings

from lmq.errors import LmqError

_LEAST_START_S = 120
"""How long the server may take to start, at the least: Prefect's 20 s are too few on a busy machine."""

_END_S = 5
_ENVIRONMENT = {"PREFECT_SERVER_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""As Prefect has it for a server of this kind."""
_SERVE = """
import os, signal, sys, threading
import uvicorn

def end_with_the_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_parent, daemon=True).start()
create_app = "prefect.server.api.server:create_app"
uvicorn.run(create_app, factory=True, lifespan="on", host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


@dataclass
class _OwnServer:
    process: subprocess.Popen[bytes]
    url: str
    answers: bool = False


_started: _OwnServer | None = None


def begin_own_server() -> None:
    """Start the server, without waiting for it, and set Prefect to it; nothing where it is set to one, or to none."""
    global _started
    settings = get_current_settings()
    is_own = _started is not None and settings.api.url == _started.url
    if (settings.api.url and not is_own) or not settings.server.ephemeral.enabled:
        return
    if own_server_is_gone():
        settings.client.max_retries = Settings().client.max_retries
        _started = None
    if _started is None:
        _started = _start(settings)
    settings.api.url = _started.url


def _start(settings: Settings) -> _OwnServer:
    port = _free_port()
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # which a child inherits
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, str(port)],
            env={**environ, **settings.to_environment_variables(exclude_unset=True), **_ENVIRONMENT},
            stdin=subprocess.PIPE,  # nothing is written: the server reads its end when this process ends
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    atexit.register(_end, process)
    threading.Thread(target=_retry_while_it_runs, args=(process, settings), name="own-server", daemon=True).start()
    return _OwnServer(process, f"http://127.0.0.1:{port}/api")


def start_own_server() -> None:
    """Start the server where that was not begun, and wait until it answers. Raises LmqError when it does not start."""
    begin_own_server()
    if _started is None or _started.answers:
        return
    may_take_s = max(get_current_settings().server.ephemeral.startup_timeout_seconds, _LEAST_START_S)
    deadline = time.monotonic() + may_take_s
    with httpx.Client() as client:
        while not _is_healthy(client, _started.url):
            code = _started.process.poll()
            if code is not None or time.monotonic() > deadline:
                how = f"ended with code {code}" if code is not None else f"did not answer within {may_take_s:.0f} s"
                raise LmqError(
                    f"Prefect's server, started for this run, {how}; run `prefect server start` beside, and set "
                    "PREFECT_API_URL to its address"
                )
            time.sleep(0.05)
    _started.answers = True


def own_server_is_gone() -> bool:
    """Whether a server was started and has ended."""
    return _started is not None and _started.process.poll() is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _retry_while_it_runs(process: subprocess.Popen[bytes], settings: Settings) -> None:
    """Let requests fail at once when the server has ended: with a whole group of processes, or for want of memory.

    A run that was stopped would try to tell it for minutes.
    """
    process.wait()
    settings.client.max_retries = 0


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
