"""The classifier that remembers its features: against scikit-learn, and where it travels."""

import copy

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from litzoo.zoo import KNNClassifier

LABELS = torch.arange(120) % 4
FEATURES = torch.randn(120, 8, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(4, 8)[LABELS]
QUERY = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(4, 8)[torch.arange(30) % 4]


@pytest.mark.parametrize("scores", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 11, 120])
def test_against_scikit_learn(scores, k: int) -> None:
    classifier = KNNClassifier(6, k=k, temperature=0.2, scores=scores).fit(FEATURES, LABELS)
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    reference.fit(FEATURES.double().numpy(), LABELS.numpy())
    expected = reference.predict_proba(QUERY.double().numpy())
    for probability in (classifier(QUERY), classifier.predict_proba(7 * QUERY)):
        np.testing.assert_allclose(probability[:, :4].numpy(), expected, rtol=1e-4, atol=1e-6)
        assert probability[:, 4:].eq(0).all()
    assert classifier.predict(QUERY).tolist() == expected.argmax(1).tolist()


def test_travels_as_a_state_dict_of_any_size() -> None:
    fitted = nn.Sequential(nn.Identity(), KNNClassifier(4, k=5).fit(FEATURES, LABELS))
    for other in (KNNClassifier(4, k=5), KNNClassifier(4, k=5).fit(FEATURES[:10, :3], LABELS[:10])):
        for assign in (False, True):
            target = nn.Sequential(nn.Identity(), copy.deepcopy(other))
            target.load_state_dict(fitted.state_dict(), assign=assign)
            assert torch.equal(target(QUERY), fitted(QUERY))
    assert [key for key in fitted.state_dict() if key.startswith("1.")] == ["1.features", "1.labels"]
    assert len(list(fitted.parameters())) == 0


def test_keeps_its_own_copy() -> None:
    features, labels = FEATURES.clone(), LABELS.clone()
    classifier = KNNClassifier(4, k=5).fit(features, labels)
    before = classifier(QUERY)
    features.zero_()
    labels.zero_()
    assert torch.equal(classifier(QUERY), before)
    assert torch.equal(classifier.fit(FEATURES[:60], LABELS[:60])(QUERY), KNNClassifier(4, k=5).fit(FEATURES[:60], LABELS[:60])(QUERY))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    classifier = KNNClassifier(4, k=20).fit(FEATURES.to(dtype).requires_grad_(), LABELS)
    probability = classifier(QUERY.to(dtype))
    assert (classifier.features.dtype, probability.dtype, probability.requires_grad) == (torch.float32, torch.float32, False)
    torch.testing.assert_close(probability, KNNClassifier(4, k=20).fit(FEATURES, LABELS)(QUERY), rtol=0, atol=0.02)
    assert classifier.to(dtype)(QUERY).dtype == torch.float32


def test_fitted_in_inference_mode_it_can_be_updated_outside() -> None:
    with torch.inference_mode():
        classifier = KNNClassifier(4, k=5).fit(FEATURES, LABELS)
    classifier.load_state_dict(KNNClassifier(4, k=5).fit(FEATURES[:60], LABELS[:60]).state_dict())
    assert len(classifier.labels) == 60


def test_rows_without_label_are_left_out() -> None:
    labels = LABELS.where(torch.arange(120) < 90, -1)
    classifier = KNNClassifier(4, k=5).fit(FEATURES, labels)
    assert torch.equal(classifier(QUERY), KNNClassifier(4, k=5).fit(FEATURES[:90], LABELS[:90])(QUERY))
    assert "k=5, temperature=0.1, scores='fp32', features=90" in repr(classifier)


def test_mistakes() -> None:
    def refuses(message: str, classifier: KNNClassifier, features: Tensor = FEATURES, labels: Tensor = LABELS) -> None:
        with pytest.raises(ValueError, match=message):
            classifier.fit(features, labels)

    refuses("k = 200 neighbours are to vote, but only 120 features have a label", KNNClassifier(4))
    refuses(r"labels must lie in \[0, 3\)", KNNClassifier(3, k=5))
    refuses("one for each row", KNNClassifier(4, k=5), labels=LABELS[:5])
    refuses("not finite", KNNClassifier(4, k=5), features=FEATURES * torch.nan)
    with pytest.raises(ValueError, match="call fit"):
        KNNClassifier(4)(QUERY)
    with pytest.raises(ValueError, match="same D"):
        KNNClassifier(4, k=5).fit(FEATURES, LABELS)(QUERY[:, :5])
