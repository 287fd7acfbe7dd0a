"""How tasks are run: by threads of this process, or by worker processes of Dask or Ray, here or on other machines."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from prefect.settings import get_current_settings
from prefect.task_runners import ThreadPoolTaskRunner

from lmq.errors import InputError
from lmq_flows.config.sections import RunnerConfig

CONNECT_TIMEOUT_S = 30
"""How long to wait for a cluster to answer."""

_LEAST_OBJECT_STORE_BYTES = 80_000_000
"""What Ray takes for passed objects at the least; our tasks pass a few kilobytes of JSON."""


def check_runner(config: RunnerConfig, store_url: str) -> None:
    """Raise InputError for a runner whose package is missing, or whose workers would not see store or server."""
    if config.kind == "threads":
        return
    _package(config.kind)
    if store_url.startswith("memory://"):
        raise InputError(
            f"store = {store_url!r} is seen by one process only, and runner.kind = {config.kind!r} works in several; "
            "give a directory or a URL that all of them reach, such as s3://bucket/lmq"
        )
    if is_elsewhere(config) and not _serves_others(get_current_settings().api.url):
        raise InputError(
            f"the workers at {config.address} report to a Prefect server, and PREFECT_API_URL = "
            f"{get_current_settings().api.url!r} names none that other machines reach; start one with "
            "`prefect server start --host 0.0.0.0` and set PREFECT_API_URL to its address"
        )


def is_elsewhere(config: RunnerConfig) -> bool:
    """Whether workers may be on machines that do not see the files of this one."""
    return config.address is not None and not _is_loopback(config.address)


@contextmanager
def started_runner(config: RunnerConfig) -> Iterator[Any]:
    """The Prefect task runner of a configuration; a cluster made for it on this machine ends with the context.

    Any number of flow runs may use copies of the runner meanwhile: they share the cluster. Raises InputError when the
    package of the runner is missing, or nothing answers at its address.
    """
    if config.kind == "threads":
        yield ThreadPoolTaskRunner(max_workers=config.workers)
        return
    start = _dask if config.kind == "dask" else _ray
    with start(config) as runner:
        yield runner


@contextmanager
def _dask(config: RunnerConfig) -> Iterator[Any]:
    package = _package("dask")
    distributed = importlib.import_module("distributed")
    if config.address is not None:
        try:
            distributed.Client(config.address, timeout=CONNECT_TIMEOUT_S, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise _unreachable(config, error) from error
        yield package.DaskTaskRunner(address=config.address)
        return
    cluster = distributed.LocalCluster(
        n_workers=config.workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",  # else a second cluster warns of the first one's port
        memory_limit=0,  # Dask would end workers at its own idea of a limit in the middle of a block
    )
    try:
        yield package.DaskTaskRunner(address=cluster.scheduler_address)
    finally:
        cluster.close()


@contextmanager
def _ray(config: RunnerConfig) -> Iterator[Any]:
    package = _package("ray")
    ray = importlib.import_module("ray")
    local = {"num_cpus": config.workers, "object_store_memory": _LEAST_OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray tells of its own coming defaults
            ray.init(
                config.address or "local",
                namespace="prefect",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if config.address else local),
            )
    except (OSError, ValueError, RuntimeError) as error:
        if "AF_UNIX path length" in str(error):
            raise InputError(
                f"Ray's sockets lie below the temporary directory, and {tempfile.gettempdir()} is too long a path for "
                f"them ({error}); set TMPDIR to a shorter one, such as /tmp"
            ) from error
        raise _unreachable(config, error) from error
    try:
        yield package.RayTaskRunner(address=config.address)  # finds the connection that is open
    finally:
        ray.shutdown()


def _package(kind: str) -> Any:
    try:
        return importlib.import_module(f"prefect_{kind}")
    except ImportError as error:
        raise InputError(
            f"runner.kind = {kind!r} needs the package prefect-{kind} ({error}); "
            f"install it with pip install 'lmq[{kind}]', or use threads"
        ) from error


def _unreachable(config: RunnerConfig, error: Exception) -> InputError:
    where = config.address or "on this machine"
    return InputError(f"no {config.kind.capitalize()} cluster answered at runner.address = {where}: {error}")


def _serves_others(api_url: str | None) -> bool:
    return api_url is not None and not _is_loopback(api_url)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "auto", "")
