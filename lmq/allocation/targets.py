"""Targets: what the engine that will serve a checkpoint can hold, known before anything is measured.

A new target is one entry of `TARGETS`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import Version

from lmq.errors import InputError, unknown_name
from lmq.formats.gguf_types import LLAMA_CPP_TYPES
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import EMBEDDINGS, ModuleInfo, expert_number, layer_ranges

if TYPE_CHECKING:
    from lmq.quantizers.integer_zeros import IntegerZeros

_SCALE_BITS = 16
_IN_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the kernels of an engine take.

    bits, group_sizes: any of one with any of the other. Groups run along in_features and do not straddle rows.
    types: configurations by name, beside both or in their place. menu: what a run chooses from that names no menu.
    embeddings: whether input embedding and output head may be quantized. export: the format of `lmq export`.
    usage: what opens an export at `{path}`. opened_by: programs that do, from which version on.
    alike: kinds that the engine holds in one matrix, and so in one configuration; presets of
    `lmq.allocation.constraints`. integer_zeros: zeros are whole numbers, or all the middle of the codes, as
    `lmq.quantizers.integer_zeros` fits them.
    out_features_multiple: what the rows of every matrix must be a multiple of.
    most_configurations: how many different ones a checkpoint may have.
    zero_bits: bits whose zeros an export stores, packed like codes. column_bytes, matrix_bytes: what it stores of a
    column and of a matrix beside codes, zeros and 16-bit scales; type_bytes: of a matrix beside the blocks of a type;
    type_row_bytes: of each of its rows.
    package: what opens it from Python, and `bits_since`, the version that some bits need.
    """

    name: str
    description: str
    export: str
    usage: str
    opened_by: str
    bits: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    types: tuple[str, ...] = ()
    menu: tuple[str, ...] = ()
    embeddings: bool = False
    alike: tuple[str, ...] = ()
    integer_zeros: IntegerZeros = False
    out_features_multiple: int = 1
    most_configurations: int | None = None
    zero_bits: tuple[int, ...] = ()
    column_bytes: int = 0
    matrix_bytes: int = 0
    type_bytes: Mapping[str, int] = field(default_factory=dict)
    type_row_bytes: Mapping[str, int] = field(default_factory=dict)
    package: str | None = None
    bits_since: Mapping[int, str] = field(default_factory=dict)

    def misfit(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Why the engine cannot hold such a matrix in this configuration; None where it can."""
        if spec.gguf is not None:
            if spec.name not in self.types:
                return f"a type that is not written for {self.name}"
            multiple = spec.gguf.row_multiple
            return f"rows of {in_features} weights, not a multiple of {multiple}" if in_features % multiple else None
        if not self.bits:
            return f"grids of lmq's own, where {self.name} takes {_either(self.types)}"
        if spec.bits not in self.bits:
            return f"{spec.bits}-bit codes, where {self.name} takes {_either(self.bits)} bits"
        if spec.group_size not in self.group_sizes:
            return f"groups of {spec.group_size}, where {self.name} takes groups of {_either(self.group_sizes)}"
        if in_features % spec.group_size:
            return f"groups of {spec.group_size} that straddle rows of {in_features} weights"
        if out_features % self.out_features_multiple:
            return f"{out_features} rows, not a multiple of {self.out_features_multiple}"
        return None

    def size_bytes(self, spec: QuantSpec, out_features: int, in_features: int) -> int:
        """Bytes of a matrix in the target's file. Raises InputError for a configuration that does not fit it."""
        parameters = out_features * in_features
        if spec.gguf is not None:
            beside = self.type_bytes.get(spec.name, 0) + out_features * self.type_row_bytes.get(spec.name, 0)
            return spec.size_bytes(parameters, in_features) + beside
        zeros_bits = spec.bits if spec.bits in self.zero_bits else 0
        groups_bytes = spec.groups(parameters) * (_SCALE_BITS + zeros_bits) // 8
        return parameters * spec.bits // 8 + groups_bytes + self.column_bytes * in_features + self.matrix_bytes

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """Every configuration that it holds."""
        own = (QuantSpec(bits, size) for bits in self.bits for size in sorted(self.group_sizes, reverse=True))
        return (*own, *(QuantSpec.parse(name) for name in self.types))

    def usual_menu(self, modules: Sequence[ModuleInfo]) -> tuple[QuantSpec, ...]:
        """What plans for it choose from: its own menu, or the standard configurations that it holds for every module.

        Raises InputError where it holds none.
        """
        own = tuple(QuantSpec.parse(name) for name in self.menu)
        return restrict_menu(own or STOPS, self, modules)


_GPTQ = Target(
    name="gptq",
    description="GPTQModel and SGLang by GPTQ's layout, with bits and groups by module",
    export="gptq",
    usage="gptqmodel.GPTQModel.load({path!r})",
    opened_by="GPTQModel (tested: 7.7), and SGLang, which was not run; vLLM did until its pull request 38288",
    bits=(2, 3, 4, 8),
    group_sizes=(32, 64, 128),
    alike=("qkv", "gate-up"),
    integer_zeros=True,
    out_features_multiple=32,  # zeros of 3 bits are packed 32 to three int32 along the rows
    zero_bits=(2, 3, 4, 8),
    column_bytes=4,  # its group, an int32 of `g_idx`
)

TARGETS: Mapping[str, Target] = {
    each.name: each
    for each in (
        Target(
            name="vllm",
            description="vLLM and SGLang through compressed-tensors: the weight-only kernels of Marlin",
            export="compressed-tensors",
            usage="vllm serve {path}",
            opened_by="vLLM 0.9 or newer (zeros of 4 bits: its pull request 14211; 0.33 read one, without a GPU) and "
            "SGLang, which was not run; tested: compressed-tensors 0.20",
            bits=(4, 8),
            group_sizes=(32, 64, 128),
            types=("mxfp4", "nvfp4", "fp8"),
            alike=("qkv", "gate-up"),
            integer_zeros=True,
            out_features_multiple=8,  # zeros of 4 bits are packed 8 to an int32 along the rows
            zero_bits=(4,),
            matrix_bytes=16,  # its shape, two int64
            type_bytes={"nvfp4": 4},  # the float32 of the matrix
            type_row_bytes={"fp8": 1},  # 16 bits for a scale that has 8 in a checkpoint of lmq
        ),
        Target(
            name="llama.cpp",
            description="llama.cpp and the programs built on it, by GGUF files",
            export="gguf",
            usage="llama-cli -m {path}",
            opened_by="llama.cpp of March 2024 or newer, the first with iq4_xs (tested: llama-cpp-python 0.3.36)",
            types=LLAMA_CPP_TYPES,
            menu=("q2_k", "q3_k", "iq4_xs", "q4_k", "q4_1", "q5_k", "q6_k", "q8_0"),
            embeddings=True,
        ),
        _GPTQ,
        replace(
            _GPTQ,
            name="gptq-symmetric",
            description="what takes symmetric GPTQ alone, as vLLM does at 4 and 8 bits, and ExLlama",
            usage="vllm serve {path}",
            menu=tuple(spec.name for spec in STOPS if spec.bits in (4, 8)),  # 2 and 3 bits, where a menu names them
            opened_by="GPTQModel (tested: 7.7), vLLM where all bits are 4 or 8 (0.33 read one, without a GPU), and "
            "SGLang, which was not run",
            integer_zeros="middle",
        ),
        Target(
            name="auto-round",
            description="transformers with the auto-round package, with bits and groups by module",
            export="auto-round",
            usage="AutoModelForCausalLM.from_pretrained({path!r})",
            opened_by="transformers with auto-round (tested: 5.23 with 0.16)",
            bits=(2, 3, 4, 5, 6, 8),
            group_sizes=(32, 64, 128),
            menu=(*(spec.name for spec in STOPS if spec.bits < 8), "b5g64", "b6g64", "b8g64"),
            integer_zeros=True,
            out_features_multiple=32,
            zero_bits=(2, 3, 4, 5, 6, 8),
            package="auto-round",
            bits_since={5: "0.16", 6: "0.16"},
        ),
        Target(
            name="awq",
            description="vLLM, SGLang and transformers by AWQ's layout: 4 bits, one group size for all",
            export="awq",
            usage="vllm serve {path}",
            opened_by="transformers with GPTQModel (tested: 5.23 with 7.7), vLLM (0.33 read one, without a GPU), and "
            "SGLang, which was not run",
            bits=(4,),
            group_sizes=(32, 64, 128),
            integer_zeros=True,
            out_features_multiple=8,
            zero_bits=(4,),
            most_configurations=1,
        ),
    )
}


def target_named(name: str) -> Target:
    """The target of that name. Raises InputError naming the nearest."""
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]


