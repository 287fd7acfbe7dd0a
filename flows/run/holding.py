"""The lease of the run in progress: whatever its flows use is kept in the store until it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lmq_flows.graph.node import Node
from lmq_flows.graph.walk import Outcome, Watcher
from lmq_flows.run.prepare import absolute_store_url
from lmq_storage.leases import Lease
from lmq_tasks.stage import open_store

_held: ContextVar[Lease | None] = ContextVar("lease", default=None)


@contextmanager
def run_lease(store_url: str, name: str) -> Iterator[Lease]:
    """The lease that an outer flow holds, else one of our own until the block ends."""
    outer = _held.get()
    if outer is not None:
        yield outer
        return
    with Lease(open_store(absolute_store_url(store_url)), name) as lease:
        token = _held.set(lease)
        try:
            yield lease
        finally:
            _held.reset(token)


def keeping(lease: Lease, watch: Watcher) -> Watcher:
    """A watcher that notes every artifact in the lease. What was there already: before it is read."""

    def note(node: Node, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.ref is not None:
            lease.use([outcome.ref.uri], at_once=outcome.state == "cached")
        watch(node, outcome)

    return note
