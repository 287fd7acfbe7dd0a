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
            outcomes.append({"state": NOT_RUN, "message": missing[0]["message"], "seconds": 0.0})
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
    """Run one node as a Prefect task here; `{state, seconds}` with its `ref`, or with a `message` when it failed.

    `state` is "cached" or "ran", or the name of the state that it failed in. `options` are those of the task, such as
    `result_storage`, which otherwise is that of the task or flow around it.
    """
    from lmq_tasks import STAGES

    started = time.perf_counter()
    store = open_store(Site.from_json(site).store_url)
    key = stage_key(store, STAGES[stage], config, inputs)
    was_there = store.find(stage, key) is not None
    run: Any = stage_task(stage).with_options(refresh_cache=not was_there, tags=list(tags), **options)
    state: State[Any] = run(
        label=f"{stage} {label}", key=key, site=site, config=config, inputs=inputs, return_state=True
    )
    seconds = time.perf_counter() - started
    if not state.is_completed():
        return {"state": state.name, "message": state.message or "failed without a message", "seconds": seconds}
    ref = ArtifactRef.from_json(state.result())
    return {"state": "cached" if was_there else "ran", "ref": ref.to_json(), "seconds": seconds}


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
