"""`lmq deploy`: lmq's work pools and deployments on a Prefect server that runs already."""

from __future__ import annotations

import argparse
import os

from lmq.errors import InputError
from lmq_flows.cli.arguments import add_places
from lmq_flows.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq deploy`."""
    add_places(parser)
    parser.set_defaults(command=deploy_command)


def deploy_command(arguments: argparse.Namespace) -> int:
    """Create or update lmq's pools and deployments on the server that PREFECT_API_URL names."""
    from lmq_flows.serve.deploy import deploy, environment_of

    api_url = os.environ.get("PREFECT_API_URL")
    if not api_url:
        raise InputError("PREFECT_API_URL names no server; set it, as in http://127.0.0.1:4200/api, or use `lmq serve`")
    deploy(environment_of(api_url, arguments.store, arguments.runs))
    say(f"deployed to {api_url}: `prefect deployment ls` lists it")
    return 0
