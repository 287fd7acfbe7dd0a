"""When a task is tried again: after errors of the network or of a storage, never after errors of the input.

Which errors may go away by waiting is listed in `lmq_storage.retry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmq_storage import retry as storage_retry

if TYPE_CHECKING:
    from prefect.states import State

UNAVAILABLE = "Unavailable"
"""Name of the state of a task that could not reach the hub or the store; it is tried again, later and later."""

RETRIES = 4

STORE_UNAVAILABLE = "StoreUnavailable"
"""Name of the state of a task whose store did not answer, though it was asked again by the store's own code already."""

STORE_RETRIES = 1


def is_transient(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, may go away by waiting."""
    return any(storage_retry.is_transient(item) for item in _chain(error))


def retry_options(delay_seconds: float = 2.0) -> dict[str, Any]:
    """Options of a Prefect task that is tried again when it ends in the state Unavailable, after 2, 4, 8 and 16 s.

    In the state StoreUnavailable once only: the store has waited already.
    """
    from prefect.tasks import exponential_backoff  # Prefect takes seconds to import, which `is_transient` does not need

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
