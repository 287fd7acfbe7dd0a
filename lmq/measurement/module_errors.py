"""Costs of the errors of a single module, from statistics that serve all its configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lmq.measurement.second_moments import (
    SecondMoments,
    delta_loss,
    fisher_estimate,
    gradient_token_weights,
    mean_squared_gradient,
    row_errors,
    second_moments,
)
from lmq.measurement.token_fisher import ModuleTrace


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientStatistics:
    """What the gradients at a module's outputs add to the second moments of its inputs.

    `weighted` is H̃, `mean_squared` G_oo float64 [out_features], `weight_gradient` ∂L/∂W float32
    [out_features, in_features], summed over the tokens.
    """

    weighted: SecondMoments
    mean_squared: Tensor
    weight_gradient: Tensor


@dataclass(frozen=True, eq=False)
class ModuleStatistics:
    """Second moments of a module's inputs, and statistics of its gradients where these were measured."""

    moments: SecondMoments
    gradients: GradientStatistics | None = None

    def costs(self, error: Tensor) -> dict[str, float | None]:
        """Cost columns of `lmq.measurement.second_moments.MODULE_ERRORS_SCHEMA` for E = Ŵ − W [out_features,
        in_features].

        `delta_loss` takes the gradient at the point where the statistics were measured: at full precision it is a
        first-order stand-in for the gradient at the quantized point.
        """
        by_row = row_errors(self.moments, error)
        input_error = by_row.mean().item()
        if self.gradients is None:
            return {"input_error": input_error, "fisher_diagonal": None, "fisher_weighted": None, "delta_loss": None}
        weighted, mean_squared = self.gradients.weighted, self.gradients.mean_squared
        return {
            "input_error": input_error,
            "fisher_diagonal": fisher_estimate(self.moments, by_row, mean_squared),
            "fisher_weighted": fisher_estimate(weighted, row_errors(weighted, error), mean_squared),
            "delta_loss": delta_loss(self.gradients.weight_gradient, error),
        }


def traced_statistics(traces: Mapping[str, ModuleTrace]) -> Iterator[tuple[str, ModuleStatistics]]:
    """Statistics of every module, kind by kind, from the traces of the text's own loss (one draw).

    Made one after the other, so that one module's gradients are held at a time; modules that share their inputs
    share the second moments. Raises InputError for gradients that are all 0.
    """
    shared: dict[Tensor, SecondMoments] = {}
    for kind, trace in traces.items():
        if trace.inputs not in shared:
            shared = {trace.inputs: second_moments(trace.inputs)}
        gradients = GradientStatistics(
            weighted=second_moments(trace.inputs, gradient_token_weights(trace.gradients)),
            mean_squared=mean_squared_gradient(trace.gradients),
            weight_gradient=trace.gradients.float().t() @ trace.inputs.float(),
        )
        yield kind, ModuleStatistics(shared[trace.inputs], gradients)
