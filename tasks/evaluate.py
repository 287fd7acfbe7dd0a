"""Stages that evaluate: perplexity and divergence of every variant, its memory and speed, its zero-shot scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lmq.checkpoint.open import QuantizedBlocks, open_model_directory
from lmq.evaluation.baselines import RoundedBaseline
from lmq.evaluation.performance import measure_performance
from lmq.evaluation.perplexity import Window, full_windows
from lmq.evaluation.predictions import PREDICTIONS_SCHEMA, score_images, summarize_predictions, with_probe
from lmq.evaluation.similarities import IMAGES, TEXTS, Prompts
from lmq.evaluation.whole_model import reference_logits, require_same_model, score_whole_model, stored_bytes
from lmq.evaluation.windows import (
    WINDOWS_SCHEMA,
    BlockPreparation,
    last_states,
    score_windows,
    summarize,
    window_tokens,
)
from lmq.evaluation.zero_shot import load_task, measure_task
from lmq.measurement.replay import read_hidden_states, write_hidden_states
from lmq.model.streaming import StreamedModel
from lmq.tables import TableSchema, read_rows, write_rows
from lmq.text.calibration import load_tokenizer, read_tokens
from lmq_tasks.inputs import TOKENS_FILE, materialized, model_dir, open_model, read_examples, read_structure
from lmq_tasks.sources import CLASSES_FILE, PREFIX_FILE
from lmq_tasks.stage import Job, JsonDict, stage
from lmq_tasks.states import HIDDEN_STATES_FILE

WINDOWS_FILE = "windows.parquet"
PREDICTIONS_FILE = "predictions.parquet"
SIZE_FILE = "size.json"
"""What a baseline takes: size_bytes of its matrices, and checkpoint_bytes of its files or null."""


def judged(path: Callable[[str], Path]) -> str:
    """`perplexity 14.04, KL 0.149`: what the windows of an evaluation come to."""
    found = summarize(read_rows(path(WINDOWS_FILE), WINDOWS_SCHEMA))
    divergence = "" if found.kl_divergence is None else f", KL {found.kl_divergence.value:.3f}"
    return f"perplexity {found.perplexity.value:.2f}{divergence}"


def judged_images(path: Callable[[str], Path]) -> str:
    """`top-1 94.1%, KL 0.149`: what the predictions of an evaluation come to."""
    found = summarize_predictions(read_rows(path(PREDICTIONS_FILE), PREDICTIONS_SCHEMA))
    accuracy = [f"{score.task} {100 * (score.value or 0):.1f}%" for score in found.scores[:1]]
    divergence = [] if found.kl_divergence is None else [f"KL {found.kl_divergence.value:.3f}"]
    return ", ".join(accuracy + divergence) or found.protocol


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How variants are judged: what they are shown, and the rows of the table that says what they made of it.

    `inputs` are what is shown, each with the tower that it is shown to. `score` takes the model, the states that leave
    the last block for each of these, those of the full-precision model or None, and that model.
    """

    inputs: Sequence[tuple[int, Tensor]]
    file: str
    schema: TableSchema
    score: Callable[[StreamedModel, Sequence[Tensor], Sequence[Tensor] | None, StreamedModel], list[JsonDict]]


@stage("reference", version=3, schema="reference/1", result=judged)
def reference(job: Job) -> None:
    """Perplexity of the full-precision model, and the states its predictions follow from."""
    _evaluate(job, _of_text(job))


@stage("reference-images", version=3, schema="reference-images/1", result=judged_images)
def reference_images(job: Job) -> None:
    """Accuracies of the full-precision model on images, and the states its predictions follow from."""
    _evaluate(job, _of_images(job))


@stage("evaluate", version=3, schema=WINDOWS_SCHEMA.label, result=judged)
def evaluate(job: Job) -> None:
    """Perplexity of a variant, and its divergence from the full-precision model."""
    _evaluate(job, _of_text(job))


@stage("evaluate-images", version=3, schema=PREDICTIONS_SCHEMA.label, result=judged_images)
def evaluate_images(job: Job) -> None:
    """Accuracies of a variant on images, and its divergence from the full-precision model."""
    _evaluate(job, _of_images(job))


