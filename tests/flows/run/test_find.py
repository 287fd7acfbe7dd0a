"""Directories of this machine reach workers elsewhere through the store, with every file that a checkpoint needs."""

import filecmp
import uuid

from lmq.model.directory import copy_companions
from lmq_flows.run.find import share_models
from lmq_flows.run.prepare import identify_models, preparation_graph
from lmq_storage import ArtifactStore
from lmq_tasks.inputs import located_dir
from tests.flows.conftest import tiny_config


def test_directory_is_put_into_a_remote_store_once_with_all_that_is_copied(tiny_llama, tmp_path):
    remote = f"memory://{uuid.uuid4().hex}"
    runner = {"runner__kind": "dask", "runner__address": "tcp://127.0.0.1:8786", "store": remote}
    config = tiny_config(tiny_llama, tmp_path, **runner)
    shared = share_models(config, identify_models(config))
    assert share_models(config, identify_models(config)) == shared
    store = ArtifactStore(remote, cache_dir=tmp_path / "cache")
    assert [manifest.ref for manifest in store.manifests("model-files")] == [shared[0].shared]
    graph, _ = preparation_graph(config, shared)
    there = located_dir(store, graph.nodes[0].site.model)
    (tmp_path / "expected").mkdir()
    copy_companions(tiny_llama, tmp_path / "expected")
    names = [path.name for path in (tmp_path / "expected").iterdir()] + ["model.safetensors"]
    assert "generation_config.json" in names
    assert filecmp.cmpfiles(tiny_llama, there, names, shallow=False) == (names, [], [])


def test_models_stay_where_workers_see_them(tiny_llama, tmp_path):
    here = tiny_config(tiny_llama, tmp_path, store=f"memory://{uuid.uuid4().hex}")
    mounted = tiny_config(tiny_llama, tmp_path, runner__kind="dask", runner__address="tcp://127.0.0.1:8786")
    for config in (here, mounted):
        models = identify_models(config)
        assert share_models(config, models) == models
