"""Everything that can be measured of a model. A new measurement is one file here and one line in this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lmq.measurement.activation import SENSITIVITY
from lmq.measurement.base import Cost, Measurement, Profile
from lmq.measurement.delta_loss import DELTA_LOSS
from lmq.measurement.expert_tokens import EXPERT_TOKENS
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.measurement.module_divergence import DIVERGENCE
from lmq.measurement.second_moments import MODULE_ERRORS
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.measurement.super_weights import SUPER_WEIGHTS
from lmq.measurement.token_fisher import FISHER
from lmq.measurement.weights import KURTOSIS

M = TypeVar("M", bound=Measurement)


def _by_name(*measurements: M) -> dict[str, M]:
    return {measurement.name: measurement for measurement in measurements}


PROFILES: Mapping[str, Profile] = _by_name(
    SENSITIVITY,
    KURTOSIS,
)
"""One number per module, in the order of the report; outlier layers are looked for in each."""

COSTS: Mapping[str, Cost] = _by_name(
    SEQUENCE_FISHER,
    FISHER,
    DIVERGENCE,
    DELTA_LOSS,
    MODULE_ERRORS,
    FROBENIUS,
)
"""What every module loses under every configuration, in the order of the report."""

LAYER_MEASUREMENTS: Mapping[str, Measurement] = _by_name(
    SUPER_WEIGHTS,
    LAYER_ACTIVITY,
    EXPERT_TOKENS,
)
"""Tables of other shapes."""

MEASUREMENTS: Mapping[str, Measurement] = {**PROFILES, **COSTS, **LAYER_MEASUREMENTS}
