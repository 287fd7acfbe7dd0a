"""A process that imports lmq once and forks a process per command line, so that starting a real run takes no time.

Lines on standard input are JSON: {"argv", "cwd", "log", "environment"} starts `lmq ARGV…` and answers its process
number; {"wait": pid} answers its exit code, negative for a signal. Run as `python fork_runs.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

from lmq_flows.cli import main, quiet_libraries

quiet_libraries()  # as the command does, before Prefect is imported
for name in (
    "lmq_flows.run.plan",
    "lmq_flows.run.quantize",
    "lmq.report.page",
    "scipy.stats",
    "transformers.modeling_utils",
    "transformers.conversion_mapping",
):  # what a run needs, imported before the fork
    importlib.import_module(name)


def start(argv: list[str], cwd: str, log: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(cwd)
        os.environ.update(environment)
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = start(**request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
