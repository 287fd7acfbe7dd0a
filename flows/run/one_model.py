"""One model made smaller without a configuration file: the run behind `lmq quantize` and `lmq.quantize`."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from lmq.allocation.budget import Budget, LayoutRange
from lmq.allocation.targets import Target, target_named
from lmq.errors import InputError, LmqError, UnsupportedModel, unknown_name
from lmq.export.check import export_checked
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.companions import companion_files
from lmq.model.directory import complete_directory
from lmq.model.memory import activation_bytes, cache_of
from lmq.model.skeleton import read_model_config
from lmq.model.structure import DTYPE_BYTES, ModelStructure
from lmq.report.results import UNIFORM, VariantResult, full_precision_of, read_results
from lmq.text.calibration import load_tokenizer, text_prefix
from lmq_flows.config.names import slug
from lmq_flows.config.run import RunConfig, parse_run_config
from lmq_flows.run.given_plan import STRATEGY, read_plan
from lmq_flows.run.plan import InspectedModel, inspect_model
from lmq_flows.run.prepare import check_directory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured for one checkpoint: on how many calibration sequences of 512 tokens, with how many draws of
    labels each, whether channels are rescaled first, in how many steps rounding is learned and the result polished, and
    on how many tokens it is judged.
    """

    strategy: str
    sequences: int
    label_draws: int
    equalize: bool = False
    rounding_steps: int = 0
    polish_steps: int = 0
    evaluation_tokens: int


EFFORTS = {
    "quick": Effort(strategy="loss-aware", sequences=16, label_draws=1, evaluation_tokens=2048),
    "normal": Effort(strategy="loss-aware", sequences=32, label_draws=2, evaluation_tokens=8192),
    "best": Effort(
        strategy="auto",
        sequences=32,
        label_draws=4,
        equalize=True,
        rounding_steps=60,
        polish_steps=60,
        evaluation_tokens=16384,
    ),
}

