"""Results of a run: one record per variant, its file `results.json`, and how its figures are written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lmq.errors import InputError, NotFiniteError, unknown_name
from lmq.evaluation.task_scores import TaskScore, task_scores_from_json

FULL_PRECISION = "full-precision"
"""Strategy name of the unquantized model."""
UNIFORM = "uniform"
"""Strategy name of one configuration for every module."""
NOT_MEASURED = "–"


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """What one variant (model × strategy × budget) cost and how good it is; None is "not measured", never 0.

    `quantizer` names what found the codes, None for full precision and for what another program made.
    `budget` is the text as written, such as `uniform b4g64`, None for full precision. `size_bytes` counts the
    quantized modules as stored, `checkpoint_bytes` its directory but for the model card. `perplexity` and
    `kl_divergence` (nats per token, to full precision) carry standard errors, `kl_p99` is the 99th percentile over
    tokens; `top1_agreement` is a share in 0..1; `tokens` were scored in `seconds`, in windows that `protocol` names.
    `objective`, `lower_bound` and `gap` are the solver's. A strategy that tries allocations on the model (auto) has
    their divergence on the validation slice of the calibration text, its own and that of uniform at the same budget.
    `error` is the message of a variant that failed.

    `predicted_bytes` is what the weights take by the plan, unquantized tensors included. Memory and speed are of a
    process of its own that opens the variant and generates: what the opened model adds to it (`memory_resident_bytes`),
    the most it adds while it generates (`peak_generation_bytes`), and tokens per second; `performance_host` says on
    what. `tasks` are zero-shot scores. Raises NotFiniteError for NaN or infinity.
    """

    model: str
    strategy: str
    quantizer: str | None = None
    budget: str | None = None
    budget_bytes: int | None = None
    size_bytes: int | None = None
    checkpoint_bytes: int | None = None
    bits_per_weight: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    kl_divergence: float | None = None
    kl_divergence_stderr: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    protocol: str | None = None
    tokens: int | None = None
    seconds: float | None = None
    checkpoint: str | None = None
    objective: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    validation_divergence: float | None = None
    uniform_validation_divergence: float | None = None
    predicted_bytes: int | None = None
    memory_resident_bytes: int | None = None
    peak_generation_bytes: int | None = None
    prompt_tokens_per_second: float | None = None
    generation_tokens_per_second: float | None = None
    performance_host: str | None = None
    tasks: tuple[TaskScore, ...] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFiniteError(
                    f"{name} of {self.model} {self.label} is {value}; "
                    "record None for what could not be measured and say why in `error`"
                )

    @property
    def unused_bytes(self) -> int | None:
        """Bytes of the budget that are left over, below 0 where the variant is larger than its budget."""
        if self.budget_bytes is None or self.size_bytes is None:
            return None
        return self.budget_bytes - self.size_bytes

    @property
    def label(self) -> str:
        """Name of the variant within its model: `full-precision`, `uniform b4g64`, `mxq @ uniform b4g64 +2%`."""
        if self.budget is None:
            return self.strategy
        if self.budget.split()[0:1] == [self.strategy]:
            return self.budget
        return f"{self.strategy} @ {self.budget}"


def write_results(path: Path, results: Sequence[VariantResult]) -> None:
    """Write `results.json`: a list with one object per variant, in one step, so that no reader sees half a file."""
    text = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False, allow_nan=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_results(path: Path) -> list[VariantResult]:
    """Read `results.json`. Raises InputError when it is missing, damaged, or written by another version of lmq."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; a run writes it when its first variant is done") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); run again, what is cached is not computed again") from error
    if not isinstance(data, list):
        raise InputError(f"{path} holds a {type(data).__name__} where a list of variants was expected; {_AGAIN}")
    return [_from_json(item, f"variant {index} of {path}") for index, item in enumerate(data)]


def full_precision_of(model: str, results: Sequence[VariantResult]) -> VariantResult | None:
    """The full-precision variant of `model`, if the run has one."""
    return next((r for r in results if r.model == model and r.strategy == FULL_PRECISION), None)


