import importlib.metadata
import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from lmq.errors import InputError
from lmq.text.calibration import load_tokenizer
from lmq.text.known_texts import KNOWN_TEXTS
from lmq_flows.cli import main
from lmq_flows.graph.judging import evaluation_tasks
from lmq_flows.run.plan import check_run
from lmq_flows.run.prepare import check_window, identify_texts
from tests.conftest import TINY_SHAPE
from tests.flows.conftest import tiny_config


@pytest.mark.parametrize(("name", "longest"), [("tiny_llama", 256), ("tiny_qwen", 256), ("tiny_gemma", 255)])
def test_a_window_and_what_the_tokenizer_puts_first_fit_the_context(
    name: str, longest: int, request: pytest.FixtureRequest
) -> None:
    """Gemma's tokenizer puts BOS first, which takes one of its 256 positions."""
    model: Path = request.getfixturevalue(name)
    check_window(model, longest, "evaluation.window")
    with pytest.raises(InputError, match=rf"evaluation\.window = {longest + 1}.* set it to {longest} or less"):
        check_window(model, longest + 1, "evaluation.window")


@pytest.mark.parametrize(
    ("kind", "options", "prefix"),
    [
        ("opt", {"max_position_embeddings": 64, "word_embed_proj_dim": 64, "ffn_dim": 96}, ["<bos>"]),
        ("gpt_bigcode", {"max_position_embeddings": 64, "n_embd": 64, "n_head": 4}, ["<eos>", "<bos>"]),
        ("gpt2", {"max_position_embeddings": 64, "n_embd": 64, "n_head": 4}, ["<bos>"]),
        ("xglm", {"max_position_embeddings": 64, "d_model": 64, "ffn_dim": 96, "attention_heads": 4}, ["<eos>"]),
    ],
)
def test_windows_of_models_with_learned_positions(
    kind: str, options: dict, prefix: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They fail with an IndexError beyond their last position: the longest window works, one more is refused."""
    small = {**TINY_SHAPE, "num_hidden_layers": 1, "n_layer": 1, "num_layers": 1, **options}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    model.save_pretrained(tmp_path / kind)
    tokenizer = load_tokenizer(tiny_llama)
    front = [(token, tokenizer.convert_tokens_to_ids(token)) for token in prefix]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=front
    )
    tokenizer.save_pretrained(tmp_path / kind)
    longest = 64 - len(prefix)
    evaluate = ["evaluate", str(tmp_path / kind), "--tokens", "130"]
    assert main([*evaluate, "--window", str(longest), "--stride", str(longest)]) == 0
    capsys.readouterr()
    assert main([*evaluate, "--window", str(longest + 1), "--stride", str(longest)]) == 2
    assert f"set it to {longest} or less" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", KNOWN_TEXTS)
def test_a_known_text_goes_by_its_commit_without_asking_the_hub(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama, tmp_path, evaluation__source=name)
    known = KNOWN_TEXTS[name]
    identity = identify_texts(config)[name]
    assert identity.location == name
    assert identity.identity == (name if name == "ptb" else f"{name}@{known.revision}")
    (note,) = check_run(config)
    assert note.startswith(f"{name} is {known.name}@{known.revision}")
    assert ("known by its name alone" in note) == (name == "ptb")


def test_what_a_data_set_means_now_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    source = f"dataset:{tmp_path / 'texts'}"
    config = tiny_config(tiny_llama, tmp_path, evaluation__source=source)
    before = check_run(config)
    assert before == [f"{source} is read as it is now: {identify_texts(config)[source].identity}"]
    (tmp_path / "texts" / "a.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    assert check_run(config) != before


def test_tasks_of_lm_eval_go_by_their_names_and_its_release(tiny_llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama, tmp_path, evaluation__tasks=["piqa", "boolq"])
    version = importlib.metadata.version("lm_eval")
    assert check_run(config) == [f"piqa, boolq: known by name and lm-eval {version}, not by the questions on the hub"]
    assert [task.config["lm_eval"] for task in evaluation_tasks(config.evaluation)] == [version] * 2
