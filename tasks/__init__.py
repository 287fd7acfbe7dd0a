"""One task per stage: open inputs from the store, call the library, publish the output."""

from lmq_tasks import (
    capture,
    delta_loss,
    evaluation,
    importance,
    models,
    module_divergence,
    planning,
    quantization,
    refining,
    reporting,
    second_moments,
    sequence_fisher,
    signals,
    super_weights,
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
        second_moments.measure_module_errors,
        delta_loss.measure_delta_loss,
        super_weights.find_super_weights,
        importance.measure_layer_activity,
        importance.join_layer_importance,
        importance.measure_removal_importance,
        signals.find_outliers,
        planning.allocate,
        refining.refine,
        quantization.quantize,
        quantization.checkpoint,
        evaluation.reference,
        evaluation.evaluate,
        evaluation.evaluate_without_layers,
        reporting.report,
    )
}
"""Every stage by name."""
