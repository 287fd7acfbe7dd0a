"""What a run would do, and why: the same graph and the same keys as the flow, without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_storage import Manifest
from lmq_tasks.stage import input_digests, open_store, stage_key


@dataclass(frozen=True)
class PlannedNode:
    """A node with what would happen: `cached` or not, the reason, and the bytes it keeps (None: not known).

    `uri` is that of the artifact that is there.
    """

    node: Node
    cached: bool
    reason: str
    size_bytes: int | None
    uri: str | None = None


def plan_graph(graph: Graph) -> list[PlannedNode]:
    """Say for every node whether it is cached, and if not why it would run."""
    refs: dict[Node, dict[str, str]] = {}
    planned: list[PlannedNode] = []
    history: dict[str, list[Manifest]] = {}
    for node in graph:
        store = open_store(node.site.store_url)
        remade = [parent for parent in node.parents if parent not in refs]
        if remade:
            reason = f"its input {remade[0].stage.name} {remade[0].label} will be made"
            planned.append(PlannedNode(node, False, reason, node.expected_bytes))
            continue
        inputs = resolve_inputs(node, refs)
        key = stage_key(store, node.stage, node.config, inputs)
        ref = store.find(node.stage.name, key)
        if ref is not None:
            refs[node] = ref.to_json()
            manifest = store.manifest(ref.stage, ref.key)
            planned.append(PlannedNode(node, True, "cached", manifest.size_bytes if manifest else None, ref.uri))
            continue
        if node.stage.name not in history:
            history[node.stage.name] = list(store.manifests(node.stage.name))
        reason = _reason(node, key, input_digests(store, inputs), history[node.stage.name])
        planned.append(PlannedNode(node, False, reason, node.expected_bytes))
    return planned


def _reason(node: Node, key: str, digests: Mapping[str, Any], earlier: list[Manifest]) -> str:
    """Why no artifact fits: the difference to the most similar one that was made before."""
    if any(manifest.key == key for manifest in earlier):
        return "its artifact is damaged"
    if not earlier:
        return "never made"
    differences = [_differences(node, digests, manifest) for manifest in earlier]
    return "; ".join(sorted(differences, key=len)[0])


def _differences(node: Node, digests: Mapping[str, Any], manifest: Manifest) -> list[str]:
    found = []
    if manifest.algorithm_version != node.stage.version:
        found.append(f"algorithm version {manifest.algorithm_version} → {node.stage.version}")
    for name in sorted({*node.config, *manifest.config}):
        before, now = manifest.config.get(name), node.config.get(name)
        if before != now:
            found.append(f"{name}: {_short(before)} → {_short(now)}")
    for name in sorted({*digests, *manifest.inputs}):
        if digests.get(name) != manifest.inputs.get(name):
            found.append(f"input {name} changed")
    return found or ["never made"]


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:37] + "..."
