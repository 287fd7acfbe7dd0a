"""What a run starts from: models identified by content, texts by digest, places made absolute."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.allocation.budget import module_sizes
from lmq.allocation.strategies import TRIALS
from lmq.allocation.targets import target_named
from lmq.errors import InputError, LmqError
from lmq.evaluation.perplexity import full_windows
from lmq.formats.spec import QuantSpec
from lmq.images.pairs import PairDraw, first_pair, sample_pair
from lmq.images.prepared import ImageDraw, check_images, check_probe
from lmq.images.prompts import class_names
from lmq.images.sources import identify_images
from lmq.measurement.base import Need
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.measurement.registry import MEASUREMENTS
from lmq.model.beside import states_beside
from lmq.model.losses import LOSSES
from lmq.model.skeleton import read_model_config
from lmq.model.source import LocatedModel, ModelSource, locate, nearest_sibling, needs_conversion, source_digest
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.transformers_lock import TRANSFORMERS_LOCK
from lmq.text.calibration import (
    PYDOC_TOPICS,
    TextSource,
    documents,
    is_file_text,
    load_tokenizer,
    pack_tokens,
    text_prefix,
    token_stream,
)
from lmq.text.data_sets import PREFIX as DATA_SET
from lmq.text.data_sets import identify_data_set
from lmq.text.files import text_format
from lmq.text.known_texts import KNOWN_TEXTS, known_text_identity
from lmq_flows.config.run import MeasurementRequest
from lmq_flows.config.sections import CalibrationConfig, EvaluationConfig, ImagesConfig, ModelConfig
from lmq_flows.graph.build import PreparedModel, TextIdentity
from lmq_flows.graph.model_nodes import ImageSources
from lmq_flows.graph.node import Graph, Input, Node
from lmq_storage import ArtifactRef, ArtifactStore, canonical_json, file_sha256, text_sha256
from lmq_tasks import STAGES
from lmq_tasks.inputs import located_dir
from lmq_tasks.stage import ModelLocation, Site, open_store, stage_key


def resolve_device(name: str) -> str:
    """`auto` becomes cuda where there is a GPU, else cpu. Raises InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"runner.device = {name!r} is not a device; allowed: auto, cpu, cuda, cuda:0, ...")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise InputError(
            f"runner.device = {name!r}, but there are {torch.cuda.device_count()} usable GPUs here; "
            "set runner.device=auto or cpu"
        )
    return name


def absolute_store_url(url: str) -> str:
    """A directory becomes absolute, so that tasks may run in any working directory; a URL stays."""
    return url if "://" in url else str(Path(url).absolute())


def identify_texts(config: MeasurementRequest) -> dict[str, TextIdentity]:
    """Identity and place of every text of a run. Raises InputError for a file that is missing."""
    texts = {}
    for text in config.texts:
        if text.source.startswith(DATA_SET):
            identity, location = identify_data_set(text.source)
        else:
            is_file = is_file_text(text.source)
            location = str(Path(text.source).expanduser().absolute()) if is_file else text.source
            identity = _content_identity(location)
        texts[text.source] = TextIdentity(identity=identity, location=location)
    return texts


def _content_identity(location: str) -> str:
    """Digest of a text's content; of a text that everybody knows its name, with the commit where that is fixed."""
    if location == PYDOC_TOPICS:
        return f"{PYDOC_TOPICS}:{text_sha256(canonical_json(documents(TextSource(source=location))))}"
    if location in KNOWN_TEXTS:
        return known_text_identity(location)
    path = Path(location)
    if not path.is_file():
        known = ", ".join((PYDOC_TOPICS, *KNOWN_TEXTS))
        raise InputError(
            f"there is no text file {path}{nearest_sibling(path)}; "
            f"pass a .txt, .jsonl or .parquet file, or one of {known}"
        )
    return f"sha256:{file_sha256(path)}{''.join(text_format(path))}"


