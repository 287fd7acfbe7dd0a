"""`lmq serve`: a Prefect server with lmq's deployments and a worker on this machine."""

from __future__ import annotations

import argparse

from lmq_flows.cli.arguments import add_number, add_places
from lmq_flows.cli.terminal import console, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq serve`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add_number(parser, "--port", 4200, "port of the UI and the API")
    add_number(parser, "--runs-at-once", 1, "runs that the worker works on at once")
    add_places(parser)
    parser.set_defaults(command=serve_command)


def serve_command(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from lmq_flows.serve.deploy import serve

    try:
        serve(
            host=arguments.host,
            port=arguments.port,
            store=arguments.store,
            runs_dir=arguments.runs,
            runs_at_once=arguments.runs_at_once,
            console=console,
        )
    except KeyboardInterrupt:
        say("stopped; a run that was interrupted continues from its finished work when it is run again")
    return 0
