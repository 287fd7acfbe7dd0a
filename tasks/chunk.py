"""Several nodes of one stage carried by one Prefect task, one after the other.

Every node has its own key and artifact: a worker that dies loses the node it worked on, and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmq_tasks.stage import JsonDict

NOT_RUN = "NotRun"
"""Name of the outcome of a node whose input, carried by the same task, could not be made."""

STOPPED = "the run was stopped; finished work is kept"

Tell = Callable[[int, JsonDict | None], bool]
"""Called with an item's number and None before it starts, with its outcome when it is made; says whether to go on."""


def run_items(
    items: Sequence[JsonDict], run_item: Callable[[JsonDict], JsonDict], tell: Tell | None = None
) -> list[JsonDict]:
    """Outcomes of the items in their order.

    An item is `{label, site, config, inputs}`; `{"artifact": {"item": 3}}` among its inputs stands for what the item of
    this number makes. Its outcome is what `run_item` gives: `{state, ref}`, or `{state, message}` when it failed.
    """
    outcomes: list[JsonDict] = []
    for number, item in enumerate(items):
        missing = [outcomes[other] for other in _items_among(item["inputs"]) if "ref" not in outcomes[other]]
        if missing:
            outcomes.append({"state": NOT_RUN, "message": missing[0]["message"]})
            continue
        if tell is not None and not tell(number, None):
            outcomes.append({"state": NOT_RUN, "message": STOPPED})
            continue
        outcomes.append(run_item({**item, "inputs": _resolved(item["inputs"], outcomes)}))
        if tell is not None and "ref" in outcomes[-1]:
            tell(number, outcomes[-1])
    return outcomes


def _as_list(value: Any) -> Sequence[JsonDict]:
    return value if isinstance(value, list) else [value]


def _items_among(inputs: JsonDict) -> list[int]:
    artifacts = [one["artifact"] for value in inputs.values() for one in _as_list(value)]
    return [artifact["item"] for artifact in artifacts if "item" in artifact]


def _resolved(inputs: JsonDict, outcomes: list[JsonDict]) -> JsonDict:
    def resolve(one: JsonDict) -> JsonDict:
        number = one["artifact"].get("item")
        return one if number is None else {**one, "artifact": outcomes[number]["ref"]}

    return {
        name: [resolve(one) for one in value] if isinstance(value, list) else resolve(value)
        for name, value in inputs.items()
    }
