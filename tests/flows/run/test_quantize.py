"""The whole flow on a real Prefect server: results, and what runs again after what change."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

import lmq
from lmq.checkpoint.write import quantized_bytes
from lmq.errors import InfeasibleBudget, InputError
from lmq.report.results import format_bytes, read_results
from lmq_flows.run.overview import artifact_key
from lmq_flows.run.plan import check_run
from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.flows.conftest import layers_of, promised, run_and_look, tiny_config

pytestmark = pytest.mark.slow

GRADIENTS = {"sampled-loss-gradient", "sampled-backward"}
MEASURING = {"kurtosis", "grids", "embed", "forward", "sensitivity", "sequence-fisher", *GRADIENTS}
CAPTURE = {"calibration", "embed", "forward", "sensitivity", "sequence-fisher", *GRADIENTS}


@pytest.fixture(scope="module")
def finished(server, tiny_qwen, tmp_path_factory):
    """A finished run of a grouped-query model with tied embeddings and biases; tests work on copies of its store."""
    place = tmp_path_factory.mktemp("run")
    config = tiny_config(tiny_qwen, place)
    return config, run_and_look(config), place


@pytest.fixture
def again(finished, tiny_qwen, tmp_path):
    """Makes configurations that start from a copy of the finished run's store."""
    _, _, place = finished
    shutil.copytree(place / "store", tmp_path / "store")
    return lambda **changes: tiny_config(tiny_qwen, tmp_path, **changes)


def test_measured_tables_and_warnings_lie_beside_the_results(finished):
    config, _, _ = finished
    tables = {path.name for path in (config.run_dir / "measurements").iterdir()}
    expected = ("frobenius", "kurtosis", "sensitivity", "sequence-fisher")
    assert tables == {f"tiny-{name}.parquet" for name in expected}
    assert (config.run_dir / "warnings.txt").read_text() == ""  # random weights lie on no grid


def test_every_variant_is_measured_within_its_budget(finished):
    config, done, _ = finished
    assert done.state.is_completed(), done.state.message
    results = {result.strategy: result for result in read_results(config.run_dir / "results.json")}
    assert list(results) == ["full-precision", "uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"]
    for result in results.values():
        assert result.perplexity is not None
        assert result.perplexity > 1
        assert result.tokens == 255
        assert result.error is None
    assert results["full-precision"].kl_divergence is None
    uniform = results["uniform"]
    for name in ("mxq", "loss-aware"):
        assert results[name].size_bytes <= results[name].budget_bytes == uniform.budget_bytes
        assert results[name].gap <= 1e-9
        assert results[name].kl_divergence > 0


def test_checkpoints_hold_what_the_solver_counted_and_open(finished):
    config, _, _ = finished
    for result in read_results(config.run_dir / "results.json")[1:]:
        checkpoint = config.run_dir / result.checkpoint
        assert quantized_bytes(checkpoint) == result.size_bytes
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        assert sum(sizes.values()) - sizes["README.md"] == result.checkpoint_bytes
    model = lmq.load(config.run_dir / result.checkpoint, dtype=torch.float32)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_everything_a_run_promises_is_written(finished):
    config, _, _ = finished
    names = {path.name for path in config.run_dir.iterdir()}
    assert {"results.json", "report.html", "config.yaml", "summary.md", "checkpoints"} <= names
    with (config.run_dir / "allocation-tiny-mxq-uniform-b4g64.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4 * 7


def test_every_checkpoint_has_a_card_that_tells_nothing_of_this_machine(finished):
    config, _, _ = finished
    for result in read_results(config.run_dir / "results.json")[1:]:
        card = (config.run_dir / result.checkpoint / "README.md").read_text()
        assert f"# tiny, {result.label}" in card
        assert f"| {result.label} | " in card
        assert "/tmp" not in card
        assert str(config.run_dir) not in card


def overview_of(done):
    """The one artifact of a run: its text, and the rows of its table of stages by stage."""
    with get_client(sync_client=True) as client:
        own = FlowRunFilter(id=FlowRunFilterId(any_=[done.state.state_details.flow_run_id]))
        artifacts = client.read_artifacts(flow_run_filter=own)
    # what a flow raised is an artifact too, without key and type, which the UI does not show
    (artifact,) = (artifact for artifact in artifacts if artifact.key is not None)
    assert (artifact.key, artifact.type) == ("tiny", "markdown")
    table, _, _ = artifact.data.partition("## Results")
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in table.splitlines() if "| " in line]
    return artifact.data, {row[0]: row[1:] for row in rows[2:]}


