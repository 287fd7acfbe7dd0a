"""Asking a storage again when it stumbles, and saying plainly when that is no use."""

from __future__ import annotations

import errno
import functools
import importlib
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

_PASSING_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "408", "409", "429", "500", "502", "503", "504",
}  # fmt: skip
"""Codes in answers of S3 that pass: throttling, faults of the server, uploads that arrived incomplete."""

_PASSING_ERRNOS = {
    None, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH,
}  # fmt: skip

_PASSING_ERRORS = (
    ("botocore.exceptions", "HTTPClientError"),  # closed connections, time-outs
    ("botocore.exceptions", "ConnectionError"),  # refused connections
    ("botocore.exceptions", "IncompleteReadError"),
    ("botocore.exceptions", "ResponseStreamingError"),
    ("aiohttp", "ClientError"),
)
_LASTING_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"))
"""Errors of storage libraries that are no OSError, by what they mean; a library that is not installed raises none."""


def asking_again(what: str, call: Callable[[], T], first_wait_s: float = FIRST_WAIT_S) -> T:
    """Result of `call`, repeated with growing waits while the storage fails in a way that passes.

    FileNotFoundError and FileExistsError are answers and go to the caller. Raises BadStore at once for what stays, and
    StoreError after ATTEMPTS.
    """
    passing = _classes(_PASSING_ERRORS)
    errors: tuple[type[Exception], ...] = (OSError, *passing, *_classes(_LASTING_ERRORS))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except errors as error:
            if error_code(error) == "NoSuchBucket" or not (isinstance(error, passing) or _passes(error)):
                if isinstance(error, FileNotFoundError | FileExistsError) and error_code(error) != "NoSuchBucket":
                    raise
                raise BadStore(f"cannot {what}: {_reason(error)}. {_advice(error)}") from error
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


def _passes(error: Exception) -> bool:
    if (code := error_code(error)) is not None:
        return code in _PASSING_CODES
    if not isinstance(error, OSError) or isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return False
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in _PASSING_ERRNOS


@functools.cache
def _classes(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    found = []
    for module, name in names:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return tuple(found)


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
