"""Names in the store: what they may look like, so that none leads out of it, and URLs that hold no secrets."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lmq_storage.errors import BadStore, StoreError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def checked_name(name: str) -> str:
    """A name of one part (a stage, a key, a run). Raises StoreError for anything that could leave its directory."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise StoreError(f"{name!r} is not a valid name in a store: letters, digits, '.', '_' and '-' are allowed")
    return name


def checked_file_name(name: str) -> str:
    """Name of a file of an artifact, which may have directories. Raises StoreError when it could leave it."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    unsafe = path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name
    if unsafe or path.as_posix() != name:
        raise StoreError(f"{name!r} is not a valid name for a file of an artifact: it must be a plain relative path")
    return name


def is_sha256(text: object) -> bool:
    """Whether a text is a hex sha256, which is what the bytes of the store are named by."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def checked_url(url: str) -> str:
    """The URL of a store. Raises BadStore, without repeating it, when it carries a password or options.

    URLs are written down (configurations, Prefect's database, logs); keys belong in the environment.
    """
    if "://" not in url:
        return url
    parts = urlsplit(url)
    if parts.password is not None or "@" in parts.netloc or parts.query or parts.fragment:
        raise BadStore(
            f"the store's {parts.scheme}:// URL holds a user, a password or options, which would be written down with "
            f"every run; give {parts.scheme}://BUCKET/PATH and put keys where the file system looks for them "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, FSSPEC_S3_KEY and FSSPEC_S3_SECRET, ~/.aws/credentials)"
        )
    return url
