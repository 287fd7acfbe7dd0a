from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmq.errors import InputError
from lmq_flows.config.run import load_run_config, parse_run_config, preset_names, preset_path


def valid(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "models": [{"name": "tiny", "source": "somewhere"}],
        "strategies": ["uniform", {"name": "sensi-boost", "options": {"top_m": 1}}],
        "budgets": [4.25, "uniform b4g64 + 2%"],
        **changes,
    }


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(valid()))
    return path


def test_every_preset_is_valid() -> None:
    assert "demo" in preset_names()
    for name in preset_names():
        assert load_run_config(preset_path(name)).strategies


def test_defaults_measure_the_standard_menu_on_text_apart_from_the_evaluation() -> None:
    config = parse_run_config(valid())
    assert len(config.measure.menu) == 12
    assert config.budgets == ("4.25", "uniform b4g64 + 2%")
    assert (config.calibration.part, config.evaluation.part) == ("first", "second")
    assert config.run_dir == Path("runs/tiny")


def test_strategies_say_what_must_be_measured() -> None:
    config = parse_run_config(valid())
    assert config.needs == {"sensitivity"}
    assert config.needs_calibration
    assert not parse_run_config(valid(strategies=["mxq", "kurt-boost"])).needs_calibration
    uniform = valid(strategies=["uniform", "mxq"])
    assert parse_run_config(uniform).needs_calibration  # its codes look at the text
    assert not parse_run_config(uniform | {"measure": {"quantizer": "hqq"}}).needs_calibration


def test_constraints_are_read_and_kept_as_plain_values() -> None:
    constraints = {"alike": ["qkv"], "fixed": {"0.*": "b8g64"}, "device_limits": {"0-1": "2 MB"}}
    config = parse_run_config(valid(strategies=["uniform", "mxq"], constraints=constraints))
    assert config.constraints.plain == constraints
    assert config.constraints.parsed().device_limits[0].size_bytes == 2_000_000
    assert not parse_run_config(valid()).constraints.plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constraints": {"alik": ["qkv"]}}, "unknown key 'constraints.alik'; did you mean 'alike'?"),
        ({"constraints": {"alike": ["qvk"]}}, "did you mean 'qkv'"),
        ({"constraints": {"floor": {"*": "b4g65"}}}, "constraints.floor.*: group_size = 65 is not allowed"),
        ({"constraints": {"device_limits": {"0-": "2 GB"}}}, "'0-' are not layers of a device limit"),
        (
            {"constraints": {"alike": ["qkv"]}},
            "strategy 'sensi-boost top_m=1' keeps no constraints; those that do: mxq, kurt-scaled",
        ),
        (
            {"calibraton": {}},
            "unknown key 'calibraton'; did you mean 'calibration'? (allowed: baselines, budgets, calibration,",
        ),
        ({"evaluation": {"windw": 64}}, "unknown key 'evaluation.windw'; did you mean 'window'? (allowed: column,"),
        ({"models": [{"name": "a", "source": "b", "mnu": []}]}, "unknown key 'models.0.mnu'; did you mean 'menu'?"),
        ({"name": "a/b"}, "name = 'a/b': may hold letters, digits, '.', '_' and '-'"),
        ({"name": ".."}, "name = '..': may hold letters"),
        ({"name": 2024}, "name = 2024: must be text; quote it"),
        ({"models": [{"name": "a"}]}, "key 'models.0.source' is missing"),
        ({"models": [{"name": "a", "source": ""}]}, "models.0.source = '': must not be empty"),
        ({"models": []}, "models = []: must have at least one entry"),
        ({"models": ["a"]}, "models.0 = 'a': must be a section with keys of its own"),
        ({"strategies": "uniform"}, "strategies = 'uniform': must be a list"),
        ({"strategies": ["unifrm"]}, "strategies.0: unknown strategy 'unifrm'; did you mean 'uniform'?"),
        ({"strategies": ["mxq", "uniform", "mxq"]}, "strategies: 'mxq' is listed twice"),
        ({"strategies": [{"name": "sensi-boost", "options": {"topm": 1}}]}, "'topm'; did you mean 'top_m'?"),
        ({"strategies": [{"name": "sensi-boost", "options": {"top_m": "x"}}]}, "strategies.0: top_m = 'x'"),
        ({"budgets": ["b4"]}, "budgets.0: 'b4' is not a budget; allowed: bits per weight as 4.25"),
        ({"budgets": ["80 MB", "80 mb"]}, "budgets: '80 mb' is listed twice"),
        ({"budgets": []}, "budgets = []: must have at least one entry"),
        ({"measure": {"menu": ["b4g96"]}}, "measure.menu.0: group_size = 96 is not allowed; allowed: (16, 32,"),
        ({"measure": {"menu": ["b4g64", "b4g64"]}}, "measure.menu: 'b4g64' is listed twice"),
        ({"measure": {"menu": []}}, "measure.menu = []: must have at least one entry"),
        ({"measure": {"sensitivity_spec": "b7g64"}}, "measure.sensitivity_spec: bits = 7 is not a weight width"),
        (
            {"measure": {"quantizer": "hq"}},
            "measure.quantizer: unknown quantizer 'hq'; did you mean 'hqq'? (allowed: fisher-gptq, gptq, hqq, "
            "hqq-default, hqq-package, rtn, weighted)",
        ),
        ({"evaluation": {"tokens": "many"}}, "evaluation.tokens = 'many': must be a whole number"),
        ({"evaluation": {"tokens": 4096.5}}, "evaluation.tokens = 4096.5: must be a whole number"),
        ({"evaluation": {"tokens": -1}}, "evaluation.tokens = -1: must be at least 16"),
        ({"evaluation": {"stride": 2000}}, "evaluation: stride = 2000 is larger than window = 1024"),
        ({"evaluation": {"tokens": 512}}, "evaluation: tokens = 512 is less than one window of 1024"),
        ({"evaluation": {"part": "all"}}, "may share documents: give one part 'first' and the other 'second'"),
        ({"calibration": {"seed": 1}}, "may share documents"),
        ({"calibration": None}, "calibration = None: must be a section with keys of its own"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_run_config(valid(**changes))
    assert message in str(caught.value)
    assert "Tuple" not in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"runner.workers = 0.*; unknown key 'nme'; did you mean 'name'"):
        parse_run_config(valid(runner={"workers": 0}, nme="x"))


