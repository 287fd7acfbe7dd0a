"""One task per stage: open inputs from the store, call the library, publish the output."""

from lmq_tasks import (
    evaluation,
    importance,
    measure,
    models,
    performance,
    planning,
    quantization,
    refining,
    reporting,
    states,
    texts,
    zero_shot,
)
from lmq_tasks.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        models.convert_model,
        models.discover_structure,
        texts.draw_calibration,
        texts.draw_evaluation,
        states.embed,
        states.forward,
        states.loss_gradient,
        states.backward,
        states.sampled_gradient,
        states.sampled_backward,
        measure.measure_second_moments,
        measure.make_grids,
        *measure.MEASUREMENT_STAGES.values(),
        measure.measure_delta_loss,
        measure.find_outliers,
        importance.join_layer_importance,
        importance.measure_removal_importance,
        planning.allocate,
        refining.refine,
        quantization.quantize,
        quantization.checkpoint,
        evaluation.reference,
        evaluation.evaluate,
        evaluation.evaluate_without_layers,
        evaluation.evaluate_rounded,
        evaluation.evaluate_other,
        performance.performance,
        zero_shot.zero_shot,
        reporting.report,
    )
}
"""Every stage by name."""
