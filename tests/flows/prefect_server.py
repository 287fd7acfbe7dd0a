"""The Prefect server that all workers of pytest share, and a process that is this server.

Starting a server with a new database takes ten seconds of work. Each worker that uses it holds a lock on a file, which
the system lets go of however the worker ends; the server ends when it can have that lock for itself.
Run as `python prefect_server.py PORT FILE`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 300
"""Only a hang takes longer, also on a busy machine."""
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class SharedServer:
    """A server whose files are in `home`."""

    home: Path

    @property
    def database(self) -> Path:
        """The database that it writes to."""
        return self.home / "prefect.db"

    @property
    def new_database(self) -> Path:
        """A database with all tables and nothing in them: a server that gets a copy starts in half the time."""
        return self.home / "new.db"

    @property
    def url(self) -> str:
        """Address of its API."""
        return f"http://127.0.0.1:{(self.home / 'port').read_text()}/api"

    def is_there(self) -> bool:
        """Whether it was started and answers."""
        return (self.home / "port").is_file() and is_healthy(self.url)

    def start(self) -> None:
        """Start it and wait for it."""
        port = free_port()
        home = {"PREFECT_HOME": str(self.home), "PREFECT_API_DATABASE_CONNECTION_URL": database_url(self.database)}
        environment = {**os.environ, **home, "PREFECT_SERVER_UI_ENABLED": "0"}
        command = [sys.executable, __file__, str(port), str(self.home / "users")]
        with (self.home / "server.log").open("ab") as log:
            output = [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
            # a session of its own: Ctrl-C is for the workers
            process = os.posix_spawn(command[0], command, environment, file_actions=output, setsid=True)
        deadline = time.monotonic() + START_S
        while not is_healthy(f"http://127.0.0.1:{port}/api"):
            assert os.waitpid(process, os.WNOHANG) == (0, 0), (self.home / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        if not self.new_database.is_file():
            with sqlite3.connect(self.database) as source, sqlite3.connect(self.new_database) as copy:
                source.backup(copy)
            source.close()
            copy.close()
        (self.home / "port").write_text(str(port))


@contextmanager
def shared_server(home: Path) -> Iterator[SharedServer]:
    """The server of this home, started by the first that asks; it ends after the last."""
    home.mkdir(exist_ok=True)
    server = SharedServer(home)
    with (home / "users").open("w") as users:
        with (home / "starting").open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_SH)
            if not server.is_there():
                server.start()
        yield server


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        return httpx.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def database_url(path: Path) -> str:
    """What Prefect is set to for a database in a file."""
    return f"sqlite+aiosqlite:///{path}"


def end_without_users(path: str) -> None:
    """End this process once nobody holds the lock; nobody gets it again before the end."""
    with Path(path).open("w") as users:
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import uvicorn

    threading.Thread(target=end_without_users, args=(sys.argv[2],), daemon=True).start()
    create_app = "prefect.server.api.server:create_app"
    uvicorn.run(create_app, factory=True, lifespan="on", host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
