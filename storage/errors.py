"""What can go wrong with a store."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot do what was asked; the message says what and what to do."""

    exit_code = 1


class BadStore(StoreError):
    """The store that was given cannot be used: no such bucket, no credentials, not allowed. Trying again is no use."""

    exit_code = 2


class DamagedArtifact(StoreError):
    """Bytes of an artifact are missing or are not those that were published."""
