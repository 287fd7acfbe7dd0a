from __future__ import annotations

import pytest

from lmq.allocation.constraints import ALIKE_PRESETS
from lmq.allocation.targets import TARGETS, left_out, list_modules, restrict_menu, target_named, too_new
from lmq.errors import InputError
from lmq.export import FORMATS
from lmq.formats.spec import ALLOWED_BITS, ALLOWED_GROUP_SIZES, STOPS, QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo

VLLM = TARGETS["vllm"]


def _modules(*shapes: tuple[int, int]) -> list[ModuleInfo]:
    return [ModuleInfo(ModuleId(0, f"m{index}"), *shape, part="attn_in") for index, shape in enumerate(shapes)]


def _specs(*names: str) -> tuple[QuantSpec, ...]:
    return tuple(map(QuantSpec.parse, names))


def test_every_target_names_what_lmq_has() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert target_named(name) is target
        assert set(target.bits) <= set(ALLOWED_BITS)
        assert set(target.group_sizes) <= set(ALLOWED_GROUP_SIZES)
        assert set(target.alike) <= set(ALIKE_PRESETS)
        assert target.export in FORMATS
        assert "dir" in target.usage.format(path="dir")
        assert all(QuantSpec.parse(spec) in target.specs for spec in target.menu)


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown target 'vlm'; did you mean 'vllm'"):
        target_named("vlm")


def test_the_menu_keeps_its_order_and_what_every_module_can_have() -> None:
    assert restrict_menu(STOPS, VLLM, _modules((64, 256))) == _specs(
        "b4g128", "b4g64", "b4g32", "b8g128", "b8g64", "b8g32"
    )
    # rows of 576 weights hold no whole groups of 128
    assert restrict_menu(STOPS, VLLM, _modules((64, 256), (256, 576))) == _specs("b4g64", "b4g32", "b8g64", "b8g32")


def test_what_vllm_does_not_open_of_symmetric_gptq_is_taken_where_it_is_named() -> None:
    target = TARGETS["gptq-symmetric"]
    assert {spec.bits for spec in target.usual_menu(_modules((64, 256)))} == {4, 8}
    assert restrict_menu(_specs("b2g64"), target, _modules((64, 256))) == _specs("b2g64")


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        ("b3g64", (64, 128), "3-bit codes, where vllm takes 4 or 8 bits"),
        ("b4g16", (64, 128), "groups of 16, where vllm takes groups of 32 or 64 or 128"),
        ("b4g128", (64, 192), "groups of 128 that straddle rows of 192 weights"),
        ("b4g64", (12, 128), "12 rows, not a multiple of 8"),
        ("b8g64", (64, 128), None),
    ],
)
def test_what_does_not_fit_is_said(spec: str, shape: tuple[int, int], reason: str | None) -> None:
    assert VLLM.misfit(QuantSpec.parse(spec), *shape) == reason


@pytest.mark.parametrize(
    ("target", "spec", "shape", "reason"),
    [
        ("gptq", "b3g32", (48, 64), "48 rows, not a multiple of 32"),
        ("gptq", "b5g64", (64, 64), "5-bit codes, where gptq takes 2 or 3 or 4 or 8 bits"),
        ("gptq", "q4_k", (64, 256), "a type that is not written for gptq"),
        ("gptq", "nvfp4", (64, 256), "a type that is not written for gptq"),
        ("llama.cpp", "nvfp4", (64, 256), "a type that is not written for llama.cpp"),
        ("llama.cpp", "mxfp4", (64, 64), None),
        ("vllm", "q4_k", (64, 256), "a type that is not written for vllm"),
        ("vllm", "mxfp4", (64, 48), "rows of 48 weights, not a multiple of 32"),
        ("vllm", "nvfp4", (64, 48), None),
        ("vllm", "nvfp4", (64, 40), "rows of 40 weights, not a multiple of 16"),
        ("vllm", "fp8", (60, 41), None),
        ("llama.cpp", "fp8", (64, 256), "a type that is not written for llama.cpp"),
        ("auto-round", "b5g64", (64, 64), None),
        ("awq", "b8g64", (64, 64), "8-bit codes, where awq takes 4 bits"),
    ],
)
def test_what_the_layouts_of_integers_do_not_hold_is_said(
    target: str, spec: str, shape: tuple[int, int], reason: str | None
) -> None:
    assert TARGETS[target].misfit(QuantSpec.parse(spec), *shape) == reason


def test_what_is_left_out_of_a_menu_is_said_with_the_modules() -> None:
    modules = _modules((64, 256), (256, 576))
    assert left_out(_specs("b2g64", "b3g64", "b3g128", "b4g128", "b4g64"), VLLM, modules) == [
        "the target vllm leaves b2g64 out of the menu: 2-bit codes, where vllm takes 4 or 8 bits, in every module",
        "the target vllm leaves b3g64, b3g128 out of the menu: 3-bit codes, where vllm takes 4 or 8 bits, "
        "in every module",
        "the target vllm leaves b4g128 out of the menu: groups of 128 that straddle rows of 576 weights, "
        "in 1 module (layer 0: m1)",
    ]
    assert left_out(_specs("b4g64"), VLLM, modules) == []


def test_a_menu_of_which_nothing_is_left_is_refused_with_what_may_be_on_it() -> None:
    held = "b4g64, b4g32, b8g64, b8g32, mxfp4, nvfp4, fp8"
    with pytest.raises(InputError, match=rf"none of the menu \(b3g64, b4g128\).*: {held}$"):
        restrict_menu(_specs("b3g64", "b4g128"), VLLM, _modules((64, 576)))
    with pytest.raises(InputError, match=r"put one of these on the menu: fp8$"):
        restrict_menu(STOPS, VLLM, _modules((64, 64), (64, 40)))
    with pytest.raises(InputError, match=r"holds no configuration .*: layer 0 m1 has groups of 32 that straddle rows"):
        restrict_menu(STOPS, TARGETS["gptq"], _modules((64, 64), (64, 40)))


def test_a_package_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    target, menu = TARGETS["auto-round"], _specs("b4g64", "b5g64", "b6g64")
    monkeypatch.setattr("lmq.allocation.targets.version", lambda package: "0.15.0")
    assert too_new(menu, target) == [
        "auto-round 0.15.0, which is installed here, does not open b5g64, b6g64: it takes 0.16; "
        "upgrade it where the checkpoint is opened, or leave them out of the menu"
    ]
    assert too_new(_specs("b4g64", "b8g64"), target) == []
    monkeypatch.setattr("lmq.allocation.targets.version", lambda package: "0.16.1")
    assert too_new(menu, target) == []
    assert too_new(menu, VLLM) == []


def test_layers_are_joined_and_every_kind_is_named() -> None:
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 10, 1, 2)]
    rest = ["model.layers.7.self_attn.q_proj", "model.layers.7.mlp.up_proj"]
    assert list_modules(down + rest) == (
        "6 modules (layers 0-2, 10: mlp.down_proj; layer 7: mlp.up_proj, self_attn.q_proj)"
    )


def test_what_is_in_no_layer_keeps_its_name() -> None:
    assert list_modules(["lm_head"]) == "1 module (lm_head)"
    assert list_modules(["lm_head", "h.3.attn"]) == "2 modules (layer 3: attn; lm_head)"
