"""The second moments of a finished run, found again in its store, as an importance matrix of llama.cpp."""

from __future__ import annotations

from pathlib import Path

from lmq.errors import InputError, unknown_name
from lmq.export.imatrix import write_imatrix
from lmq.measurement.quantizer_moments import load_moments
from lmq.model.skeleton import read_model_config
from lmq.model.structure import ModuleId
from lmq_flows.studies.frontier import FinishedRun, finished_graph, refs_above
from lmq_tasks.inputs import located_dir
from lmq_tasks.measure import measure_second_moments
from lmq_tasks.stage import open_store
from lmq_tasks.states import MOMENTS_FILE, sampled_backward

_WEIGHTED, _PLAIN = sampled_backward.name, measure_second_moments.name
"""Stages that make second moments."""


def write_run_imatrix(run_dir: Path, model_name: str | None, path: Path) -> tuple[int, str]:
    """Write the file; gives the number of matrices, and whether the moments are Fisher-weighted or plain.

    Raises InputError for a model that the run does not have, a run without second moments, and what `write_imatrix`
    refuses.
    """
    run = FinishedRun.open(run_dir)
    if model_name is None and len(run.models) > 1:
        raise InputError(f"the run has {len(run.models)} models; name one of {', '.join(run.models)} with --model")
    wanted = [item for item in run.config.models if item.name == (model_name or run.models[0])]
    if not wanted:
        raise unknown_name(f"model of run {run.config.name!r}:", str(model_name), run.models)
    config = run.config.model_copy(update={"models": tuple(wanted)})
    model, graph, _ = finished_graph(config, run_dir)
    weighted, plain = ([node for node in graph if node.stage.name == name] for name in (_WEIGHTED, _PLAIN))
    chosen = weighted or plain
    if not chosen:
        raise InputError(
            f"the quantizers of {run_dir} look at weights alone, as all else did, so it has no second moments; "
            "run it with fisher-gptq"
        )
    refs = refs_above(graph, chosen, run_dir)
    store, structure = open_store(chosen[0].site.store_url), model.structure
    importance = {}
    for node in chosen:
        assert node.layer is not None
        for kind, moments in load_moments(store.path(refs[node], MOMENTS_FILE)).items():
            importance[structure.path(ModuleId(node.layer, kind))] = moments.matrix().diagonal()
    assert model.site.model is not None
    text = config.calibration
    write_imatrix(
        path,
        read_model_config(located_dir(store, model.site.model)),
        importance,
        text=f"{text.source}, {text.sequences} sequences",
        sequence_length=text.sequence_length,
    )
    return len(importance), "Fisher-weighted" if weighted else "plain"
