import ast
from functools import cache

from lmq_tasks import STAGES, versions
from lmq_tasks.stage import Stage


def test_no_stage_changed_without_its_version_or_a_mark():
    assert versions.changed_stages(STAGES) == {}


def test_a_new_version_must_be_recorded():
    name, stage = next(iter(STAGES.items()))
    newer = Stage(stage.name, stage.version + 1, stage.schema, stage.body)
    assert "went from version" in versions.changed_stages({name: newer})[name]


def test_changed_code_is_noticed(monkeypatch):
    monkeypatch.setattr(versions, "source_digest", lambda stage: "other")
    assert set(versions.changed_stages(STAGES)) == set(STAGES)


def test_digest_covers_what_a_stage_imports_and_nothing_else():
    kurtosis = versions._closure("lmq.measurement.weights")
    assert {"lmq.measurement.weights", "lmq.numerics", "lmq.errors"} <= kurtosis
    assert "lmq.measurement.token_fisher" not in kurtosis


def changed_by(monkeypatch, module):
    """Stages whose digest moves when a function is added to one module."""
    parse = versions._parse
    before = {name: versions.source_digest(stage) for name, stage in STAGES.items()}

    def parse_changed(name):
        tree = parse(name)
        return ast.Module([*tree.body, *ast.parse("def added(): return 1").body], []) if name == module else tree

    monkeypatch.setattr(versions, "_parse", parse_changed)
    monkeypatch.setattr(versions, "_module_digest", cache(versions._module_digest.__wrapped__))
    return {name for name, stage in STAGES.items() if versions.source_digest(stage) != before[name]}


def test_a_helper_two_imports_away_moves_the_stages_that_use_it(monkeypatch):
    """Stages reach weights through `lmq_tasks.inputs`, which imports the library's streaming."""
    changed = changed_by(monkeypatch, "lmq.model.streaming")
    assert {"kurtosis", "grids", "quantize", "forward", "evaluate"} <= changed
    assert not {"calibration", "convert"} & changed


def test_the_loader_moves_what_opens_checkpoints_whole(monkeypatch):
    """`from lmq import load`, and the quantizer that transformers imports by its name alone."""
    assert {"evaluate-other", "performance", "zero-shot"} <= changed_by(monkeypatch, "lmq.checkpoint.hf")


def test_helpers_of_other_files_count_but_not_what_carries_a_stage():
    sources, library = versions._stage_sources("lmq_tasks.measure", "measure_layer")
    assert any("load_layer_weights" in source for source in sources)
    assert "lmq.model.streaming" in library
    assert not any("publish" in source for source in sources)


def test_docstrings_and_comments_do_not_count():
    documented = ast.parse('def f(x):\n    """Doc."""\n    return x  # same\n')
    bare = ast.parse("def f(x):\n\n    return x\n")
    other = ast.parse("def f(x):\n    return -x\n")
    assert versions._normalised(documented) == versions._normalised(bare)
    assert versions._normalised(bare) != versions._normalised(other)
