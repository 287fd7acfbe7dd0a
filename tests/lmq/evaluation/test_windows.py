import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import NotFiniteError
from lmq.evaluation.perplexity import Window, full_windows, protocol_name
from lmq.evaluation.windows import (
    WINDOWS_SCHEMA,
    last_states,
    paired_difference,
    score_windows,
    summarize,
    window_tokens,
)
from lmq.model import streaming
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.tables import read_rows, write_rows
from tests.lmq.evaluation.plain_perplexity import plain_perplexity

WINDOW, STRIDE = 24, 8


@pytest.fixture(scope="module")
def stream() -> Tensor:
    return torch.randint(2, 500, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def open_streamed(path: Path) -> StreamedModel:
    return StreamedModel.open(path, discover(path, weights_sha256="0"))


def open_plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def perturb(block: nn.Module, layer: int) -> None:
    """The same change of the weights of a layer whoever makes it."""
    generator = torch.Generator().manual_seed(layer)
    for _, module in sorted(block.named_modules()):
        if isinstance(module, nn.Linear):
            noise = 0.03 * torch.randn(module.weight.shape, generator=generator)
            module.weight = nn.Parameter(module.weight.detach() + noise, requires_grad=False)


def perturbed_plain(path: Path) -> PreTrainedModel:
    model = open_plain(path)
    for layer, block in enumerate(model.get_submodule("model.layers").children()):
        perturb(block, layer)
    return model


def rows_against_full_precision(path: Path, stream: Tensor, stride: int, prefix: list[int]) -> list[dict[str, Any]]:
    model = open_streamed(path)
    windows = full_windows(len(stream), WINDOW, stride)
    tokens = window_tokens(stream, windows, prefix)
    reference = last_states(model, tokens)
    return score_windows(model, windows, tokens, last_states(model, tokens, perturb), reference)


@torch.no_grad()
def plain_divergence(path: Path, stream: Tensor, stride: int, prefix: list[int]) -> tuple[Tensor, float]:
    """KL of every scored token in float64, and top-1 agreement, of the perturbed model with the model."""
    model, perturbed = open_plain(path), perturbed_plain(path)
    kl, agrees = [], []
    for window in full_windows(len(stream), WINDOW, stride):
        inputs = stream[None, window.start : window.end].long()
        inputs = torch.cat([torch.tensor([prefix], dtype=torch.long), inputs], dim=1)
        log_p, log_q = (m(inputs).logits[0, :-1].double().log_softmax(-1) for m in (model, perturbed))
        new = slice(-min(window.fresh, WINDOW - 1), None)
        kl.append(nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[new])
        agrees.append((log_p.argmax(-1) == log_q.argmax(-1))[new])
    return torch.cat(kl), torch.cat(agrees).double().mean().item()


@pytest.mark.parametrize(("stride", "prefix"), [(STRIDE, []), (WINDOW, []), (STRIDE, [0]), (STRIDE, [5, 0, 3])])
def test_scores_equal_those_of_plain_models(tiny_model: Path, stream: Tensor, stride: int, prefix: list[int]) -> None:
    found = summarize(rows_against_full_precision(tiny_model, stream, stride, prefix))
    end = full_windows(len(stream), WINDOW, stride)[-1].end
    expected = plain_perplexity(perturbed_plain(tiny_model), stream[:end], WINDOW, stride, prefix)
    kl, agreement = plain_divergence(tiny_model, stream, stride, prefix)
    assert found.perplexity.value == pytest.approx(expected, rel=1e-4)
    assert found.kl_divergence is not None
    assert found.kl_divergence.value == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(np.percentile(kl.numpy(), 99)), rel=1e-3)
    assert found.top1_agreement == pytest.approx(agreement, abs=1e-9)
    assert 0 < agreement < 1


def test_the_model_itself_has_no_divergence(tiny_gemma: Path, stream: Tensor) -> None:
    model = open_streamed(tiny_gemma)
    windows = full_windows(len(stream), WINDOW, STRIDE)
    tokens = window_tokens(stream, windows, [0])
    states = last_states(model, tokens)
    found = summarize(score_windows(model, windows, tokens, states, states))
    assert found.kl_divergence is not None
    assert (found.kl_divergence.value, found.top1_agreement) == (0.0, 1.0)
    alone = summarize(score_windows(model, windows, tokens, states, None))
    assert (alone.kl_divergence, alone.kl_p99, alone.top1_agreement) == (None, None, None)
    assert alone.perplexity == found.perplexity