def test_long_values_are_cut() -> None:
    with pytest.raises(InputError) as caught:
        parse_run_config(valid(name="x/" * 500))
    assert len(str(caught.value)) < 200


def test_overrides_set_keys_sections_and_entries_of_lists(config_file: Path) -> None:
    overrides = ("evaluation.tokens=2048", "models.0.name=other", "budgets=[3.25, uniform b3g64]", "strategies.1=mxq")
    config = load_run_config(config_file, overrides)
    assert config.evaluation.tokens == 2048
    assert config.models[0].name == "other"
    assert config.budgets == ("3.25", "uniform b3g64")
    assert [item.label for item in config.strategies] == ["uniform", "mxq"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("", "'' is not of the form a.b=value"),
        ("=3", "'=3' is not of the form a.b=value"),
        ("evaluation.tokens", "is not of the form a.b=value"),
        ("models.3.name=x", "'3' is not an entry of the list (allowed: 0 to 0)"),
        ("models.-1.name=x", "'-1' is not an entry of the list"),
        ("models.first.name=x", "'first' is not an entry of the list"),
        ("strategies.2=mxq", "'2' is not an entry of the list (allowed: 0 to 1)"),
        ("name.x=3", "'name' is a value, not a section"),
        ("budgets=[4", "'[4' is not a YAML value; close its brackets and quotes"),
        ("evaluation.tokns=3", "unknown key 'evaluation.tokns'; did you mean 'tokens'?"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(override: str, message: str, config_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_run_config(config_file, (override,))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds nothing, not the keys of a run configuration"),
        (b"- 1", "holds one list, not the keys"),
        (b"a: [", "is not a YAML file"),
        (b"\xff\xfe\x00", "is not a YAML file"),
    ],
)
def test_files_that_are_no_configuration_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_run_config(path)


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no configuration file .*dmo; presets: .*demo"):
        load_run_config(tmp_path / "dmo")


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_run_config(tmp_path)


def test_measurements_asked_for_are_needed_beside_those_of_the_strategies() -> None:
    config = parse_run_config(valid(strategies=["mxq"], measure={"also": ["kurtosis"]}))
    assert config.needs == {"frobenius", "kurtosis"}
    assert not config.needs_calibration
    config = parse_run_config(valid(strategies=["uniform"], measure={"also": ["super_weights", "module_errors"]}))
    assert config.needs == {"super_weights", "module_errors"}
    assert config.needs_calibration


def test_an_unknown_measurement_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"measure\.also.*'super_weight'; did you mean 'super_weights'\?"):
        parse_run_config(valid(measure={"also": ["super_weight"]}))