def check_directory(path: Path, key: str) -> None:
    """Raise InputError naming the key unless `path` is a directory to write in, or can be made one."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"{key}: {there} is a file, not a directory; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {there} cannot be written in; give another place, or change its permissions")


@dataclass(frozen=True, kw_only=True)
class IdentifiedModel:
    """A model that was found, with the digest of its files; nothing was read of its weights yet.

    `shared` is the artifact that holds its files where workers do not see those of this machine.
    """

    config: ModelConfig
    located: LocatedModel
    sha256: str
    shared: ArtifactRef | None = None


def identify_models(config: MeasurementRequest) -> list[IdentifiedModel]:
    """Find every model of a run. Raises InputError for one that is missing or not what was expected."""
    return [identify_model(config, model) for model in config.models]


def identify_model(config: MeasurementRequest, model: ModelConfig) -> IdentifiedModel:
    """Find a model. Raises InputError when it is missing or not what was expected."""
    store = open_store(absolute_store_url(config.store))
    check_directory(store.local_dir, "store")
    located = locate(ModelSource.parse(model.source, model.sha256))
    sha256 = source_digest(located, store.local_dir / "digests.json")
    return IdentifiedModel(config=model, located=located, sha256=sha256)


def preparation_graph(config: MeasurementRequest, models: list[IdentifiedModel]) -> tuple[Graph, dict[str, Node]]:
    """The graph that converts, equalizes and inspects models, and the node of each model's structure by name."""
    graph = Graph()
    store_url = absolute_store_url(config.store)
    store = open_store(store_url)
    threads = config.runner.threads_per_worker
    structures = {}
    for model in models:
        name = model.config.name
        site = Site(store_url=store_url, model=_source_location(model), threads_per_worker=threads)
        inputs: dict[str, Input | list[Input]] = {}
        discover_config: dict[str, Any] = {"weights_sha256": model.sha256}
        if made := _made_first(graph, config, model, site):
            inputs, discover_config = {"model": made}, {}
            key = stage_key(store, made.stage, made.config, {})
            site = replace(site, model=ModelLocation(kind="artifact", place=f"{made.stage.name}/{key}"))
        if config.embeddings:
            discover_config["embeddings"] = True
        if config.modules:
            discover_config["modules"] = list(config.modules)
        structures[name] = graph.add(STAGES["discover"], name, "", site, config=discover_config, inputs=inputs)
    return graph, structures


def _source_location(model: IdentifiedModel) -> ModelLocation:
    if model.shared is not None:
        return ModelLocation(kind="artifact", place=model.shared.uri)
    if model.located.kind == "hub":
        return ModelLocation(kind="hub", place=f"{model.config.source.partition('@')[0]}@{model.located.revision}")
    return ModelLocation(kind="directory", place=str(model.located.path.absolute()))


def _made_first(graph: Graph, config: MeasurementRequest, model: IdentifiedModel, site: Site) -> Node | None:
    """The node that makes the model directory that a run works on, where it is not the source's own."""
    is_file = needs_conversion(model.located)
    conversion = {"dtype": model.config.dtype} if is_file else {}
    if not model.config.equalize:
        if not is_file:
            return None
        convert = {"source_sha256": model.sha256, **conversion}
        return graph.add(STAGES["convert"], model.config.name, "", site, config=convert, here=True)
    text = identify_texts(config)[config.calibration.source]
    drawn = config.calibration.model_dump(include={"column", "part", "seed", "sequences", "sequence_length"})
    return graph.add(
        STAGES["equalize"],
        model.config.name,
        "",
        replace(site, text=text.location, device=resolve_device(config.runner.device)),
        config={"source_sha256": model.sha256, **conversion, "text": text.identity, **drawn},
        here=True,
    )


def prepared_model(
    config: MeasurementRequest, model: ModelConfig, node: Node, structure_ref: ArtifactRef, device: str
) -> PreparedModel:
    """A model whose structure artifact is there, ready for the graph of the run.

    Raises InputError when the configuration of the sensitivity measurement does not fit a module, the target holds
    nothing of the menu, or matrices beside a language model would be measured without an image.
    """
    store = open_store(node.site.store_url)
    structure = read_structure_of(store, structure_ref)
    assert node.site.model is not None
    _check_sensitivity_spec(config, structure)
    if structure.layers_beside:
        _check_beside(config, model.name, structure)
    site = Site(
        store_url=node.site.store_url,
        model=node.site.model,
        device=device,
        threads_per_worker=config.runner.threads_per_worker,
    )
    menu = config.menu_of(model, structure.modules)
    return PreparedModel(
        config=model,
        structure=structure,
        structure_ref=structure_ref,
        site=site,
        menu=menu,
        images=_identified_images(config.images) if structure.sees_images else None,
        pairs=_identified_images(config.images) if config.images.text_column and config.needs_calibration else None,
    )


def _identified_images(images: ImagesConfig) -> ImageSources:
    """What is measured and judged on. Raises InputError for a source that is not there."""
    measured, judged = (identify_images(source) for source in images.sources)
    return ImageSources(
        config=images,
        calibration=TextIdentity(identity=measured[0], location=measured[1]),
        evaluation=TextIdentity(identity=judged[0], location=judged[1]),
    )


def read_structure_of(store: ArtifactStore, structure_ref: ArtifactRef) -> ModelStructure:
    """The structure that an artifact holds."""
    return ModelStructure.from_json(json.loads(store.path(structure_ref, "structure.json").read_text()))