def restrict_menu(menu: Sequence[QuantSpec], target: Target, modules: Sequence[ModuleInfo]) -> tuple[QuantSpec, ...]:
    """The configurations of the menu that the target holds for every module, in the order of the menu.

    Raises InputError naming those that it would hold where the menu has none of them.
    """
    routed = [module for module in modules if expert_number(module.id.kind) is not None]
    if routed:
        raise InputError(
            f"the export for {target.name} writes no mixtures of experts ({routed[0].id} and {len(routed) - 1} more); "
            "leave out the target"
        )
    held = tuple(spec for spec in menu if _holds_all(target, spec, modules))
    if held:
        return held
    names = ", ".join(spec.name for spec in menu)
    possible = [spec.name for spec in target.specs if _holds_all(target, spec, modules)]
    if not possible:
        reasons = dict.fromkeys(_misfits(target, target.specs[-1], modules))
        raise InputError(f"the target {target.name} holds no configuration for every module: {'; '.join(reasons)}")
    raise InputError(
        f"the target {target.name} holds none of the menu ({names}) for every module; "
        f"put one of these on the menu: {', '.join(possible)}"
    )


def left_out(menu: Sequence[QuantSpec], target: Target, modules: Sequence[ModuleInfo]) -> list[str]:
    """Why configurations of the menu are not among those of `restrict_menu`: a sentence for each reason."""
    names: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for spec in menu:
        unheld: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            if reason := target.misfit(spec, module.out_features, module.in_features):
                unheld[reason].append(f"layers.{module.id.layer}.{module.id.kind}")
        for reason, paths in unheld.items():
            names[reason, tuple(paths)].append(spec.name)
    return [
        f"the target {target.name} leaves {', '.join(specs)} out of the menu: {reason}, "
        f"in {'every module' if len(paths) == len(modules) else list_modules(paths)}"
        for (reason, paths), specs in names.items()
    ]


