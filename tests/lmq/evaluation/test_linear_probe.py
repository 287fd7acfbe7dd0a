import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lmq.errors import InputError
from lmq.evaluation.linear_probe import probe_predictions


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    images, labels = (torch.tensor(found) for found in load_digits(return_X_y=True))
    images += 4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = probe_predictions(images[:300], labels[:300] + 3, images[300:900])
    scaler = StandardScaler().fit(images[:300])
    theirs = LogisticRegression(max_iter=2000, tol=1e-8).fit(scaler.transform(images[:300]), labels[:300] + 3)
    expected = torch.tensor(theirs.predict(scaler.transform(images[300:900])))
    assert (found == expected).double().mean() > 0.995
    assert 0.6 < (found == labels[300:900] + 3).double().mean() < 0.99


def test_one_class_is_no_probe() -> None:
    with pytest.raises(InputError, match="of one class"):
        probe_predictions(torch.ones(4, 2), torch.zeros(4), torch.ones(1, 2))
