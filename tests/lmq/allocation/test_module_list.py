from __future__ import annotations

from lmq.allocation.module_list import list_modules


def test_layers_are_joined_and_every_kind_is_named() -> None:
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 10, 1, 2)]
    rest = ["model.layers.7.self_attn.q_proj", "model.layers.7.mlp.up_proj"]
    assert list_modules(down + rest) == (
        "6 modules (layers 0-2, 10: mlp.down_proj; layer 7: mlp.up_proj, self_attn.q_proj)"
    )


def test_what_is_in_no_layer_keeps_its_name() -> None:
    assert list_modules(["lm_head"]) == "1 module (lm_head)"
    assert list_modules(["lm_head", "h.3.attn"]) == "2 modules (layer 3: attn; lm_head)"