_SEQUENCE_LENGTH = 512
_WINDOW = 1024
_TENSOR_TEXT_BYTES = 420
"""The most that headers, checksums and configuration say of a tensor, beside its name, which is in all three."""
_CARD_BYTES = 32_000
_TENSORS_PER_MODULE = 5
_CONTEXT = 4096
GPU_SET_ASIDE = "set aside for CUDA and fragments (an assumption, not measured)"
GPU_SET_ASIDE_BYTES = 1_000_000_000
_EQUALIZED = {None: "", True: "-equalized", False: "-not-equalized"}
"""What a run is named after that says whether channels are rescaled."""
_FRAME_STYLE = "width: 100%; height: 80vh; border: 0"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for: a model, how small it should be, and where to.

    `size` is that of the whole directory, as in "400 MB", where embedding and head are quantized too; `bits` per weight
    are those of the matrices in the blocks; `plan` is the file or run of `lmq_flows.run.given_plan.read_plan`;
    `fit_gpu` is the memory of a GPU, as in "24GB", that is to hold the checkpoint, as small as a `size`, the cache of
    `context` tokens, as in 32k, and the activations. Exactly one of them is given. Without `fit_gpu`, `context` only
    says for how many tokens the memory is said; where it is None for `_CONTEXT`, or all that the model sees.
    `output` None: a directory named after both, here. `equalize` is that of the run's model; None: as the effort has
    it. `target` is one of `lmq.allocation.targets`: what is planned is what it holds, and the output is an export for
    it; where it takes quantized embeddings, `bits` count them too.
    """

    model: str
    size: str | None = None
    bits: float | None = None
    plan: str | None = None
    fit_gpu: str | None = None
    context: str | None = None
    output: Path | None = None
    effort: str = "normal"
    equalize: bool | None = None
    target: str | None = None
    store: str = "store"
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.size, self.bits, self.plan, self.fit_gpu)) != 1:
            raise InputError(
                "give one of size, bits, plan and fit_gpu: how large the whole checkpoint may be, bits per weight, the "
                "plan of another run, or the memory of a GPU"
            )
        if self.fit_gpu is not None and self.context is None:
            raise InputError(
                "fit_gpu needs context: how many tokens the memory of the GPU is to hold beside, as in 32k"
            )
        if self.effort not in EFFORTS:
            raise unknown_name("effort", self.effort, EFFORTS)
        if self.engine is not None and self.engine.export == "gguf" and self.directory.suffix != ".gguf":
            raise InputError(f"{self.engine.name} opens one file; name it as in {self.title}.gguf, not {self.output}")
        for size in (self.size, self.fit_gpu):
            if size is not None and Budget.parse(size).size_bytes is None:
                raise InputError(f"the size {size!r} is not a number of bytes; write it as in 400MB, 1.2GB or 900MiB")
        check_directory(self.directory.parent, "output")
        if self.directory.exists():
            raise InputError(f"{self.directory} exists already; remove it, or choose another place")

    @property
    def engine(self) -> Target | None:
        """The target. Raises InputError for an unknown one."""
        return None if self.target is None else target_named(self.target)

    @property
    def name(self) -> str:
        """Short name of the model."""
        return slug(Path(self.model.partition("@")[0]).stem) or "model"

    @property
    def title(self) -> str:
        """`smollm2-400mb`: the model and how small, and what for."""
        return self._how_small if self.target is None else f"{self._how_small}-for-{slug(self.target)}"

    @property
    def _how_small(self) -> str:
        if self.plan is not None:
            return slug(f"{self.name}-by-{Path(self.plan).stem}")
        if self.fit_gpu is not None:
            return slug(f"{self.name}-fit-{self.fit_gpu}-{self.context}")
        return slug(f"{self.name}-{self.size}" if self.size else f"{self.name}-{self.bits:g}-bits")

    @property
    def directory(self) -> Path:
        """Where the checkpoint goes."""
        if self.output is not None:
            return self.output
        one_file = self.engine is not None and self.engine.export == "gguf"
        return Path(f"{self.title}.gguf" if one_file else self.title)


@dataclass(frozen=True, kw_only=True)
class PreparedGoal:
    """A goal with the run that reaches it by a `strategy`.

    `beside_bytes` are those of the checkpoint beside its quantized matrices. `beside_in_memory` names what a program
    that runs it holds beside the checkpoint, with the bytes of each; empty where they do not follow from the model's
    configuration. `gpu_left` are the bytes that a GPU has left for the checkpoint; None where none was named.
    """

    goal: Goal
    strategy: str
    config: RunConfig
    structure: ModelStructure
    model_dir: Path
    beside_bytes: int
    beside_in_memory: Mapping[str, int]
    gpu_left: int | None = None

    @property
    def matrices_bytes(self) -> int:
        """The most that the quantized matrices may take, in the target's file."""
        (budget,) = self.config.budgets
        return Budget.parse(budget).resolve(self.structure, self.goal.engine)


@dataclass(frozen=True, kw_only=True)
class MadeModel:
    """A checkpoint with how it was judged, beside full precision and uniform bits of the same size.

    `checkpoint` is that of the run; `path` is a copy of it, or the export for a target.
    `uniform` is None where no one configuration for all matrices is that small.
    """

    path: Path
    checkpoint: Path
    size_bytes: int
    result: VariantResult
    full_precision: VariantResult
    uniform: VariantResult | None


MENU = tuple(
    QuantSpec(bits, group_size)
    for bits, group_sizes in {2: (128, 64), 3: (128, 64, 32), 4: (128, 64, 32), 5: (64,), 6: (64,), 8: (64,)}.items()
    for group_size in group_sizes
)
"""What `lmq quantize` chooses from, by size. Above 4 bits, plans rarely take a second group size."""

_PATH: Any = type(Path())