def test_one_artifact_is_the_run(finished):
    config, done, _ = finished
    text, stages = overview_of(done)
    assert stages.keys() == {stage for stage, _ in done.cached}
    assert text.startswith("# tiny\n\n**Made 5 of 5 variants after ")
    assert f"{len(stages)} of {len(stages)} stages done" in text
    _, _, results = text.partition("## Results")
    assert "loss-aware" in results
    pictures = sorted((config.run_dir / "figures").glob("*.svg"))
    shown = re.findall(r"!\[([^\]]+)\]\(data:image/svg\+xml;base64,([^)]+)\)", results)
    assert [(name, base64.b64decode(data)) for name, data in shown] == [(p.stem, p.read_bytes()) for p in pictures]
    assert pictures
    manifests = list(ArtifactStore(config.store).manifests("grids"))
    state, count, seconds, size, why = stages["grids"]
    assert (state, count, why) == ("✓ ran", "4 of 4", "never made")
    assert seconds == f"{sum(manifest.seconds for manifest in manifests):.1f}"
    assert size == format_bytes(sum(manifest.size_bytes for manifest in manifests))
    assert stages["sequence-fisher"][-1].startswith("follows ")


def test_artifact_keys_are_what_prefect_allows():
    assert artifact_key("kurtosis-SmolLM2_135M-mlp.down_proj") == "kurtosis-smollm2-135m-mlp-down-proj"


def test_unchanged_run_is_cached_throughout(again):
    config = again()
    done = run_and_look(config)
    assert done.ran() == set()
    text, stages = overview_of(done)
    assert f"{len(stages)} of {len(stages)} stages done, {len(stages)} of them cached" in text
    assert {row[0] for row in stages.values()} == {"✓ cached"}
    assert {row[-1] for row in stages.values()} == {""}
    assert done.cached.keys() - {("report", "tiny")} == promised(config).keys()


