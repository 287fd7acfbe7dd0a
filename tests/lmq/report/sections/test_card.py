from dataclasses import replace

import pytest
import yaml

from lmq.model.structure import KeptPart, KeptTensor
from lmq.report.results import VariantResult
from lmq.report.sections.allocations import allocations_section
from lmq.report.sections.card import model_card
from tests.lmq.report.synthetic_report import MODEL, report_data

DATA = report_data()
MIXED = next(result for result in DATA.results if result.strategy == "loss-aware")


def parts(card: str) -> tuple[dict, dict[str, str]]:
    """The YAML head, and the text under every heading of the second level."""
    _, head, body = card.split("---\n", 2)
    sections = body.split("\n## ")
    return yaml.safe_load(head), {part.partition("\n")[0]: part.partition("\n")[2] for part in sections}


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_a_card_says_what_the_checkpoint_is_and_how_good() -> None:
    head, sections = parts(model_card(DATA, MIXED))
    assert head == {
        "base_model": "maker/small-llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["lmq", "quantized"],
    }
    table = rows(sections["Results"])
    assert [row[0] for row in table[1:]] == ["full-precision", "uniform b4g64", "loss-aware @ uniform b4g64"]
    assert {len(row) for row in table} == {7}
    assert table[3][3] == "35.66 ± 0.39"
    assert table[1][4:] == ["–", "–", "–"]
    assert "strided 1024/512, 4,096 tokens scored" in sections["Results"]
    counted = rows(sections["Where the bits went"])
    kinds = {kind for kind, *_ in counted[1:]}
    assert kinds == set(DATA.models[0].structure.kinds)
    assert sum(int(cell) for row in counted[1:] for cell in row[1:] if cell) == len(DATA.models[0].structure.modules)
    again = sections["How to make it again"]
    assert yaml.safe_load(again.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(DATA.config or "")
    assert DATA.models[0].structure.weights_sha256 in again
    assert "torch 2.9.0" in again
    assert model_card(DATA, MIXED) == model_card(report_data(), MIXED)


def test_card_and_report_list_what_a_hybrid_keeps() -> None:
    kept = (KeptTensor(0, "conv.weight", (64, 1, 3)), KeptTensor(1, "conv.weight", (64, 1, 3)))
    model = replace(DATA.models[0], structure=replace(DATA.models[0].structure, kept=kept))
    data = replace(DATA, models=[model])
    assert "as in the source; so are, in the blocks, conv.weight [64, 1, 3] of layers 0-1." in model_card(data, MIXED)
    assert "Kept as it is: conv.weight [64, 1, 3] of layers 0-1." in allocations_section(data)
    assert "so are" not in model_card(DATA, MIXED)
    assert "Kept as it is" not in allocations_section(DATA)


def test_card_and_report_list_what_lies_beside_a_language_model() -> None:
    part = KeptPart("model.visual", 1_000, 2_000_000)
    model = replace(DATA.models[0], structure=replace(DATA.models[0].structure, kept_parts=(part,)))
    data = replace(DATA, models=[model])
    card = model_card(data, MIXED)
    assert "so are, beside the language model, model.visual (1,000 weights, 2.0 MB)." in card
    assert "AutoModelForImageTextToText.from_pretrained(PATH)" in card
    assert "processor = AutoProcessor.from_pretrained(PATH)" in card
    assert "Kept as it is: model.visual (1,000 weights, 2.0 MB)." in allocations_section(data)
    assert "tokenizer = AutoTokenizer.from_pretrained(PATH)" in model_card(DATA, MIXED)


def test_what_was_not_measured_is_said() -> None:
    bare = VariantResult(model="other", strategy="mxq", budget="4 bpw")
    card = model_card(replace(DATA, results=[bare], config=None, versions={}), bare)
    assert "| mxq @ 4 bpw | – | – | – | – | – | – |" in card
    assert "not evaluated" in card
    assert "Not measured." in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [("/home/someone/models/llama", "llama"), ("models/tiny.gguf", None), ("package:p/m.gguf", None)],
)
def test_folders_of_this_machine_are_not_told(source: str, shown: str | None) -> None:
    config = {"models": [{"name": MODEL, "source": source}], "calibration": {"source": "/home/someone/text.txt"}}
    card = model_card(replace(DATA, config=yaml.safe_dump(config)), MIXED)
    assert "/home" not in card
    assert f"`{shown or source}`" in card
    assert "base_model" not in card


def test_warnings_are_on_the_card() -> None:
    warned = replace(DATA.models[0], warnings=["b4g32 is unfair"])
    assert "## Mind\n\n- b4g32 is unfair" in model_card(replace(DATA, models=[warned]), MIXED)