def too_new(menu: Sequence[QuantSpec], target: Target) -> list[str]:
    """What of the menu the target's package, as it is installed here, is too old for; empty where it is not."""
    try:
        installed = version(target.package) if target.package is not None else None
    except PackageNotFoundError:
        installed = None
    if installed is None:
        return []
    names = [spec.name for spec in menu if Version(installed) < Version(target.bits_since.get(spec.bits, "0"))]
    if not names:
        return []
    needed = max((target.bits_since[spec.bits] for spec in menu if spec.name in names), key=Version)
    return [
        f"{target.package} {installed}, which is installed here, does not open {', '.join(names)}: it takes {needed}; "
        "upgrade it where the checkpoint is opened, or leave them out of the menu"
    ]


def taken_instead(menu: Sequence[QuantSpec], modules: Sequence[ModuleInfo]) -> list[str]:
    """Which types of GGUF on the menu are another in some modules, whose rows they do not fit: a sentence for each."""
    paths: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for spec in menu:
        for module in modules:
            if spec.gguf is None or module.in_features % spec.gguf.row_multiple:
                continue
            taken = spec.gguf.of_rows(module.in_features)
            if taken.name != spec.name:
                in_layer = module.id.layer != EMBEDDINGS
                path = f"layers.{module.id.layer}.{module.id.kind}" if in_layer else module.id.kind
                paths[spec.name, taken.name, module.in_features].append(path)
    return [
        f"{name} is {taken} where rows of {in_features:,} weights are no multiple of 256, as llama.cpp has it, and its "
        f"bytes are counted: {'every module' if len(found) == len(modules) else list_modules(found)}"
        for (name, taken, in_features), found in paths.items()
    ]


def list_modules(paths: Sequence[str]) -> str:
    """`3 modules (layers 0-1: mlp.up_proj; layer 4: self_attn.q_proj)`; paths outside of layers as they are."""
    layers_of: dict[str, list[int]] = defaultdict(list)
    outside = []
    for path in paths:
        if match := _IN_LAYER.fullmatch(path):
            layers_of[match[2]].append(int(match[1]))
        else:
            outside.append(path)
    kinds_of: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for kind, layers in layers_of.items():
        kinds_of[tuple(sorted(layers))].append(kind)
    words = [f"{layer_ranges(layers)}: {', '.join(sorted(kinds))}" for layers, kinds in sorted(kinds_of.items())]
    return f"{len(paths)} module{'s' * (len(paths) != 1)} ({'; '.join(words + outside)})"


def _holds_all(target: Target, spec: QuantSpec, modules: Sequence[ModuleInfo]) -> bool:
    return not _misfits(target, spec, modules)


def _misfits(target: Target, spec: QuantSpec, modules: Sequence[ModuleInfo]) -> list[str]:
    misfits = ((module, target.misfit(spec, module.out_features, module.in_features)) for module in modules)
    return [f"{module.id} has {reason}" for module, reason in misfits if reason is not None]


def _either(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))
