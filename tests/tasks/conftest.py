"""A tiny model captured by the stages themselves: what stages that replay a block start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lmq.text.calibration import write_tokens
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.inputs import TOKENS_FILE
from lmq_tasks.measure import make_grids
from lmq_tasks.sources import discover_structure
from lmq_tasks.stage import ModelLocation, Site, Stage, as_inputs, run_stage
from lmq_tasks.states import backward, embed, forward, loss_gradient

SEQUENCES, LENGTH, LAYERS = 2, 12, 4
MENU = ["b3g64", "b4g64"]


@dataclass
class Captured:
    """Artifacts of one model: `hidden` enters every block and leaves the last, `gradient` leaves every block."""

    store: ArtifactStore
    site: Site
    structure: ArtifactRef | None = None
    hidden: list[ArtifactRef] = field(default_factory=list)
    gradient: list[ArtifactRef] = field(default_factory=list)
    grids: list[ArtifactRef] = field(default_factory=list)
    _count: int = 0

    def run(self, stage: Stage, config: dict[str, Any], **inputs: ArtifactRef | list[ArtifactRef]) -> ArtifactRef:
        """Run a stage; keys are counted, not hashed."""
        self._count += 1
        given = inputs if self.structure is None else {"structure": self.structure, **inputs}
        return run_stage(stage, f"{self._count:064x}", self.site, config, as_inputs(given))

    def path(self, ref: ArtifactRef, file: str) -> Path:
        """A file of an artifact."""
        return self.store.path(ref, file)


@pytest.fixture(scope="session")
def captured(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """The grouped-query model, captured on random tokens."""
    place = tmp_path_factory.mktemp("captured")
    location = ModelLocation(kind="directory", place=str(tiny_qwen))
    found = Captured(ArtifactStore(place.as_uri()), Site(store_url=place.as_uri(), model=location))
    found.structure = found.run(discover_structure, {"weights_sha256": "0"})
    token_ids = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    write_tokens(place / "tokens.parquet", token_ids)
    tokens = found.store.publish(
        stage="calibration",
        key="0" * 64,
        schema="tokens/1",
        files={TOKENS_FILE: place / "tokens.parquet"},
        algorithm_version=1,
    )
    found.hidden.append(found.run(embed, {}, tokens=tokens))
    for layer in range(LAYERS):
        found.hidden.append(found.run(forward, {"layer": layer}, hidden=found.hidden[-1]))
        config = {"layer": layer, "menu": MENU, "quantizer": {"name": "rtn", "axis": 1}}
        found.grids.append(found.run(make_grids, config))
    gradients = [found.run(loss_gradient, {}, hidden=found.hidden[-1], tokens=tokens)]
    for layer in range(LAYERS - 1, 0, -1):
        gradients.append(found.run(backward, {"layer": layer}, hidden=found.hidden[layer], gradient=gradients[-1]))
    found.gradient = gradients[::-1]
    return found
