from pathlib import Path

import pytest

from lmq.errors import InputError
from lmq_flows.run.prepare import check_window


@pytest.mark.parametrize(("name", "longest"), [("tiny_llama", 256), ("tiny_qwen", 256), ("tiny_gemma", 255)])
def test_a_window_and_what_the_tokenizer_puts_first_fit_the_context(
    name: str, longest: int, request: pytest.FixtureRequest
) -> None:
    """Gemma's tokenizer puts BOS first, which takes one of its 256 positions."""
    model: Path = request.getfixturevalue(name)
    check_window(model, longest, "evaluation.window")
    with pytest.raises(InputError, match=rf"evaluation\.window = {longest + 1}.* set it to {longest} or less"):
        check_window(model, longest + 1, "evaluation.window")
