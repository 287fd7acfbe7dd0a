"""What a model is made of and where its files lie, found without starting Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmq.model.structure import ModelStructure
from lmq_flows.config.run import parse_run_config
from lmq_flows.graph.walk import execute_directly
from lmq_flows.run.prepare import absolute_store_url, identify_models, preparation_graph, read_structure_of
from lmq_tasks.opened import located_dir
from lmq_tasks.stage import open_store


@dataclass(frozen=True, kw_only=True)
class InspectedModel:
    """A model's structure, and the directory of its safetensors and configuration on this machine."""

    structure: ModelStructure
    model_dir: Path


def inspect_model(source: str, store: str) -> InspectedModel:
    """Inspect a model, reading no weights; a GGUF file is converted into the store first."""
    config = parse_run_config(
        {
            "name": "inspect",
            "models": [{"name": "model", "source": source}],
            "strategies": ["uniform"],
            "budgets": ["8 bpw"],
            "store": store,
        }
    )
    graph, structures = preparation_graph(config, identify_models(config))
    node = structures["model"]
    ref = execute_directly(graph)[node]
    opened = open_store(absolute_store_url(store))
    assert node.site.model is not None
    return InspectedModel(structure=read_structure_of(opened, ref), model_dir=located_dir(opened, node.site.model))
