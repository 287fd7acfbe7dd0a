"""Commands that put lmq on a Prefect server."""

from __future__ import annotations

import argparse
import os

from lmq.errors import InputError
from lmq_flows.cli.terminal import console


def serve_command(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from lmq_flows.serve.serving import serve

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
        console.print("stopped; runs that were under way go on from their finished work when they are run again")
    return 0


def deploy_command(arguments: argparse.Namespace) -> int:
    """Tell the server that PREFECT_API_URL names of lmq's pools and deployments."""
    from lmq_flows.serve.deploy import deploy, environment_of

    api_url = os.environ.get("PREFECT_API_URL")
    if not api_url:
        raise InputError("PREFECT_API_URL names no server; set it, as in http://127.0.0.1:4200/api, or use `lmq serve`")
    deploy(environment_of(api_url, arguments.store, arguments.runs))
    console.print(f"deployed to {api_url}: `prefect deployment ls` lists it", highlight=False, soft_wrap=True)
    return 0
