"""Several nodes of one stage carried by one Prefect task, for runners whose tasks cost a good part of a second.

Inside, every node is a Prefect task of its own with its own key, state and artifact: a worker that dies loses the
node it worked on, and what is there already is shown as Cached.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from lmq_storage import ArtifactRef
from lmq_tasks.engine import stage_task
from lmq_tasks.stage import JsonDict, Site, open_store, stage_key

NOT_RUN = "NotRun"
"""Name of the outcome of a node whose input, carried by the same task, could not be made."""


@task(
    name="chunk",
    description="Nodes of one stage, one after the other",
    task_run_name="{label}",
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=False,
)
def run_chunk(label: str, items: list[JsonDict]) -> list[JsonDict]:
    """Outcomes of the items in their order, as `run_node` gives them.

    An item is `{stage, label, site, config, inputs, tags}`; `{"artifact": {"item": 3}}` among its inputs stands for
    what the item of this number makes.
    """
    outcomes: list[JsonDict] = []
    for item in items:
        missing = [outcomes[number] for number in _items_among(item["inputs"]) if "ref" not in outcomes[number]]
        if missing:
            outcomes.append({"state": NOT_RUN, "message": missing[0]["message"]})
        else:
            outcomes.append(run_node(**{**item, "inputs": _resolved(item["inputs"], outcomes)}))
    return outcomes


def run_node(
    stage: str,
    label: str,
    site: JsonDict,
    config: JsonDict,
    inputs: JsonDict,
    tags: Sequence[str] = (),
    **options: Any,
) -> JsonDict:
    """Run one node as a Prefect task here; its `node_outcome`, with the `seconds` it took when it ran.

    `options` are those of the task, such as `result_storage`, which otherwise is that of the task or flow around it.
    """
    started = time.perf_counter()
    carrier, parameters, was_there = node_task(stage, label, site, config, inputs, tags, **options)
    outcome = node_outcome(carrier(**parameters, return_state=True), was_there)
    return outcome if was_there else {**outcome, "seconds": time.perf_counter() - started}


def node_task(
    stage: str,
    label: str,
    site: JsonDict,
    config: JsonDict,
    inputs: JsonDict,
    tags: Sequence[str] = (),
    **options: Any,
) -> tuple[Any, JsonDict, bool]:
    """The Prefect task of a node, the parameters to call it with, and whether its artifact is there already."""
    from lmq_tasks import STAGES

    store = open_store(Site.from_json(site).store_url)
    key = stage_key(store, STAGES[stage], config, inputs)
    was_there = store.find(stage, key) is not None
    carrier = stage_task(stage).with_options(refresh_cache=not was_there, tags=list(tags), **options)
    parameters = {"label": f"{stage} {label}", "key": key, "site": site, "config": config, "inputs": inputs}
    return carrier, parameters, was_there


def node_outcome(state: State[Any], was_there: bool) -> JsonDict:
    """What became of a node whose task ended in this state: `{state, ref}`, or `{state, message}` when it failed.

    `state` is "cached" or "ran", or the name of the state that the task failed in.
    """
    if not state.is_completed():
        return {"state": state.name, "message": state.message or "failed without a message"}
    ref = ArtifactRef.from_json(state.result())
    return {"state": "cached" if was_there else "ran", "ref": ref.to_json()}


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