def test_layers_share_a_row_and_what_is_cached_is_one_row_per_stage_and_variant(again):
    done = run_and_look(again())
    assert set(done.rows.values()) == {"Cached"}
    assert {"sequence-fisher · layers 0-3", "sampled-backward · layers 0-3", "outliers", "report · tiny"} <= set(
        done.rows
    )
    assert "quantize · mxq @ uniform b4g64 · layers 0-3" in done.rows
    assert sum(len(layers_of(row)) or 1 for row in done.rows) == len(done.cached)
    assert len(done.rows) == len({(stage, label.partition(" layer ")[0]) for stage, label in done.cached})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluation__tokens": 320}, {"evaluation-tokens", "reference", "evaluate", "report"}),
        ({"evaluation__stride": 64}, {"reference", "evaluate", "report"}),
        (
            {"strategies": ["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware", "structural"]},
            {"allocate", "quantize", "checkpoint", "evaluate", "report"},
        ),
        (
            {"strategies": [{"name": "loss-aware", "options": {"fisher": "token"}}]},
            {
                *("loss-gradient", "backward", "fisher"),
                *("allocate", "quantize", "checkpoint", "evaluate", "report"),
            },
        ),
        (
            {"budgets": ["uniform b4g64", "uniform b3g64"]},
            {"allocate", "quantize", "checkpoint", "evaluate", "report"},
        ),
        (
            {"calibration__sequence_length": 48},
            CAPTURE | {"outliers", "allocate", "quantize", "checkpoint", "evaluate", "report"},
        ),
        (
            {"quantizers": ["rtn"]},
            {
                *("grids", "sensitivity", "sequence-fisher", "outliers"),
                *("allocate", "quantize", "checkpoint", "evaluate", "report"),
            },
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_only_what_changed_runs_again_as_planned(again, changes, expected):
    config = again(**changes)
    plan = promised(config)
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    assert done.ran() == expected
    _, stages = overview_of(done)
    assert {name for name, row in stages.items() if row[0] == "✓ ran"} == expected
    wrong = {task for task, cached in plan.items() if done.cached[task] and not cached}
    assert {stage for stage, _ in wrong} <= {"quantize", "checkpoint", "evaluate", "outliers"}, "only equal content"
    assert not {task for task, cached in plan.items() if cached and not done.cached[task]}, "a promise was broken"


def test_constraints_are_kept_and_only_programs_are_solved_again(again):
    constraints = {"alike": ["qkv", "gate-up"], "fixed": {"0.*": "b8g64"}, "most_configurations": 3}
    config = again(strategies=["uniform", "mxq"], constraints=constraints)
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    assert done.ran() == {"allocate", "quantize", "checkpoint", "evaluate", "report"}
    assert done.cached["allocate", "tiny uniform @ uniform b4g64"]
    with (config.run_dir / "allocation-tiny-mxq-uniform-b4g64.csv").open() as stream:
        specs = {(int(row["layer"]), row["kind"]): (row["bits"], row["group_size"]) for row in csv.DictReader(stream)}
    assert {spec for (layer, _), spec in specs.items() if layer == 0} == {("8", "64")}
    assert len(set(specs.values())) <= 3
    for layer in range(4):
        assert len({specs[layer, f"self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert specs[layer, "mlp.gate_proj"] == specs[layer, "mlp.up_proj"]


def test_constraints_that_contradict_are_refused_before_measuring(tiny_qwen, tmp_path):
    constraints = {"fixed": {"0.*": "b2g64"}, "floor": {"*.mlp.down_proj": "b4g64"}}
    config = tiny_config(tiny_qwen, tmp_path, strategies=["mxq"], constraints=constraints)
    with pytest.raises(InputError, match=r"fixed '0\.\*': b2g64.*floor '\*\.mlp\.down_proj': b4g64"):
        check_run(config)
    tight = tiny_config(tiny_qwen, tmp_path, strategies=["mxq"], constraints={"floor": {"*": "b8g64"}})
    with pytest.raises(InfeasibleBudget, match="under the constraints"):
        check_run(tight)


def test_measurements_of_another_strategy_are_shared(again):
    done = run_and_look(again(strategies=["mxq"], name="other"))
    assert done.ran() == {"report"}


def test_damaged_and_deleted_artifacts_are_made_again(again):
    config = again()
    store = ArtifactStore(config.store)
    first, second = list(store.manifests("sequence-fisher"))[:2]
    blob = store.path(first.ref, "sequence-fisher.parquet")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:100])
    store.path(second.ref, "sequence-fisher.parquet").unlink()
    before = (config.run_dir / "results.json").read_text() if config.run_dir.exists() else None
    done = run_and_look(config)
    assert before is None
    assert done.ran() == {"sequence-fisher"}
    assert sum(not cached for cached in done.cached.values()) == 2
    assert verify(ArtifactStore(config.store)) == []


def test_budget_below_the_smallest_is_refused_before_measuring(server, tiny_qwen, tmp_path):
    config = tiny_config(tiny_qwen, tmp_path, budgets=["1.5"])
    done = run_and_look(config)
    assert done.state.is_failed()
    error = done.state.result(raise_on_failure=False)
    assert "smallest feasible budget" in str(error)
    text, stages = overview_of(done)
    assert text.startswith("# tiny\n\n**Failed after ")
    assert "smallest feasible budget" in text
    assert stages.keys() == {"discover"}
    assert not MEASURING & {stage for stage, _ in done.cached}


def test_a_failed_variant_leaves_the_others(server, tiny_llama, tmp_path, monkeypatch):
    from lmq.allocation.strategies.mxq import Mxq
    from lmq.errors import LmqError

    def fail(self, measurements, budget_bytes):
        raise LmqError("the solver is on strike")

    monkeypatch.setattr(Mxq, "allocate", fail)
    config = tiny_config(tiny_llama, tmp_path, strategies=["uniform", "mxq"])
    done = run_and_look(config)
    assert done.state.is_failed()
    assert done.state.message.startswith("1 of 2 variants; failed: tiny mxq @ uniform b4g64: ")
    assert "the solver is on strike; report: " in done.state.message
    results = {result.strategy: result for result in read_results(config.run_dir / "results.json")}
    assert "on strike" in results["mxq"].error
    assert results["mxq"].perplexity is None
    assert results["uniform"].perplexity is not None
    assert "on strike" in (config.run_dir / "report.html").read_text()
    text, stages = overview_of(done)
    assert text.startswith("# tiny\n\n**Made 1 of 2 variants after ")
    assert stages["allocate"][:2] == ["✗ failed", "1 of 2, 1 failed"]
    assert stages["quantize"][:2] == ["✗ not run", "4 of 8, 4 not run"]
    assert stages["quantize"][-1] == "follows allocate"
    assert stages["allocate"][-1].endswith("the solver is on strike")
    assert stages["reference"][0] == "✓ ran"


@pytest.mark.parametrize("name", ["tiny_gemma", "tiny_phi"])
def test_other_architectures_run_to_the_end(server, request, tmp_path, name):
    config = tiny_config(request.getfixturevalue(name), tmp_path, strategies=["uniform", "sensi-boost", "loss-aware"])
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    assert all(result.perplexity for result in read_results(config.run_dir / "results.json"))


def test_results_file_is_a_list_of_objects_with_nulls(finished):
    config, _, _ = finished
    records = json.loads((config.run_dir / "results.json").read_text())
    assert isinstance(records, list)
    assert records[0]["budget_bytes"] is None
    assert 0 not in (records[0]["kl_divergence"], records[0]["seconds"])