@stage("evaluate-without-layers", version=3, schema=WINDOWS_SCHEMA.label, result=judged)
def evaluate_without_layers(job: Job) -> None:
    """Perplexity of the full-precision model without the layers `removed`, of which no checkpoint is written."""
    model = open_model(job)
    windows, tokens = _windows(job)
    states = last_states(model, tokens, skipped_layers=job.config["removed"])
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, score_windows(model, windows, tokens, states, None))


@stage("evaluate-rounded", version=2, schema=WINDOWS_SCHEMA.label, result=judged)
def evaluate_rounded(job: Job) -> None:
    """Perplexity and divergence of a baseline that rounds every matrix alike, of which no checkpoint is written."""
    _evaluate_rounded(job, _of_text(job))


@stage("evaluate-rounded-images", version=3, schema=PREDICTIONS_SCHEMA.label, result=judged_images)
def evaluate_rounded_images(job: Job) -> None:
    """Accuracies and divergence on images of a baseline that rounds every matrix alike."""
    _evaluate_rounded(job, _of_images(job))


def _evaluate_rounded(job: Job, judge: Judge) -> None:
    baseline = RoundedBaseline.parse(job.config["baseline"])
    model = open_model(job)
    baseline.check_fits(model.structure)
    states = _last_states(model, judge, baseline.preparation(model.structure))
    write_rows(job.output / judge.file, judge.schema, judge.score(model, states, _reference(job, judge), model))
    _write_size(job, baseline.size_bytes(model.structure), None)


@stage("evaluate-other", version=3, schema=WINDOWS_SCHEMA.label, result=judged)
def evaluate_other(job: Job) -> None:
    """Perplexity and divergence of a checkpoint that another program made of the model, opened whole."""
    path = Path(job.site.places["checkpoint"])
    full = open_model(job)
    require_same_model(path, model_dir(job), full.structure)
    windows, tokens = _windows(job)
    states = read_hidden_states(job.input("reference", HIDDEN_STATES_FILE))
    model = open_model_directory(path, dtype=torch.float32, device=job.device, dense=True)
    rows = score_whole_model(model, windows, tokens, reference_logits(full, states))
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, rows)
    _write_size(job, *stored_bytes(path, full.structure))


def _write_size(job: Job, size_bytes: int, checkpoint_bytes: int | None) -> None:
    (job.output / SIZE_FILE).write_text(json.dumps({"size_bytes": size_bytes, "checkpoint_bytes": checkpoint_bytes}))


def _windows(job: Job) -> tuple[list[Window], Tensor]:
    """The windows of the evaluation tokens, and what the model sees in each."""
    stream = read_tokens(job.input("tokens", TOKENS_FILE))[0]
    prefix = json.loads(job.input("tokens", PREFIX_FILE).read_text())
    windows = full_windows(stream.numel(), job.config["window"], job.config["stride"])
    return windows, window_tokens(stream, windows, prefix)


def _of_text(job: Job) -> Judge:
    windows, tokens = _windows(job)

    def score(
        model: StreamedModel,
        states: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
        reference_model: StreamedModel,
    ) -> list[JsonDict]:
        full = None if reference is None else reference[0]
        return score_windows(model, windows, tokens, states[0], full, reference_model=reference_model)

    return Judge(inputs=[(0, tokens)], file=WINDOWS_FILE, schema=WINDOWS_SCHEMA, score=score)


def _of_images(job: Job) -> Judge:
    examples = read_examples(job)
    prompts = None
    probe = read_examples(job, "probe") if job.has("probe") else None
    if job.has("prompts"):
        classes = json.loads(job.input("prompts", CLASSES_FILE).read_text())
        prompts = Prompts(read_examples(job, "prompts").inputs, len(classes))

    def score(
        model: StreamedModel,
        states: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
        reference_model: StreamedModel,
    ) -> list[JsonDict]:
        of_texts = None
        if prompts is not None:
            of_texts = states[TEXTS], None if reference is None else reference[TEXTS]
        rows = score_images(
            model,
            examples.labels,
            states[IMAGES],
            None if reference is None else reference[IMAGES],
            reference_model=reference_model,
            prompts=prompts,
            text_states=of_texts,
        )
        if probe is None or examples.labels is None:
            return rows
        return with_probe(rows, model, states[IMAGES], examples.labels, states[-1], probe.given)

    inputs = [(IMAGES, examples.inputs)]
    inputs += [] if prompts is None else [(TEXTS, prompts.token_ids)]
    inputs += [] if probe is None else [(IMAGES, probe.inputs)]
    return Judge(inputs=inputs, file=PREDICTIONS_FILE, schema=PREDICTIONS_SCHEMA, score=score)


