"""A plan of another model: which matrix has which configuration, as runs write it beside their report.

The file is a table (`runs/NAME/allocation-*.csv`) with the columns layer, kind, bits and group_size, in any order, and
for types of GGUF meta_bits and meta_group_size; the weights of each matrix (`parameters`) are compared where they are
there, other columns are not looked at.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmq.allocation.budget import module_sizes
from lmq.allocation.constraints import module_name
from lmq.allocation.strategies.plan import Plan
from lmq.allocation.targets import Target
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.model.source import nearest_sibling
from lmq.model.structure import EMBEDDINGS, ModelStructure, ModuleId

STRATEGY = Plan.name
_COLUMNS = ("layer", "kind", "bits", "group_size")
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class GivenPlan:
    """A configuration for every module, and its weights where the file says how many; `path` is the file."""

    path: Path
    specs: Mapping[ModuleId, QuantSpec]
    parameters: Mapping[ModuleId, int]

    @property
    def fixed(self) -> dict[str, str]:
        """The plan as the constraint `fixed` of a run."""
        return {module_name(module): spec.name for module, spec in self.specs.items()}

    @property
    def has_embeddings(self) -> bool:
        """Whether the plan is about input embedding and output head too."""
        return any(module.layer == EMBEDDINGS for module in self.specs)

    def size_bytes(self, structure: ModelStructure, target: Target | None = None) -> int:
        """Bytes of the quantized modules of a model under this plan, in our checkpoint or in a target's file.

        Raises InputError for a model of other modules or shapes, and naming the module that a configuration does not
        fit.
        """
        modules = {info.id: info for info in structure.quantized}
        known = {module: count for module, count in self.parameters.items() if module in modules}
        problems = {
            "the plan lacks": [module for module in modules if module not in self.specs],
            "the model lacks": [module for module in self.specs if module not in modules],
            "of another size are": [module for module, count in known.items() if modules[module].parameters != count],
        }
        wrong = [f"{what} {_named(found)}" for what, found in problems.items() if found]
        if wrong:
            raise InputError(
                f"{self.path} is not a plan for this model ({len(self.specs)} matrices, the model has {len(modules)}): "
                f"{'; '.join(wrong)}; give the plan of a model of the same structure"
            )
        try:
            return sum(int(module_sizes([modules[each]], [spec], target).sum()) for each, spec in self.specs.items())
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


def read_plan(given: str, runs_dir: str = "runs") -> GivenPlan:
    """A plan from its file, or that of a run given by its directory or name.

    Raises InputError for a file that is none, and for a run that has several plans or none, naming them.
    """
    path = Path(given)
    if path.is_file():
        return _read(path)
    run_dir = next((place for place in (path, Path(runs_dir) / given) if place.is_dir()), None)
    if run_dir is None:
        raise InputError(f"there is no plan {path}{nearest_sibling(path)}, nor a run of that name in {runs_dir}")
    plans = [_read(file) for file in sorted(run_dir.glob("allocation-*.csv"))]
    mixed = [plan for plan in plans if len(set(plan.specs.values())) > 1]
    if not mixed:
        raise InputError(f"{run_dir} holds no allocation-*.csv that gives matrices different configurations")
    if len(mixed) > 1:
        names = ", ".join(str(plan.path) for plan in mixed)
        raise InputError(f"{run_dir} has {len(mixed)} plans; give one of the files {names}")
    return mixed[0]


def _read(path: Path) -> GivenPlan:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a table of text: {error}") from error
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"{path} is not a plan: it has no {', '.join(missing)}; columns needed: {', '.join(_COLUMNS)}")
    specs: dict[ModuleId, QuantSpec] = {}
    parameters: dict[ModuleId, int] = {}
    for number, row in enumerate(rows, start=2):
        try:
            module = ModuleId(int(row["layer"]), row["kind"])
            spec = QuantSpec.from_row(row)
            if row.get("parameters"):
                parameters[module] = int(row["parameters"])
        except (ValueError, TypeError, InputError) as error:
            raise InputError(f"line {number} of {path}: {error}") from error
        if module in specs:
            raise InputError(f"line {number} of {path}: {module} is there a second time")
        specs[module] = spec
    return GivenPlan(path=path, specs=specs, parameters=parameters)


def _named(modules: Sequence[ModuleId]) -> str:
    rest = f" and {len(modules) - _MOST_NAMED} more" if len(modules) > _MOST_NAMED else ""
    return ", ".join(str(module) for module in modules[:_MOST_NAMED]) + rest