class CheckpointPath(_PATH):
    """Path of a checkpoint that notebooks show with the `report` of its run; else a path like any other."""

    report: Path | None = None

    def _repr_html_(self) -> str | None:
        """The path and the report in a frame of its own, whose style and scripts leave the notebook alone."""
        if self.report is None or not self.report.is_file():
            return None
        page = escape(self.report.read_text("utf-8"))
        return f'<p><code>{escape(str(self))}</code></p><iframe srcdoc="{page}" style="{_FRAME_STYLE}"></iframe>'


def prepare_goal(goal: Goal) -> PreparedGoal:
    """Look at the model, reading no weights (a GGUF file is converted), and plan the run.

    Raises InputError for a model that is not there, for a size below the smallest or not below the model's own, and for
    the plan of a model of another structure.
    """
    effort = EFFORTS[goal.effort]
    plan = None if goal.plan is None else read_plan(goal.plan, goal.runs_dir)
    dtype = "float16" if goal.model.endswith(".gguf") else "exact"
    engine = goal.engine
    of_all = goal.size is not None or goal.fit_gpu is not None
    around = (
        of_all or (plan is not None and plan.has_embeddings)
        if engine is None or plan is not None
        else engine.embeddings
    )
    inspected = _inspect(goal, dtype, embeddings=around)
    if inspected.structure.sees_images:
        raise InputError(
            f"{goal.model} sees images, of which `lmq quantize` has none to measure on; name them in the section "
            "`images` of a run's configuration, and use `lmq run`"
        )
    beside_bytes = _beside_bytes(inspected)
    known = MENU if engine is None else engine.usual_menu(inspected.structure.quantized)
    sizes = LayoutRange.of(inspected.structure.quantized, known, "paper", target=engine)
    menu = set(sizes.uniform_bytes)
    beside_in_memory = _beside_in_memory(goal, inspected)
    gpu_left = _gpu_left(goal, inspected.structure, beside_in_memory)
    if plan is None:
        asked = goal if gpu_left is None else replace(goal, size=f"{gpu_left}B", fit_gpu=None)
        budget = _budget(asked, inspected.structure, sizes, beside_bytes)
    else:
        plan_bytes = plan.size_bytes(inspected.structure, engine)
        budget = f"{plan_bytes} B"
        uniform, _ = sizes.uniform_around(plan_bytes)
        menu = {*plan.specs.values(), *([] if uniform is None else [uniform])}
    strategy = effort.strategy if plan is None else STRATEGY
    equalize = (effort.equalize and plan is None) if goal.equalize is None else goal.equalize
    config = parse_run_config(
        {
            "name": f"{goal.title}-{goal.effort}{_EQUALIZED[goal.equalize]}",
            "models": [{"name": goal.name, "source": goal.model, "dtype": dtype, "equalize": equalize}],
            "strategies": [{"name": UNIFORM, "tuned": False}, strategy],
            "budgets": [budget],
            "embeddings": bool(inspected.structure.embeddings),
            "measure": {
                "menu": [spec.name for spec in sorted(menu, key=lambda spec: spec.bits_per_weight)],
                "label_draws": effort.label_draws,
            },
            "constraints": {"fixed": plan.fixed} if plan is not None else {},
            "target": goal.target,
            "learned_rounding": {"steps": effort.rounding_steps} if effort.rounding_steps else None,
            "polish": {"steps": effort.polish_steps} if effort.polish_steps and not _has_types(menu) else None,
            "store": goal.store,
            "runs_dir": goal.runs_dir,
            "runner": {"workers": 2, "threads_per_worker": max(1, (os.cpu_count() or 1) // 2)},
            **_texts(effort, inspected.model_dir),
        }
    )
    return PreparedGoal(
        goal=goal,
        strategy=strategy,
        config=config,
        structure=inspected.structure,
        model_dir=inspected.model_dir,
        beside_bytes=beside_bytes,
        beside_in_memory=beside_in_memory,
        gpu_left=gpu_left,
    )


def _has_types(menu: Iterable[QuantSpec]) -> bool:
    """Whether grids of a type of GGUF are among them, which polish does not tune."""
    return any(spec.gguf is not None for spec in menu)


def _export(checkpoint: Path, path: Path, format_name: str) -> None:
    """Write an export and compare it with the checkpoint. Raises LmqError where it is not the same."""
    report, check = export_checked(QuantizedCheckpoint(checkpoint), path, format_name, {})
    if not check.passed:
        raise LmqError(f"{report.path} is not what {checkpoint} computes: {'; '.join(check.failures)}")


def _beside_in_memory(goal: Goal, inspected: InspectedModel) -> dict[str, int]:
    """What is in memory beside the checkpoint while it runs, in bytes. Raises InputError for a context it cannot have.

    Empty where no context was asked for and the cache does not follow from the configuration.
    """
    structure, config = inspected.structure, read_model_config(inspected.model_dir)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    tokens = min(_CONTEXT, positions) if goal.context is None else _tokens(goal.context)
    number_bytes = DTYPE_BYTES[structure.dtype]
    try:
        cache = cache_of(config, tokens, number_bytes)
    except InputError:
        if goal.context is not None:
            raise
        return {}
    largest = max(info.parameters for info in structure.modules)
    return {
        str(cache): cache.size_bytes,
        f"activations of {tokens:,} tokens at once (estimated)": activation_bytes(config, tokens, number_bytes),
        "the largest matrix, unpacked": largest * number_bytes,
    }


def _gpu_left(goal: Goal, structure: ModelStructure, beside: Mapping[str, int]) -> int | None:
    """Bytes that the memory of a GPU has left for the checkpoint, None where none was named. Raises InputError."""
    if goal.fit_gpu is None:
        return None
    memory = Budget.parse(goal.fit_gpu).size_bytes
    assert memory is not None
    taken = {GPU_SET_ASIDE: GPU_SET_ASIDE_BYTES, **beside}
    left = memory - sum(taken.values())
    if left <= 0:
        named = "; ".join(f"{_megabytes(size)} {what}" for what, size in taken.items())
        raise InputError(
            f"nothing of {goal.fit_gpu} is left for {goal.model}: {named}; give more memory or a shorter context"
        )
    own = structure.source_bytes + structure.other_bytes
    if own <= left:
        raise InputError(
            f"{goal.model} takes {_megabytes(own)} and fits as it is: {_megabytes(left)} of {goal.fit_gpu} are "
            f"left for it beside {goal.context} tokens; it need not be quantized"
        )
    return left


def _tokens(context: str) -> int:
    """Tokens of `32k` (times 1,024) or `32768`. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+)\s*(k?)", context.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise InputError(f"context = {context!r} is not a number of tokens; write it as in 32k or 32768")
    return int(match[1]) * (1024 if match[2] else 1)


def _inspect(goal: Goal, dtype: str, *, embeddings: bool) -> InspectedModel:
    """The model, with its embeddings where they are to be quantized and can be."""
    if embeddings:
        try:
            return inspect_model(goal.model, goal.store, dtype, embeddings=True)
        except UnsupportedModel as error:
            _log.info("embeddings and head stay as they are: %s", error)
    return inspect_model(goal.model, goal.store, dtype)


def _texts(effort: Effort, model_dir: Path) -> dict[str, Any]:
    """Texts of the run, within what the model sees at once."""
    positions = getattr(read_model_config(model_dir).get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else _WINDOW
    window = min(_WINDOW, most - len(text_prefix(load_tokenizer(model_dir))))
    return {
        "calibration": {"sequences": effort.sequences, "sequence_length": min(_SEQUENCE_LENGTH, most)},
        "evaluation": {"tokens": effort.evaluation_tokens, "window": window, "stride": max(1, window // 2)},
    }


def _budget(goal: Goal, structure: ModelStructure, sizes: LayoutRange, beside_bytes: int) -> str:
    """The budget of the quantized matrices. Raises InputError for a size that cannot be, naming those that can."""
    if goal.size is None:
        budget = f"{goal.bits:g}"
        if Budget.parse(budget).resolve(structure, goal.engine) < sizes.smallest_bytes:
            least = 8 * sizes.smallest_bytes / structure.parameters
            raise InputError(f"{goal.bits:g} bits per weight are too few; the fewest for {goal.model} are {least:.3f}")
        return budget
    size_bytes = Budget.parse(goal.size).size_bytes
    assert size_bytes is not None
    smallest = beside_bytes + sizes.smallest_bytes
    kept = "norms and the like" if structure.embeddings else "embeddings, head and norms"
    if size_bytes < smallest:
        raise InputError(
            f"{goal.size} is too small for {goal.model}: the smallest checkpoint takes {_megabytes(smallest)}, of "
            f"which {_megabytes(structure.other_bytes)} are {kept}, which are not quantized"
        )
    own = structure.source_bytes + structure.other_bytes
    if size_bytes >= own:
        raise InputError(f"{goal.model} takes {_megabytes(own)} as it is; give a size below that")
    return f"{size_bytes - beside_bytes} B"


def _megabytes(size_bytes: int) -> str:
    """Whole kilobytes, rounded up, so that a size given back is enough."""
    return f"{-(-size_bytes // 1000) / 1000:,.3f} MB"


def _beside_bytes(inspected: InspectedModel) -> int:
    """Bytes of a checkpoint beside its quantized matrices, at most: other weights, tokenizer, headers, checksums."""
    structure = inspected.structure
    texts = sum(
        _TENSORS_PER_MODULE * (_TENSOR_TEXT_BYTES + 3 * len(structure.path(info.id))) for info in structure.quantized
    )
    companions = sum(path.stat().st_size for path in companion_files(inspected.model_dir))
    return structure.other_bytes + companions + texts + _CARD_BYTES


def reach_in_notebook(goal: Goal) -> CheckpointPath:
    """The checkpoint of a goal, as a path that shows its report in a notebook. Raises as `reach_goal`."""
    prepared = prepare_goal(goal)
    path = CheckpointPath(reach_goal(prepared).path)
    path.report = (prepared.config.run_dir / "report.html").absolute()
    return path


def reach_goal(prepared: PreparedGoal) -> MadeModel:
    """Run, on the server that Prefect is set to (else one of its own), and put the checkpoint where it was asked for.

    What is finished is kept: the same goal again goes on. Raises what stopped the run.
    """
    from lmq_flows.run.quantize import SOME_VARIANTS_FAILED, raise_failure, run

    goal, config = prepared.goal, prepared.config
    state = run(config)
    if not state.is_completed() and state.name != SOME_VARIANTS_FAILED:
        raise_failure(state)
    results = read_results(config.run_dir / "results.json")
    chosen = next(item for item in results if item.strategy == prepared.strategy)
    full_precision = full_precision_of(goal.name, results)
    if chosen.error or chosen.checkpoint is None or full_precision is None:
        raise LmqError(chosen.error or f"no checkpoint came of the run; see {config.run_dir / 'report.html'}")
    checkpoint = config.run_dir / chosen.checkpoint
    if goal.engine is not None:
        _export(checkpoint, goal.directory, goal.engine.export)
    else:
        with complete_directory(goal.directory) as directory:
            shutil.copytree(checkpoint, directory, dirs_exist_ok=True)
            for path in directory.iterdir():
                path.chmod(0o644)
    files = [goal.directory, *goal.directory.rglob("*")]
    return MadeModel(
        path=goal.directory,
        checkpoint=checkpoint,
        size_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        result=chosen,
        full_precision=full_precision,
        uniform=next((item for item in results if item.strategy == UNIFORM and not item.error), None),
    )
