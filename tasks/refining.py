"""Stage that decides by trial: plans are tried on the model, and the best of them is refined."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lmq.allocation.refine import LossChanges, ModelTrials, Refinement, Slice
from lmq.allocation.solver import ALLOCATION_SCHEMA
from lmq.allocation.strategies import Auto, strategy
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.replay import read_hidden_states
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.model.structure import ModuleId
from lmq.tables import TableSchema, write_rows
from lmq.text.calibration import read_tokens
from lmq_tasks.measure import grids_by_layer, measured_rows
from lmq_tasks.opened import open_model
from lmq_tasks.planning import read_measurements, spec_of, write_allocation
from lmq_tasks.stage import Job, stage
from lmq_tasks.states import HIDDEN_STATES_FILE
from lmq_tasks.texts import TOKENS_FILE

TRIALS_SCHEMA = TableSchema(
    "trials",
    1,
    pa.schema(
        [
            pa.field("origin", pa.string(), nullable=False),
            pa.field("changed_modules", pa.int64(), nullable=False),
            pa.field("divergence", pa.float64()),
        ]
    ),
)
"""Every plan that was tried: `divergence` in nats per token on the validation slice, null where it broke the model."""


@stage("refine", version=2, schema=ALLOCATION_SCHEMA.label)
def refine(job: Job) -> None:
    """Choose the configuration of every module by trying plans on the model, under a budget in bytes.

    Files: those of `allocate`, and trials.parquet. solution.json also says the divergence on the validation slice
    of the plan and of uniform.
    """
    model = open_model(job)
    chosen = strategy(job.config["strategy"], **job.config["options"])
    assert isinstance(chosen, Auto)
    point = QuantizedPoint(model, grids_by_layer(job))
    validation = read_tokens(job.input("validation", TOKENS_FILE))
    trials = ModelTrials(
        point,
        calibration=Slice(
            token_ids=read_tokens(job.input("tokens", TOKENS_FILE)),
            reference_states=read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE)),
        ),
        validation=Slice(token_ids=validation, reference_states=point.last_states(validation)),
        loss_changes=_loss_changes(job),
    )
    measurements = read_measurements(job, model.structure, trials=trials)
    allocation, refinement = chosen.refine(measurements, job.config["budget_bytes"])
    write_allocation(
        job,
        allocation,
        validation_divergence=_finite(refinement.loss),
        uniform_validation_divergence=_finite(refinement.uniform_loss),
    )
    write_rows(job.output / "trials.parquet", TRIALS_SCHEMA, _trial_rows(refinement))


def _loss_changes(job: Job) -> LossChanges:
    return {
        (ModuleId(row["layer"], row["kind"]), spec_of(row)): np.array(row["loss_changes"])
        for row in measured_rows(job, SEQUENCE_FISHER.name)
    }


def _trial_rows(refinement: Refinement) -> list[dict[str, object]]:
    return [
        {"origin": step.origin, "changed_modules": step.changed_modules, "divergence": _finite(step.loss)}
        for step in refinement.tried
    ]


def _finite(loss: float) -> float | None:
    return loss if np.isfinite(loss) else None