def _states_file(number: int) -> str:
    return HIDDEN_STATES_FILE if number == 0 else f"hidden-states-{number}.parquet"


def _last_states(model: StreamedModel, judge: Judge, prepare: BlockPreparation | None) -> list[Tensor]:
    """States that leave the last block for all that is shown."""
    return [last_states(model, inputs, prepare, tower=tower) for tower, inputs in judge.inputs]


def _reference(job: Job, judge: Judge) -> list[Tensor]:
    """Those of the full-precision model."""
    return [read_hidden_states(job.input("reference", _states_file(number))) for number in range(len(judge.inputs))]


def _evaluate(job: Job, judge: Judge) -> None:
    model = open_model(job)
    if not job.has("checkpoint"):
        states = _last_states(model, judge, _counting(job, model))
        rows = judge.score(model, states, None, model)
        for number, leaving in enumerate(states):
            write_hidden_states(job.output / _states_file(number), leaving)
    else:
        quantized = QuantizedBlocks(materialized(job, "checkpoint"), model.structure)
        judged_model = model
        if quantized.embeddings:
            judged_model = StreamedModel.open(model_dir(job), model.structure, device=job.device)
            quantized.put_around(judged_model)
        states = _last_states(judged_model, judge, _counting(job, model, quantized.put_in))
        rows = judge.score(judged_model, states, _reference(job, judge), model)
    write_rows(job.output / judge.file, judge.schema, rows)


def _counting(job: Job, model: StreamedModel, prepare: BlockPreparation | None = None) -> BlockPreparation:
    """Prepare blocks and say how far the evaluation is: scoring takes two products with the head."""
    structure = model.structure
    in_blocks = sum(module.parameters for module in structure.modules)
    in_scoring = 2 * structure.hidden_size * structure.vocabulary_size
    share = in_blocks / (in_blocks + in_scoring)

    def prepared(block: nn.Module, layer: int) -> None:
        job.advance(share * layer / structure.layers)
        if prepare is not None:
            prepare(block, layer)

    return prepared


PERFORMANCE_FILE = "performance.json"


@stage("performance", version=1, schema="performance/1")
def performance(job: Job) -> None:
    """Memory after opening and while generating, and tokens per second, in a process of its own."""
    measured = measure_performance(
        variant_dir(job),
        prompt_tokens=job.config["prompt_tokens"],
        generated_tokens=job.config["generated_tokens"],
        device=job.site.device,
        threads=job.site.threads_per_worker,
    )
    (job.output / PERFORMANCE_FILE).write_text(json.dumps(asdict(measured)))


def variant_dir(job: Job) -> Path:
    """Directory of the variant: a checkpoint of lmq, one of another program, or the unquantized model."""
    if job.has("checkpoint"):
        return materialized(job, "checkpoint")
    if "checkpoint" in job.site.places:
        return Path(job.site.places["checkpoint"])
    return model_dir(job)


SCORES_FILE = "scores.json"


@stage("zero-shot", version=1, schema="task-scores/1")
def zero_shot(job: Job) -> None:
    """Accuracies of a variant on one task, with their standard errors.

    The questions are looked for before the model is opened. A task without them fails and is not kept, so that it is
    asked again once they are there.
    """
    task = load_task(job.site.places.get("task", job.config["task"]))
    dtype = torch.float32 if job.device.type == "cpu" else None
    model = open_model_directory(variant_dir(job), dtype=dtype, device=job.device, dense=True)
    if "baseline" in job.config:
        RoundedBaseline.parse(job.config["baseline"]).round_model(model, read_structure(job))
    scores = measure_task(model, load_tokenizer(model_dir(job)), task, limit=job.config["limit"])
    (job.output / SCORES_FILE).write_text(json.dumps([asdict(score) for score in scores]))
