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
    kurtosis = versions._closure("lmq.kurtosis")
    assert {"lmq.kurtosis", "lmq.finite", "lmq.errors"} <= kurtosis
    assert "lmq.fisher" not in kurtosis


def test_docstrings_and_comments_do_not_count():
    import ast

    documented = ast.parse('def f(x):\n    """Doc."""\n    return x  # same\n')
    bare = ast.parse("def f(x):\n\n    return x\n")
    other = ast.parse("def f(x):\n    return -x\n")
    assert versions._normalised(documented) == versions._normalised(bare)
    assert versions._normalised(bare) != versions._normalised(other)
