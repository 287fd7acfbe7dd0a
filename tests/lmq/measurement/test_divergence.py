import pytest
import torch
from torch import Tensor

from lmq.measurement.divergence import score_tokens


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference(logits: Tensor) -> Tensor:
    return logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)


def test_scores_equal_torch_in_float64(logits: Tensor, reference: Tensor, targets: Tensor) -> None:
    found = score_tokens(logits, targets, reference)
    log_p, log_p_reference = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_p, log_p_reference, reduction="none", log_target=True).sum(-1)
    nll = torch.nn.functional.cross_entropy(logits.double(), targets.long(), reduction="none")
    assert found.kl is not None
    assert found.agrees is not None
    assert found.nll.dtype == found.kl.dtype == torch.float64
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.nll, nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.agrees, logits.argmax(-1) == reference.argmax(-1))
    assert 0 < found.agrees.sum() < len(targets)


def test_a_model_does_not_diverge_from_itself(logits: Tensor, targets: Tensor) -> None:
    found = score_tokens(logits, targets, logits.clone())
    assert found.kl is not None
    assert found.agrees is not None
    assert torch.equal(found.kl, torch.zeros(40, dtype=torch.float64))
    assert found.agrees.all()


def test_without_a_reference_only_the_likelihood_is_scored(logits: Tensor, targets: Tensor) -> None:
    found = score_tokens(logits, targets, None)
    assert (found.kl, found.agrees) == (None, None)


def test_certain_predictions_stay_finite() -> None:
    certain, opposite = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    found = score_tokens(certain, torch.tensor([2]), opposite)
    assert found.nll.item() == pytest.approx(2e4)
    assert found.kl is not None
    assert found.kl.item() == pytest.approx(2e4)


def test_half_precision_logits_are_scored_in_float32(logits: Tensor, targets: Tensor) -> None:
    half = logits.bfloat16()
    assert torch.equal(score_tokens(half, targets, None).nll, score_tokens(half.float(), targets, None).nll)