@pytest.mark.parametrize("logits_at_once", [1, 512 * 3, 512 * 7])
def test_a_large_vocabulary_is_scored_piece_by_piece(
    tiny_qwen: Path, stream: Tensor, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_against_full_precision(tiny_qwen, stream, STRIDE, [])
    monkeypatch.setattr(streaming, "_LOGITS_AT_ONCE", logits_at_once)
    for row, expected in zip(rows_against_full_precision(tiny_qwen, stream, STRIDE, []), whole, strict=True):
        assert row.pop("prefix") == expected.pop("prefix") == []
        assert row.pop("kl") == pytest.approx(expected.pop("kl"), rel=1e-4, abs=1e-7)
        assert row == pytest.approx(expected, rel=1e-5)


def test_windows_follow_the_prefix(stream: Tensor) -> None:
    windows = full_windows(len(stream), WINDOW, STRIDE)
    assert window_tokens(stream, windows, [])[1].tolist() == stream[STRIDE : STRIDE + WINDOW].tolist()
    prefixed = window_tokens(stream, windows, [7, 3])
    assert prefixed.shape == (len(windows), WINDOW + 2)
    assert prefixed[1].tolist() == [7, 3, *stream[STRIDE : STRIDE + WINDOW].tolist()]


def break_layer_2(block: nn.Module, layer: int) -> None:
    if layer == 2:
        next(module for module in block.modules() if isinstance(module, nn.Linear)).weight.fill_(torch.inf)


def test_states_that_are_not_finite_name_layer_and_window(tiny_llama: Path, stream: Tensor) -> None:
    tokens = window_tokens(stream, full_windows(len(stream), WINDOW, STRIDE), [])
    with pytest.raises(NotFiniteError, match=r"leave layer 2 are not finite in window 0; .* give this layer more bits"):
        last_states(open_streamed(tiny_llama), tokens, break_layer_2)


def test_logits_that_are_not_finite_name_the_tokens(tiny_llama: Path, stream: Tensor) -> None:
    model = open_streamed(tiny_llama)
    windows = full_windows(len(stream), WINDOW, STRIDE)
    tokens = window_tokens(stream, windows, [])
    states = last_states(model, tokens)
    states[1, -2] = torch.inf
    with pytest.raises(NotFiniteError, match="logits of tokens 8 to 32 are not finite"):
        score_windows(model, windows, tokens, states, None)


def row(start: int, nll_sum: float, kl_sum: float | None = None, agreements: int | None = None) -> dict[str, Any]:
    """A window of 10 tokens, of which 5 are new but for the first."""
    fresh = 10 if start == 0 else 5
    table_row = {"start": start, "end": start + 10, "fresh": fresh, "prefix": [], "nll_sum": nll_sum}
    kl = None if kl_sum is None else [kl_sum] + [0.0] * (min(fresh, 9) - 1)
    return {**table_row, "kl_sum": kl_sum, "kl": kl, "top1_agreements": agreements}


def test_a_summary_weighs_tokens_equally() -> None:
    found = summarize([row(0, 18.0, 0.9, 6), row(5, 12.0, 1.0, 2), row(10, 9.0, 0.6, 5)])
    assert found.perplexity.value == pytest.approx(math.exp((2 * 10 + 12 + 9) / 20))
    assert found.kl_divergence is not None
    assert found.kl_divergence.value == pytest.approx(2.5 / 19)
    assert found.kl_divergence.stderr == pytest.approx(np.std([0.1, 0.2, 0.12], ddof=1) / math.sqrt(3))
    assert found.top1_agreement == pytest.approx(13 / 19)
    assert found.scored_tokens == 19


def test_an_infinite_perplexity_is_a_value() -> None:
    found = summarize([row(0, 9 * 800.0), row(5, 5 * 900.0), row(10, 5 * 1000.0)])
    assert (found.perplexity.value, found.perplexity.stderr) == (math.inf, None)
    assert found.broken_window == Window(0, 10, 10)
    partly = summarize([row(0, 9 * 2.0), row(5, math.inf)])
    assert (partly.perplexity.value, partly.broken_window) == (math.inf, Window(5, 15, 5))
    assert summarize([row(0, 18.0)]).broken_window is None


@pytest.mark.parametrize(("stride", "name"), [(512, "strided 1024/512"), (1024, "non-overlapping 1024")])
def test_the_protocol_is_named(stride: int, name: str) -> None:
    assert protocol_name(full_windows(4096, 1024, stride)) == name
    assert protocol_name(full_windows(1024, 1024, stride)) == "non-overlapping 1024"
    assert protocol_name(full_windows(4096, 1024, stride), [2]) == f"{name} behind token 2"
    assert protocol_name(full_windows(4096, 1024, stride), [7, 0]) == f"{name} behind tokens 7 0"


def test_paired_differences_are_those_of_the_same_windows() -> None:
    rows, baseline = [row(0, 18.0), row(5, 12.0), row(10, 9.0)], [row(0, 17.1), row(5, 12.5), row(10, 8.0)]
    found = paired_difference(rows, baseline)
    differences = [0.9 / 9, -0.5 / 5, 1.0 / 5]
    assert found.value == pytest.approx(np.mean(differences))
    assert found.stderr == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))
    assert paired_difference(rows, rows).value == 0.0


def test_rows_fit_the_windows_table(tiny_llama: Path, stream: Tensor, tmp_path: Path) -> None:
    rows = rows_against_full_precision(tiny_llama, stream, STRIDE, [])
    write_rows(tmp_path / "windows.parquet", WINDOWS_SCHEMA, rows)
    assert read_rows(tmp_path / "windows.parquet", WINDOWS_SCHEMA) == rows
