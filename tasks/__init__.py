"""One task per stage: open inputs from the store, call the library, publish the output."""

from lmq_tasks import (
    capture,
    evaluation,
    models,
    module_divergence,
    planning,
    quantization,
    refining,
    reporting,
    sequence_fisher,
    signals,
    texts,
    weights,
)
from lmq_tasks.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        models.convert_model,
        models.discover_structure,
        texts.draw_calibration,
        texts.draw_evaluation,
        capture.embed,
        capture.forward,
        capture.loss_gradient,
        capture.backward,
        weights.measure_kurtosis,
        weights.measure_frobenius,
        signals.measure_sensitivity,
        signals.measure_fisher,
        sequence_fisher.sampled_gradient,
        sequence_fisher.sampled_backward,
        sequence_fisher.measure_sequence_fisher,
        module_divergence.measure_module_divergence,
        signals.find_outliers,
        planning.allocate,
        refining.refine,
        quantization.quantize,
        quantization.checkpoint,
        evaluation.reference,
        evaluation.evaluate,
        reporting.report,
    )
}
"""Every stage by name."""
