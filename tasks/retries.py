"""Which errors go away by waiting: those of the network and of storage behind it; never those of the input."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from prefect.states import State
from prefect.tasks import exponential_backoff

UNAVAILABLE = "Unavailable"
"""Name of the state of a task that could not reach the hub or the store; it is tried again, later and later."""

RETRIES = 4

STORE_UNAVAILABLE = "StoreUnavailable"
"""Name of the state of a task whose store did not answer, though it was asked again by the store's own code already."""

STORE_RETRIES = 1

_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Of the system, and those that s3fs gives to throttling and server errors."""

_STATUS_CODES = {408, 425, 429, 500, 502, 503, 504}

_CLASSES = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.HTTPClientError",
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "httpx.TransportError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
}
"""Known by name, since not every one of these packages is installed."""

_OFFLINE_BY_WISH = "huggingface_hub.errors.OfflineModeIsEnabled"


def is_transient(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, may go away by waiting."""
    return any(_may_go_away(item) for item in _chain(error))


def retry_options(delay_seconds: float = 2.0) -> dict[str, Any]:
    """Options of a Prefect task that is tried again when it ends in the state Unavailable, after 2, 4, 8 and 16 s.

    In the state StoreUnavailable once only: the store has waited already.
    """
    return {
        "retries": RETRIES,
        "retry_delay_seconds": exponential_backoff(delay_seconds),
        "retry_jitter_factor": 0.5,
        "retry_condition_fn": _may_be_tried_again,
    }


def _may_be_tried_again(task: Any, task_run: Any, state: State[Any]) -> bool:
    return state.name == UNAVAILABLE or (state.name == STORE_UNAVAILABLE and task_run.run_count <= STORE_RETRIES)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _may_go_away(error: BaseException) -> bool:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    public = {name.replace("httpx._exceptions.", "httpx.") for name in names}
    if _OFFLINE_BY_WISH in public:
        return False
    return bool(public & _CLASSES) or getattr(error, "errno", None) in _ERRNOS or _status(error) in _STATUS_CODES


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error carries, as httpx, requests and botocore keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