def relative_perplexity(result: VariantResult, results: Sequence[VariantResult]) -> float | None:
    """Perplexity of a variant over that of its model at full precision, minus 1; None where either is missing."""
    reference = full_precision_of(result.model, results)
    if reference is None or reference.perplexity is None or result.perplexity is None:
        return None
    return result.perplexity / reference.perplexity - 1


def format_bytes(size_bytes: int | None) -> str:
    """`1,234.5 MB` (10⁶ bytes); kB below 0.1 MB."""
    if size_bytes is None:
        return NOT_MEASURED
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:,.1f} kB"


def format_difference(size_bytes: int | None) -> str:
    """`564 B`, `−2.282 MB`: whole bytes below 1 kB, else four digits, with a true minus sign."""
    if size_bytes is None:
        return NOT_MEASURED
    unit, divisor = _unit(size_bytes)
    return f"{_four_digits(size_bytes, divisor)} {unit}"


def format_used(used_bytes: int | None, of_bytes: int | None) -> str:
    """`56.40 of 56.46 MB`: both in one unit."""
    if of_bytes is None:
        return NOT_MEASURED
    unit, divisor = _unit(max(of_bytes, used_bytes or 0))
    used = NOT_MEASURED if used_bytes is None else _four_digits(used_bytes, divisor)
    return f"{used} of {_four_digits(of_bytes, divisor)} {unit}"


def format_number(value: float | None, decimals: int) -> str:
    """Fixed decimals with thousands separators and a true minus sign."""
    return NOT_MEASURED if value is None else f"{value:,.{decimals}f}".replace("-", "−")


def format_percent(share: float | None, *, signed: bool = False, decimals: int = 1) -> str:
    """`12.3%` from 0.123, with a sign on request."""
    if share is None:
        return NOT_MEASURED
    return f"{share * 100:{'+' if signed else ''},.{decimals}f}%".replace("-", "−")


def format_measured(value: float | None, stderr: float | None, *, decimals: int = 2) -> str:
    """`35.82 ± 0.41`: fewer decimals for large values, more where the standard error would round to 0."""
    if value is None:
        return NOT_MEASURED
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    shown = max(0, decimals - (abs(value) >= 100) - (abs(value) >= 1000))
    if stderr is None:
        return format_number(value, shown)
    if stderr > 0:
        shown = max(shown, min(6, -math.floor(math.log10(stderr))))
    return f"{format_number(value, shown)} ± {format_number(stderr, shown)}"


_AGAIN = "another version of lmq may have written it: run again with this one"
_ALLOWED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}
_FIELD_TYPES = {field.name: str(field.type) for field in fields(VariantResult)}
_LATER_FIELDS = (
    "quantizer",
    "predicted_bytes",
    "memory_resident_bytes",
    "peak_generation_bytes",
    "prompt_tokens_per_second",
    "generation_tokens_per_second",
    "performance_host",
    "tasks",
)
"""What results of earlier versions lack; there it was not measured."""


def _from_json(item: object, where: str) -> VariantResult:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is {item!r} where an object was expected; {_AGAIN}")
    for key in item:
        if key not in _FIELD_TYPES:
            raise InputError(f"{where}: {unknown_name('key', str(key), _FIELD_TYPES)}; {_AGAIN}")
    missing = [name for name in _FIELD_TYPES if name not in item and name not in _LATER_FIELDS]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}; {_AGAIN}")
    return VariantResult(**{name: _checked(item.get(name), name, where) for name in _FIELD_TYPES})


def _checked(value: Any, name: str, where: str) -> Any:
    expected = _FIELD_TYPES[name]
    if name == "tasks":
        try:
            return None if value is None else task_scores_from_json(value)
        except InputError as error:
            raise InputError(f"{where}: tasks: {error}; {_AGAIN}") from error
    if isinstance(value, bool) or not isinstance(value, _ALLOWED[expected]):
        raise InputError(f"{where}: {name} = {value!r} is not {expected.replace('None', 'null')}; {_AGAIN}")
    return value


def _unit(size_bytes: int) -> tuple[str, int]:
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next(((unit, divisor) for unit, divisor in units if abs(size_bytes) >= divisor), ("B", 1))


def _four_digits(size_bytes: int, divisor: int) -> str:
    text = str(size_bytes) if divisor == 1 else f"{size_bytes / divisor:#,.4g}".removesuffix(".")
    return text.replace("-", "−")
