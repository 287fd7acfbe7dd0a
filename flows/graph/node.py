"""The stages of a run as a graph: what feeds what. Built once, walked by the flow and by the planner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmq.model.structure import layer_ranges
from lmq_storage import ArtifactRef
from lmq_tasks.stage import Site, Stage


@dataclass(eq=False)
class Node:
    """One stage applied to one thing: a layer, a variant, a model.

    `model` and `what` name the thing, as in "smollm2" and "mxq @ 4.25"; either may be empty. `inputs` are nodes, files
    of nodes, finished artifacts, or lists of them. `expected_bytes` is what the artifact is expected to keep on disk,
    None when that is not known beforehand. A node that is to be made `here` reads files that only the machine of the
    flow is sure to have.
    """

    stage: Stage
    model: str
    what: str
    config: dict[str, Any]
    inputs: dict[str, Input | list[Input]]
    site: Site
    layer: int | None = None
    expected_bytes: int | None = None
    variant: str | None = None
    here: bool = False
    parents: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        items = [item for value in self.inputs.values() for item in (value if isinstance(value, list) else [value])]
        sources = [item.node if isinstance(item, FileOf) else item for item in items]
        self.parents = list(dict.fromkeys(source for source in sources if isinstance(source, Node)))

    def __repr__(self) -> str:
        return f"Node({self.stage.name}, {self.label!r})"

    @property
    def subject(self) -> str:
        """`smollm2 mxq @ 4.25`: what the node is about, without its layer."""
        return f"{self.model} {self.what}".strip()

    @property
    def label(self) -> str:
        """`smollm2 mxq @ 4.25 layer 3`."""
        return self.subject if self.layer is None else f"{self.subject} layer {self.layer}".strip()


@dataclass(frozen=True)
class FileOf:
    """One file of a node's artifact: only its bytes decide whether what follows runs again."""

    node: Node
    file: str


Input = Node | FileOf | ArtifactRef


class Graph:
    """Nodes in an order in which every node comes after its inputs."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, stage: Stage, model: str, what: str, site: Site, **fields: Any) -> Node:
        """Append a node and return it; `fields` are others of Node, its `config` and `inputs` empty by default."""
        node = Node(stage, model, what, site=site, **{"config": {}, "inputs": {}, **fields})
        self.nodes.append(node)
        return node

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def leading_to(self, wanted: Sequence[Node]) -> list[Node]:
        """The wanted nodes and all that they are made from, in order."""
        needed = set(wanted)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.parents)
        return [node for node in self.nodes if node in needed]

    def children(self) -> dict[Node, list[Node]]:
        """For every node, the nodes that take it as input."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for parent in node.parents:
                found[parent].append(node)
        return found

    def depth_below(self) -> dict[Node, int]:
        """For every node, the number of nodes on the longest chain that waits for it."""
        children = self.children()
        depth: dict[Node, int] = {}
        for node in reversed(self.nodes):
            depth[node] = 1 + max((depth[child] for child in children[node]), default=0)
        return depth


def resolve_inputs(node: Node, refs: dict[Node, Any]) -> dict[str, Any]:
    """The node's inputs in the form tasks take, with `refs` standing for the nodes' artifacts."""

    def resolve(item: Input) -> dict[str, Any]:
        if isinstance(item, FileOf):
            return {"artifact": refs[item.node], "file": item.file}
        return {"artifact": item.to_json() if isinstance(item, ArtifactRef) else refs[item], "file": None}

    return {
        name: [resolve(item) for item in value] if isinstance(value, list) else resolve(value)
        for name, value in node.inputs.items()
    }


def joint_title(nodes: Sequence[Node]) -> str:
    """What nodes that share a task are called in the UI: `fisher · layers 0-14`, `evaluate · mxq @ 4.25`."""
    layers = sorted(node.layer for node in nodes if node.layer is not None)
    return " · ".join(filter(None, [nodes[0].stage.name, nodes[0].what, layer_ranges(layers) if layers else ""]))
