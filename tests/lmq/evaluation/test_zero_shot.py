"""A local task through lm-eval, its accuracies against a plain loop over the answers."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmq.errors import InputError
from lmq.evaluation import zero_shot
from lmq.evaluation.zero_shot import DataNotAtHand, load_task, local_task_files, measure_task, task_name
from tests.lmq.export.small_checkpoints import write_small

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own code

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""
QUESTIONS = [
    {"question": "The import statement", "choices": ["loads a module", "is a loop", "ends"], "answer": 0},
    {"question": "A class is", "choices": ["no", "an object with methods", "a number of"], "answer": 1},
    {"question": "Names refer to", "choices": ["objects", "nothing at all, ever", "names"], "answer": 2},
    {"question": "The value of", "choices": ["the expression", "x"], "answer": 1},
]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS))
    (tmp_path / "words.yaml").write_text(TASK)
    return tmp_path / "words.yaml"


@torch.no_grad()
def right_answers(path: Path) -> list[bool]:
    """Whether the most likely of the choices, each after the question and a space, is the right one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for item in QUESTIONS:
        scores = []
        for choice in item["choices"]:
            whole = tokenizer(f"{item['question']} {choice}", add_special_tokens=False).input_ids
            start = len(tokenizer(item["question"], add_special_tokens=False).input_ids)
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[at - 1, whole[at]].item() for at in range(start, len(whole))))
        found.append(scores.index(max(scores)) == item["answer"])
    return found


def test_a_local_task_is_measured_offline(tiny_qwen: Path, words: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    scores = measure_task(model, AutoTokenizer.from_pretrained(tiny_qwen), load_task(str(words)))
    accuracy = next(score for score in scores if score.metric == "acc")
    right = right_answers(tiny_qwen)
    share = sum(right) / len(right)
    assert (accuracy.task, accuracy.samples, accuracy.error) == ("words", 4, None)
    assert accuracy.value == share
    assert accuracy.stderr == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_the_hf_model_of_lm_eval_opens_a_checkpoint(
    tiny_qwen: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    checkpoint = write_small(tiny_qwen, tmp_path / "q", "b4g32").path
    monkeypatch.chdir(words.parent)  # the task names its questions from there
    found = evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        tasks=["words"],
        task_manager=TaskManager(include_path=str(words.parent), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    right = right_answers(checkpoint)
    assert found["results"]["words"]["acc,none"] == sum(right) / len(right)


def test_a_limit_takes_the_first_questions(tiny_qwen: Path, words: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    state = torch.get_rng_state()
    scores = measure_task(model, AutoTokenizer.from_pretrained(tiny_qwen), load_task(str(words)), limit=2)
    assert {score.samples for score in scores} == {2}
    assert torch.equal(torch.get_rng_state(), state)  # the process's generators are left alone


def test_the_files_of_a_local_task(words: Path) -> None:
    assert local_task_files(words) == [words, words.with_suffix(".jsonl")]
    assert task_name(str(words)) == "words"
    assert task_name("piqa") == "piqa"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "has no key `task`"),
        ("task: [1]", "has no key `task`"),
        ("task: x\ndataset_kwargs: {data_files: word.jsonl}", r"word\.jsonl, which does not exist; did you mean"),
        ("task: x\ndoc_to_text: !function utils.f", "not a task file that can be read"),
    ],
)
def test_a_file_that_is_no_task_is_refused(words: Path, text: str, message: str) -> None:
    words.write_text(text)
    with pytest.raises(InputError, match=message):
        task_name(str(words))


def test_a_missing_file_is_named(words: Path) -> None:
    with pytest.raises(InputError, match=r"there is no task file .*/word\.yaml; did you mean .*/words\.yaml"):
        load_task(str(words.with_name("word.yaml")))


def test_a_task_without_its_data_says_so_once_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run with the hub switched off; it is asked once per process."""
    pytest.importorskip("lm_eval")
    zero_shot._not_at_hand().clear()
    with pytest.raises(DataNotAtHand, match="data of task 'openbookqa' is not at hand"):
        load_task("openbookqa")
    monkeypatch.setattr(zero_shot, "_task_manager", lambda folder: pytest.fail("asked again"))
    with pytest.raises(DataNotAtHand, match="openbookqa"):
        load_task("openbookqa")


def test_the_standard_tasks_are_where_they_are_looked_for() -> None:
    pytest.importorskip("lm_eval")
    for task, folder in zero_shot.STANDARD_TASKS.items():
        assert task in zero_shot._task_manager(folder).all_subtasks
