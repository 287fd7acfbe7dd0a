from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score
from torch import nn

from lmq.errors import NotFiniteError
from lmq.evaluation.predictions import COSINE, RECALL, TOP_1, TOP_5, score_images, summarize_predictions
from lmq.evaluation.windows import last_states
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from tests.towers import CLASSES, IMAGE, make_encoder


def opened(path: Path, name: str) -> StreamedModel:
    make_encoder(path, name)
    return StreamedModel.open(path, discover(path))


def test_accuracies_are_those_of_scikit_learn(tmp_path: Path) -> None:
    model = opened(tmp_path, "vit")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, IMAGE, IMAGE, generator=generator)
    labels = torch.randint(0, CLASSES, (60,), generator=generator)
    states = last_states(model, images)
    changed = states + 0.1 * torch.randn(states.shape, generator=generator)
    rows = score_images(model, labels, changed, states)
    found = summarize_predictions(rows)
    logits, reference = (model.head_logits(each).detach().double() for each in (changed, states))
    probabilities = logits.softmax(-1).numpy()
    assert found.perplexity is not None
    assert found.kl_divergence is not None
    assert found.perplexity.value == pytest.approx(np.exp(log_loss(labels, probabilities)), rel=1e-5)
    scores = {score.task: score.value for score in found.scores}
    assert scores[TOP_1] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=1))
    assert scores[TOP_5] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert scores[RECALL] == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(1)))
    divergence = nn.functional.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction="batchmean")
    assert found.kl_divergence.value == pytest.approx(divergence.item(), rel=1e-4)
    assert found.top1_agreement == (logits.argmax(1) == reference.argmax(1)).double().mean().item()
    assert found.protocol == f"60 images of {CLASSES} classes"


def test_an_encoder_without_a_head_is_judged_by_the_angle_of_its_embeddings(tmp_path: Path) -> None:
    model = opened(tmp_path, "dinov2-base")
    states = last_states(model, torch.randn(4, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0)))
    changed = states + 0.2
    found = summarize_predictions(score_images(model, torch.zeros(4), changed, states))
    before, after = (model.head_logits(each).detach().double() for each in (states, changed))
    expected = 1 - nn.functional.cosine_similarity(before, after).mean().item()
    assert found.kl_divergence is not None
    assert found.kl_divergence.value == pytest.approx(expected, rel=1e-3)
    assert (found.perplexity, found.top1_agreement) == (None, None)
    assert [score.task for score in found.scores] == [COSINE]
    assert found.protocol == "4 images without labels or classes"


def test_outputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = opened(tmp_path, "vit")
    states = last_states(model, torch.randn(3, 3, IMAGE, IMAGE))
    states[1] = torch.inf
    with pytest.raises(NotFiniteError, match="the outputs for image 1"):
        score_images(model, None, states, None)
