from pathlib import Path

import pytest
import torch

from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER_SCHEMA, sequence_fisher, sequence_loss_changes
from lmq.measurement.traces import trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.tables import read_rows
from lmq.text.calibration import write_tokens
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.inputs import TOKENS_FILE
from lmq_tasks.measure import MEASUREMENT_STAGES, make_grids
from lmq_tasks.sources import discover_structure
from lmq_tasks.stage import ModelLocation, Site, Stage, as_inputs, run_stage
from lmq_tasks.states import GRADIENTS_FILE, HIDDEN_STATES_FILE, embed, forward, sampled_backward, sampled_gradient

SEQUENCES, LENGTH, DRAWS, LAYER = 2, 12, 3, 2
MENU = ["b3g64", "b4g64"]


class Runner:
    """Runs stages one after the other in a store of its own; keys are counted, not hashed."""

    def __init__(self, store_dir: Path, model_dir: Path):
        self.store = ArtifactStore(store_dir.as_uri())
        self.site = Site(store_url=store_dir.as_uri(), model=ModelLocation(kind="directory", place=str(model_dir)))
        self._count = 0

    def run(self, stage: Stage, config: dict[str, object], **inputs: ArtifactRef | list[ArtifactRef]) -> ArtifactRef:
        self._count += 1
        return run_stage(stage, f"{self._count:064x}", self.site, config, as_inputs(inputs))

    def tokens(self, path: Path) -> ArtifactRef:
        token_ids = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
        write_tokens(path, token_ids)
        return self.store.publish(
            stage="calibration", key="0" * 64, schema="tokens/1", files={TOKENS_FILE: path}, algorithm_version=1
        )


@pytest.fixture
def runner(tmp_path: Path, tiny_qwen: Path) -> Runner:
    return Runner(tmp_path / "store", tiny_qwen)


def test_costs_of_a_layer_come_from_the_gradients_of_every_draw(
    runner: Runner, tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (
        "lmq.numerics",
        "lmq.measurement.sequence_fisher",
    ):  # exact products, whatever the processor is fast at
        monkeypatch.setattr(f"{place}.fast_matmul_dtype", lambda _: torch.float32)
    monkeypatch.setattr("lmq.measurement.sequence_fisher._ERROR_BYTES_AT_ONCE", 3 * 64 * 64)  # of one configuration
    structure = runner.run(discover_structure, {"weights_sha256": "0"})
    hidden = [runner.run(embed, {}, structure=structure, tokens=runner.tokens(tmp_path / "tokens.parquet"))]
    for layer in range(4):
        hidden.append(runner.run(forward, {"layer": layer}, structure=structure, hidden=hidden[-1]))
    last = runner.run(sampled_gradient, {"draws": DRAWS, "seed": 0}, structure=structure, hidden=hidden[-1])
    gradient = runner.run(sampled_backward, {"layer": 3}, structure=structure, hidden=hidden[3], gradient=last)
    moments = runner.run(
        sampled_backward, {"layer": LAYER}, structure=structure, hidden=hidden[LAYER], gradient=gradient
    )
    grids = runner.run(
        make_grids,
        {"layer": LAYER, "menu": MENU, "quantizer": {"name": "hqq", "axis": 1}},
        structure=structure,
    )
    found = runner.run(
        MEASUREMENT_STAGES["sequence_fisher"],
        {"layer": LAYER, "menu": MENU},
        structure=structure,
        grids=grids,
        hidden=hidden[LAYER],
        drawn_gradients=gradient,
        moments=moments,
    )
    rows = read_rows(runner.store.path(found, "sequence-fisher.parquet"), SEQUENCE_FISHER_SCHEMA)
    assert len(rows) == 7 * len(MENU)
    of_values = [row for row in rows if row["kind"] == "self_attn.v_proj"]
    by_sequence, by_token = [], []
    for row in of_values:
        changes, token_cost = _by_the_library(runner, tiny_qwen, hidden[LAYER], gradient, grids, row)
        assert len(changes) == DRAWS * SEQUENCES
        assert row["loss_changes"] == pytest.approx(changes.tolist(), rel=1e-4, abs=1e-5 * float(changes.abs().max()))
        by_sequence.append(sequence_fisher(changes, tokens_per_sequence=LENGTH - 1))
        by_token.append(token_cost)
    # apart from one another as token by token, and in the geometric mean as sequence by sequence
    costs = [row["fisher"] for row in of_values]
    assert costs[0] / costs[1] == pytest.approx(by_token[0] / by_token[1], rel=1e-4)
    assert costs[0] * costs[1] == pytest.approx(by_sequence[0] * by_sequence[1], rel=1e-4)


def _by_the_library(
    runner: Runner,
    model_dir: Path,
    hidden: ArtifactRef,
    gradients: ArtifactRef,
    grids: ArtifactRef,
    row: dict[str, int],
) -> tuple[torch.Tensor, float]:
    """Changes of the loss, and ½ mean over tokens of w ‖E x‖², w being the mean square of the token's gradients."""
    model = StreamedModel.open(model_dir, discover(model_dir, weights_sha256="0"))
    module = next(m for m in model.structure.in_layer(LAYER) if m.id.kind == row["kind"])
    spec = QuantSpec(row["bits"], row["group_size"])
    states = read_hidden_states(runner.store.path(hidden, HIDDEN_STATES_FILE))
    with model.block(LAYER) as block:
        weight = block.get_submodule(module.id.kind).get_parameter("weight")
        grid = load_grids(runner.store.path(grids, "grids.safetensors"))[module.id][spec]
        error = {spec: grid.round_trip(weight) - weight}
        every_draw = read_gradients(runner.store.path(gradients, GRADIENTS_FILE)).split(SEQUENCES)
        inputs = model.block_inputs(LENGTH)[LAYER]
        changes, squares = [], []
        for draw in every_draw:
            trace = trace_modules(block, inputs, states, draw, [module.id.kind], torch.float32)[module.id.kind]
            changes.append(sequence_loss_changes(trace, error, sequence_length=LENGTH)[spec])
            squares.append(trace.gradients.double().square().mean(1))
        moved = (trace.inputs.double() @ error[spec].double().t()).square().sum(1)
        token_cost = 0.5 * float((torch.stack(squares).mean(0) * moved).mean())
    return torch.cat(changes), token_cost
