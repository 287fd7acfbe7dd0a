"""Zero-shot tasks through EleutherAI's lm-eval (the extra `lmq[tasks]`): questions with given answers.

A task is one of lm-eval's by name, whose data comes from the hub unless it was fetched before, or a local `.yaml` file
of lm-eval's task format whose data lies beside it:

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: {test: capitals.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"

Data files are looked for beside the YAML file. Python functions (`!function`) are not taken from it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lmq.errors import InputError, LmqError
from lmq.evaluation.task_scores import TaskScore
from lmq.model.source import nearest_sibling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STANDARD_TASKS: Mapping[str, str] = {
    "boolq": "super_glue",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "hellaswag": "hellaswag",
}
"""The tasks that quantization papers print, and the folder of lm-eval each is in; others are looked for in all."""

_FEWSHOT_SEED = 1234
_BOOTSTRAPS = 1000
"""Resamples for metrics whose standard error has no formula; accuracies have one."""


class DataNotAtHand(LmqError):
    """The questions of a task are not on this machine and cannot be fetched."""


def is_local_task(task: str) -> bool:
    """Whether a task is given as a file and not by lm-eval's name."""
    return task.endswith((".yaml", ".yml"))


def task_name(task: str) -> str:
    """What a task is called in tables: lm-eval's name, or the key `task` of a file. Raises InputError."""
    return str(_read_local(Path(task))["task"]) if is_local_task(task) else task


def local_task_files(path: Path) -> list[Path]:
    """The file of a local task and those that hold its data. Raises InputError for one that is missing."""
    return [path, *_data_files(_read_local(path))]


def lm_eval_version() -> str | None:
    """The release of lm-eval, which says what its tasks ask and how they are scored; None where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def load_task(task: str) -> Any:
    """lm-eval's task with its questions.

    Raises InputError for an unknown name, a file that is no task, and where lm-eval is not installed; DataNotAtHand
    where the questions cannot be had.
    """
    config = _read_local(Path(task)) if is_local_task(task) else None
    if config is None and (known := _not_at_hand().get(task)) is not None:
        raise DataNotAtHand(known)
    manager = _task_manager(STANDARD_TASKS.get(task) if config is None else "")
    try:
        loaded = manager.load([config or task])["tasks"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{task!r} is not a task of lm-eval: {error}; see `lm-eval ls tasks`") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"the data of task {task!r} is not at hand ({reason}); fetch it once with a network, or give a file"
        _not_at_hand()[task] = message
        raise DataNotAtHand(message) from None  # `datasets` has tried again and again: no reason to do so once more
    if len(loaded) != 1:
        raise InputError(f"{task!r} is a group of tasks: {', '.join(loaded)}; name those you want")
    return next(iter(loaded.values()))


def measure_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Any, *, limit: int | None = None, batch: int = 8
) -> list[TaskScore]:
    """Scores of a model on a task of `load_task`, one per metric, on its first `limit` questions (None: all).

    No example is shown unless the task itself asks for some. Raises LmqError where lm-eval fails.
    """
    evaluator, wrapper = _lm_eval().evaluator, _language_model()
    try:
        found = evaluator.simple_evaluate(
            model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=[task],
            task_manager=_task_manager(""),
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            random_seed=None,  # the process's generators are not ours to seed
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=_FEWSHOT_SEED,
        )
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise LmqError(f"lm-eval failed on the task {task.task_name}: {error}") from error
    (name, metrics) = next(iter(found["results"].items()))
    return [
        TaskScore(task=name, metric=metric, value=value, stderr=stderr, samples=found["n-samples"][name]["effective"])
        for metric, value, stderr in _metrics(metrics)
    ]


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """lm-eval names a metric `acc,none` (the filter of answers behind the comma), its error `acc_stderr,none`."""
    for key, value in found.items():
        metric, comma, answers = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{answers}")
        shown = metric if answers == "none" else f"{metric} ({answers})"
        yield shown, float(value), float(stderr) if isinstance(stderr, int | float) else None


def _read_local(path: Path) -> dict[str, Any]:
    """Configuration of a local task, its data files made absolute."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no task file {path}{nearest_sibling(path)}") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a task file that can be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise InputError(f"{path} is not a task of lm-eval: it has no key `task` with a name")
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        resolved = _beside(path, options["data_files"])
        config["dataset_kwargs"] = {**options, "data_files": resolved}
    return config


def _beside(path: Path, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(path, item) for split, item in files.items()}
    if isinstance(files, list):
        return [_beside(path, item) for item in files]
    file = (path.parent / Path(str(files)).expanduser()).absolute()
    if not file.is_file():
        raise InputError(f"{path} takes its questions from {file}, which does not exist{nearest_sibling(file)}")
    return str(file)


def _data_files(config: Mapping[str, Any]) -> list[Path]:
    def flat(files: Any) -> list[Path]:
        if isinstance(files, Mapping):
            return [path for item in files.values() for path in flat(item)]
        return [path for item in files for path in flat(item)] if isinstance(files, list) else [Path(files)]

    return flat((config.get("dataset_kwargs") or {}).get("data_files", []))


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(f"zero-shot tasks need lm-eval ({error}); pip install 'lmq[tasks]'") from error
    logger = logging.getLogger("lm_eval")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)  # it warns of what is meant here: a model that is open already
    return lm_eval


@functools.cache
def _task_manager(folder: str | None) -> Any:
    """lm-eval's index of one of its folders: indexing all of them (None) takes half a minute; "" indexes nothing."""
    tasks = _lm_eval().tasks
    if folder is None:
        return tasks.TaskManager()
    include = Path(tasks.__file__).parent / folder if folder else None
    return tasks.TaskManager(include_path=include, include_defaults=False)


@functools.cache
def _language_model() -> Any:
    """lm-eval's wrapper of a transformers model, without its progress bars."""
    from lm_eval.models.huggingface import HFLM

    class QuietLanguageModel(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return QuietLanguageModel


@functools.cache
def _not_at_hand() -> dict[str, str]:
    """Tasks whose data could not be fetched by this process: the hub is not asked again for every variant."""
    return {}
