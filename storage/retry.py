"""Calling a storage again after an error that may go away by waiting: which errors those are, and how long to wait.

The list of such errors is kept here alone; `lmq_tasks.retries` asks it too, for the hub and for whole tasks.
"""

from __future__ import annotations

import errno
import logging
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from lmq_storage.errors import BadStore, StoreError

T = TypeVar("T")

_log = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT_S = 0.5
"""Waits double: 0.5, 1, 2, 4, 8 s, each up to half as long again, so that many workers do not come back at once."""

_S3_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "408", "409", "429", "500", "502", "503", "504",
}  # fmt: skip
"""Codes in answers of S3: throttling, faults of the server, uploads that arrived incomplete."""

_HTTP_STATUSES = {408, 425, 429, 500, 502, 503, 504}

_ERRNOS = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EIO,
    errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
"""Of the operating system, and those that s3fs gives to throttling and server errors."""

_CLASSES = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.ResponseStreamingError",
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "httpx.TransportError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
}
"""By name, since not every one of these packages is installed."""

_OFFLINE_BY_CHOICE = "huggingface_hub.errors.OfflineModeIsEnabled"
"""A connection error by its class, but one that the user asked for."""

_STORAGE_CLASSES = {"builtins.OSError", "botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError"}
"""What a storage raises for what does not go away by waiting."""


def is_transient(error: BaseException) -> bool:
    """Whether this error may go away by waiting; an answer of S3 is judged by its code, anything else by its kind."""
    names = _class_names(error)
    if _OFFLINE_BY_CHOICE in names:
        return False
    if (code := error_code(error)) is not None:
        return code in _S3_CODES or _http_status(error) in _HTTP_STATUSES
    known_errno = getattr(error, "errno", None) in _ERRNOS
    return known_errno or bool(names & _CLASSES) or _http_status(error) in _HTTP_STATUSES


def retry(what: str, call: Callable[[], T], first_wait_s: float = FIRST_WAIT_S) -> T:
    """Result of `call`, repeated with growing waits while the storage fails in a way that may go away.

    FileNotFoundError and FileExistsError are answers and go to the caller. Raises BadStore at once for an error that
    stays, and StoreError after ATTEMPTS.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if _is_answer(error):
                raise
            if not (is_transient(error) or _names_no_cause(error)):
                if _class_names(error) & _STORAGE_CLASSES:
                    raise BadStore(f"cannot {what}: {_reason(error)}. {_advice(error)}") from error
                raise
            if attempt == ATTEMPTS:
                raise StoreError(
                    f"cannot {what}: {_reason(error)}, {attempt} times over; finished work is kept, run again when "
                    "the storage answers"
                ) from error
            wait_s = first_wait_s * 2 ** (attempt - 1) * (1 + secrets.randbelow(50) / 100)
            _log.warning(
                "cannot %s: %s; attempt %d of %d in %.1f s", what, _reason(error), attempt + 1, ATTEMPTS, wait_s
            )
            time.sleep(wait_s)
    raise AssertionError


def error_code(error: BaseException | None) -> str | None:
    """Code in the answer of S3 that an error comes from, as in `SlowDown`; None for any other error."""
    for one in (error, getattr(error, "__cause__", None)):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _is_answer(error: Exception) -> bool:
    """Whether the storage says that a file is missing or there already; a missing bucket is no such answer."""
    return isinstance(error, FileNotFoundError | FileExistsError) and error_code(error) != "NoSuchBucket"


def _names_no_cause(error: Exception) -> bool:
    """Whether it is an OSError without a number or code, which file systems raise for troubles of the connection."""
    told = FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    bare = isinstance(error, OSError) and not isinstance(error, told) and error.errno is None
    return bare and error_code(error) is None


def _class_names(error: BaseException) -> set[str]:
    """Full names of the error's class and of those it derives from."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    return {name.replace("httpx._exceptions.", "httpx.") for name in names}


def _http_status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error carries, as httpx, requests and botocore keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    code = error_code(error)
    return f"{code}: {text}" if code and code not in text else text


def _advice(error: Exception) -> str:
    if error_code(error) == "NoSuchBucket":
        return "There is no such bucket; make it, or set `store` to another"
    if "credential" in str(error).lower():
        return (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a server that is not Amazon's), "
            "or put them in ~/.aws/credentials"
        )
    if isinstance(error, PermissionError):
        return "Check the keys, and that they may list, read, write and delete there"
    return "Check the store's URL and the settings of its file system"