def check_window(model_dir: Path, window: int, key: str) -> None:
    """Raise InputError naming the key when a window is too long, behind what the tokenizer puts in front of a text."""
    check_context(model_dir, window, key, prefix_tokens=len(text_prefix(load_tokenizer(model_dir))))


def check_context(model_dir: Path, tokens: int, key: str, *, prefix_tokens: int = 0) -> None:
    """Raise InputError naming the key when `tokens` at once, behind a prefix, are more than the model's positions."""
    try:
        with TRANSFORMERS_LOCK:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError) as error:
        raise InputError(f"{model_dir}/config.json describes no model that transformers has: {error}") from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and tokens + prefix_tokens > positions > 0:
        behind = f" behind the {prefix_tokens} that its tokenizer puts first" if prefix_tokens else ""
        raise InputError(
            f"{key} = {tokens}{behind} is more than the {positions} tokens that {model_dir} sees at once "
            f"(max_position_embeddings); set it to {positions - prefix_tokens} or less"
        )


def check_texts(config: MeasurementRequest, models: list[PreparedModel]) -> None:
    """Raise InputError for text files that cannot be read, are empty, or hold fewer tokens than are asked for.

    So for images of which there are too few, or whose labels or processor do not suit a model, and for images with text
    that a model cannot be measured on. Data sets of the hub are not fetched for that.
    """
    for model in models:
        if model.images is not None:
            _check_images(config, model, model.images)
        if model.pairs is not None:
            _check_pairs(config, model)
    models = [model for model in models if model.images is None]
    for text in config.texts:
        if text.source != PYDOC_TOPICS and not is_file_text(text.source):
            continue
        source = TextSource(**text.model_dump(include={"source", "column", "part", "seed"}))
        for model in models:
            assert model.site.model is not None
            tokenizer = load_tokenizer(located_dir(open_store(model.site.store_url), model.site.model))
            found = documents(source, tokenizer)
            if isinstance(text, EvaluationConfig):
                tokens = token_stream(found, tokenizer, text.tokens)
                full_windows(len(tokens), text.window, text.stride)
                _check_vocabulary(tokens, model)
            elif isinstance(text, CalibrationConfig) and config.needs_calibration and model.pairs is None:
                sizes = text.model_dump(include={"sequence_length", "seed"})
                tokens = pack_tokens(found, tokenizer, sequences=config.calibration_sequences, **sizes)
                _check_vocabulary(tokens, model)


def _check_images(config: MeasurementRequest, model: PreparedModel, images: ImageSources) -> None:
    extra = config.calibration_sequences - config.calibration.sequences
    measured = images.config.calibration + extra if config.needs_calibration else 1
    counts = (max(measured, images.config.probe or 1), images.config.evaluation)
    if images.config.probe and LOSSES[model.structure.loss].has_classes:
        raise InputError(f"images.probe is for encoders without classes; {model.config.name} has its own: leave it out")
    if images.config.probe and not any(source.startswith(DATA_SET) for source in images.config.sources):
        check_probe(*images.config.sources, images.config.column, images.config.label_column)
    options = images.config.model_dump(include={"column", "label_column", "seed", "unreadable"})
    if len(model.structure.towers) > 1:
        load_tokenizer(_model_dir(model))
        for source in images.config.sources:
            if not source.startswith(DATA_SET):
                class_names(source, images.config.column, images.config.label_column)
    for source, part, count in zip(images.config.sources, images.config.parts, counts, strict=True):
        if not source.startswith(DATA_SET):
            check_images(ImageDraw(source=source, part=part, count=count, **options), _model_dir(model))


def _check_pairs(config: MeasurementRequest, model: PreparedModel) -> None:
    """Refuse images with text of which the first cannot be used; those of data sets are not fetched for that."""
    images = config.images
    assert images.text_column is not None
    if images.source.startswith(DATA_SET):
        return
    draw = PairDraw(
        **images.model_dump(include={"source", "column", "text_column", "seed", "unreadable"}),
        **config.calibration.model_dump(include={"sequences", "sequence_length"}),
    )
    first_pair(draw, _model_dir(model))


def _check_what_pairs_measure(config: MeasurementRequest, model: PreparedModel) -> None:
    """Refuse a model that sees no images beside text, or sees them in a way that is not replayed, and what is measured
    on text alone."""
    if not model.structure.parts_beside:
        raise InputError(
            f"{model.config.name} is no vision-language model, which images.text_column is for; leave it out, and give "
            "vision-language models a run of their own"
        )
    if config.embeddings:
        raise InputError("embeddings = true is measured on text; leave out one of it and images.text_column")
    _check_needs(config, f"{model.config.name} is measured on images with text (images.text_column), on which")
    directory = _model_dir(model)
    streamed, pair = StreamedModel.open(directory, model.structure), sample_pair(directory)
    streamed.check_pair(pair)
    if model.structure.layers_beside:
        with streamed.with_beside():
            states_beside(streamed, pair)


