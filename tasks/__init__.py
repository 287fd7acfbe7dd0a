"""One task per stage: open inputs from the store, call the library, publish the output."""

from lmq_tasks import allocate, embeddings, evaluate, importance, measure, quantization, report, sources, states, tuning
from lmq_tasks.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        sources.convert_model,
        sources.equalize_model,
        sources.discover_structure,
        sources.draw_calibration,
        sources.draw_evaluation,
        sources.draw_images,
        sources.draw_pairs,
        sources.write_prompts,
        states.embed,
        states.forward,
        states.loss_gradient,
        states.backward,
        states.sampled_gradient,
        states.sampled_backward,
        states.beside_states,
        states.beside_gradients,
        measure.measure_second_moments,
        measure.make_grids,
        *measure.MEASUREMENT_STAGES.values(),
        measure.measure_delta_loss,
        embeddings.weigh_embeddings,
        embeddings.make_embedding_grids,
        embeddings.measure_embedding_fisher,
        measure.find_outliers,
        importance.join_layer_importance,
        importance.measure_removal_importance,
        allocate.allocate,
        allocate.refine,
        tuning.learned_rounding,
        tuning.learned,
        tuning.last_states,
        tuning.polish,
        tuning.polished,
        quantization.quantize,
        quantization.checkpoint,
        evaluate.reference,
        evaluate.reference_images,
        evaluate.evaluate,
        evaluate.evaluate_images,
        evaluate.evaluate_without_layers,
        evaluate.evaluate_rounded,
        evaluate.evaluate_rounded_images,
        evaluate.evaluate_other,
        evaluate.performance,
        evaluate.zero_shot,
        report.report,
    )
}
"""Every stage by name."""
