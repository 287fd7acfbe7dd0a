from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lmq.checkpoint.open import open_model_directory
from lmq.model.skeleton import build_skeleton


def test_threads_that_open_models_at_once_leave_transformers_as_it_was(tiny_qwen: Path) -> None:
    """transformers switches weight tying off while it opens; two threads at once switched it off for good."""
    ties, missing = PreTrainedModel.tie_weights, PreTrainedModel.init_weights

    def open_both(_: int) -> bool:
        build_skeleton(tiny_qwen)
        model = open_model_directory(tiny_qwen, dtype=torch.float32)
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(open_both, range(12)))
    assert PreTrainedModel.tie_weights is ties
    assert PreTrainedModel.init_weights is missing