def _check_beside(config: MeasurementRequest, name: str, structure: ModelStructure) -> None:
    """Refuse what is measured on text alone of matrices that images go through, and what is about decoder layers."""
    first = f"modules names {structure.block_path(structure.layers_beside[0])} of {name}"
    if config.needs_calibration and config.images.text_column is None:
        raise InputError(
            f"{first}, which images go through; measure it on images with text (set images.source and "
            "images.text_column), leave it out of modules, or take strategies and a quantizer that need no calibration "
            "(uniform or mxq; hqq or rtn)"
        )
    if LAYER_ACTIVITY.name in config.needs:
        raise InputError(
            f"{first}, where {LAYER_ACTIVITY.name} is about the layers of a language model; leave it out of modules, "
            f"or take out strategies and measurements that need {LAYER_ACTIVITY.name}"
        )


def _check_towers(config: MeasurementRequest, model: PreparedModel) -> None:
    """Refuse what is measured by running a model to its end, which one of two towers is not."""
    _check_needs(config, f"{model.config.name} has {len(model.structure.towers)} towers, of which")


def _check_needs(config: MeasurementRequest, reason: str) -> None:
    """Refuse what runs a model from its inputs to its end."""
    of_whole = {Need.TEXT_GRADIENTS, Need.LAST_STATES, Need.TOKENS}
    whole = {name for name in config.needs if name == TRIALS or MEASUREMENTS[name].needs & of_whole}
    tuning = getattr(config, "tuning", ())
    if whole or tuning:
        raise InputError(
            f"{reason} {min(whole or tuning)} is not measured; take out strategies and measurements that need it "
            "(auto, kl), learned_rounding and polish"
        )


def _model_dir(model: PreparedModel) -> Path:
    assert model.site.model is not None
    return located_dir(open_store(model.site.store_url), model.site.model)


def _check_vocabulary(tokens: Tensor, model: PreparedModel) -> None:
    """Refuse tokens that the model does not know: its tokenizer is another model's."""
    largest, vocabulary = int(tokens.max()), model.structure.vocabulary_size
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer of {model.config.name} gives token {largest}, where its model has a vocabulary of "
            f"{vocabulary}: it is another model's; put the model's own tokenizer beside it"
        )


def _check_sensitivity_spec(config: MeasurementRequest, structure: ModelStructure) -> None:
    if "sensitivity" in config.needs:
        try:
            module_sizes(structure.modules, [QuantSpec.parse(config.measure.sensitivity_spec)])
        except InputError as error:
            raise InputError(f"measure.sensitivity_spec: {error}") from error


def check_context_of(config: MeasurementRequest, model: PreparedModel) -> None:
    """Raise InputError when the model's context does not hold the sequences and windows it would see.

    Of a model that sees images, when it is asked for what language models do; of one that is measured on images with
    text, when that cannot be done.
    """
    if model.pairs is not None:
        _check_what_pairs_measure(config, model)
    if model.images is not None:
        evaluation = getattr(config, "evaluation", None)
        if evaluation is not None and (evaluation.performance or evaluation.tasks):
            raise InputError(
                f"{model.config.name} sees images: evaluation.performance and evaluation.tasks are for language "
                "models; leave them out, and give language models a run of their own"
            )
        if len(model.structure.towers) > 1:
            _check_towers(config, model)
        return
    assert model.site.model is not None
    model_dir = located_dir(open_store(model.site.store_url), model.site.model)
    for text in config.texts:
        if isinstance(text, EvaluationConfig):
            check_window(model_dir, text.window, "evaluation.window")
    if config.needs_calibration:
        check_context(model_dir, config.calibration.sequence_length, "calibration.sequence_length")


def check_target(config: MeasurementRequest, model: PreparedModel) -> None:
    """Raise InputError when the engine that a run is for does not compute such a model."""
    target = getattr(config, "target", None)
    if target is None or target_named(target).export != "gguf":
        return
    from lmq.export.gguf_model import config_problems

    assert model.site.model is not None
    model_dir = located_dir(open_store(model.site.store_url), model.site.model)
    if found := list(config_problems(read_model_config(model_dir))):
        raise InputError(f"{model.config.name} cannot become a file for {target}: {'; '.join(found)}")


def failure_of_all(errors: Sequence[Exception]) -> Exception:
    """The one error, or all of them as one: an InputError when the user can mend every one of them."""
    different = list({str(error): error for error in errors}.values())
    if len(different) == 1:
        return different[0]
    kind = InputError if all(isinstance(error, InputError) for error in different) else LmqError
    return kind("; ".join(str(error) for error in different))
