"""`EmbeddingMetrics` against a loop over queries and ranks in float64, and scikit-learn's mutual information."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import FEATURES, Loader, Net, batches, make_trainer
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import EMA, EmbeddingMetrics, KNNMonitor
from litzoo.zoo.batch import Batch
from litzoo.zoo.functional.subsets import stratified_subset

Pairs = list[tuple[Tensor, Tensor]]
RETRIEVAL = ("precision_at_1", "r_precision", "map_at_r")


def found(trainer: Any, stage: str = "val") -> dict[str, float]:
    start = f"{stage}/embedding_"
    return {name.removeprefix(start): float(value) for name, value in trainer.callback_metrics.items() if name.startswith(start)}


def of(model: Net, pairs: Pairs, features: str = "encode", autocast: bool = False) -> tuple[Tensor, Tensor]:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return torch.cat([getattr(model, features)(x) for x, _ in pairs]).float(), torch.cat([y for _, y in pairs])


def retrieval(query: Tensor, label: Tensor, others: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    reference, reference_label = (query, label) if others is None else others
    similarity = F.normalize(query.double()) @ F.normalize(reference.double()).T
    rows = []
    for number, row in enumerate(similarity):
        if label[number] < 0:
            continue
        order = [
            place
            for place in row.argsort(descending=True, stable=True).tolist()
            if reference_label[place] >= 0 and not (others is None and place == number)
        ]
        right = [int(reference_label[place] == label[number]) for place in order]
        if (count := sum(right)) == 0:
            continue
        right = right[:count]
        rows.append([right[0], sum(right) / count, sum(sum(right[: n + 1]) / (n + 1) * hit for n, hit in enumerate(right)) / count])
    end = "" if others is None else "_vs_train"
    return {f"{name}{end}": value for name, value in zip(RETRIEVAL, torch.tensor(rows).double().mean(dim=0).tolist(), strict=True)}


def clusters(features: Tensor, label: Tensor) -> dict[str, float]:
    points, truth = F.normalize(features)[label >= 0].numpy(), label[label >= 0].numpy()
    cluster = KMeans(len(set(truth.tolist())), n_init=1, random_state=0).fit_predict(points)
    return {"ami": adjusted_mutual_info_score(truth, cluster), "nmi": normalized_mutual_info_score(truth, cluster)}


def expected(features: Tensor, label: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Any:
    return pytest.approx({**retrieval(features, label, others), **clusters(features, label)}, abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_of_validation_and_test_in_both_spaces(precision: Any, tmp_path: Path) -> None:
    model, bf16 = Net(norm=True), precision == "bf16-mixed"
    trainer = make_trainer(tmp_path, EmbeddingMetrics(), EmbeddingMetrics("forward"), precision=precision)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 10)))
    scores = found(trainer)
    assert {name: value for name, value in scores.items() if "forward" not in name} == expected(*of(model, batches(9, 10), autocast=bf16))
    after = {name.removesuffix("_forward"): value for name, value in scores.items() if "forward" in name}
    assert after == expected(*of(model, batches(9, 10), "forward", bf16))
    trainer.test(model, Loader(batches(8, 6)), verbose=False)
    scores = {name: value for name, value in found(trainer, "test").items() if "forward" not in name}
    assert scores == expected(*of(model, batches(8, 6), autocast=bf16))


class Data(LightningDataModule):
    """Somebody's data."""

    def val_dataloader(self) -> Any:
        return Loader(batches(9, 6))

    def eval_train_dataloader(self) -> Any:
        return Loader(batches(3, 12))


def without_some_labels(pairs: Pairs) -> Pairs:
    return [(x, torch.tensor([-1, *y[1:].tolist()])) for x, y in pairs]


def unscored(model: Net) -> Net:
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    return model


def test_among_the_training_samples(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, EmbeddingMetrics(reference="train"), KNNMonitor(5))
    trainer.validate(model, datamodule=Data(), verbose=False)
    assert found(trainer) == expected(*of(model, batches(9, 6)), of(model, batches(3, 12)))
    train, val = without_some_labels(batches(3)), without_some_labels(batches(9, 6))
    trainer = make_trainer(tmp_path, EmbeddingMetrics(reference="train", reference_loader=train, clusters=False))
    trainer.validate(unscored(model), Loader(val), verbose=False)
    assert found(trainer) == pytest.approx(retrieval(*of(model, val), of(model, train)), abs=1e-6)


def test_samples_without_label(tmp_path: Path) -> None:
    model, val = unscored(Net()), without_some_labels(batches(9, 8))
    trainer = make_trainer(tmp_path, EmbeddingMetrics())
    trainer.validate(model, Loader(val), verbose=False)
    assert found(trainer) == expected(*of(model, val))


def test_views_are_samples(tmp_path: Path) -> None:
    class Images(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x.flatten(1))

    x, label = torch.randn(9, 2, FEATURES, 1, 1), torch.arange(9) % 3
    model = unscored(Images())
    trainer = make_trainer(tmp_path, EmbeddingMetrics())
    val: Any = [Batch(x[part], label[part], part) for part in torch.arange(9).split(4)]
    trainer.validate(model, Loader(val), verbose=False)
    assert found(trainer) == expected(*of(model, [(x.flatten(0, 1), label.repeat_interleave(2))]))


def test_a_part_of_the_samples(tmp_path: Path) -> None:
    val = batches(9, 30)
    label = torch.cat([y for _, y in val])
    kept = stratified_subset(label, 40)
    model = Net()
    trainer = make_trainer(tmp_path, EmbeddingMetrics(max_samples=40))
    trainer.validate(model, Loader(val), verbose=False)
    features, label = of(model, val)
    assert found(trainer) == expected(features[kept], label[kept])
    trainer = make_trainer(tmp_path, EmbeddingMetrics(max_samples=None))
    trainer.validate(model, Loader(val), verbose=False)
    assert found(trainer) == expected(features, label)


def test_without_a_second_class(tmp_path: Path) -> None:
    """One warning in a training, which goes on."""
    callback = EmbeddingMetrics()
    for classes, val in ((1, [(x, y * 0) for x, y in batches(9, 3)]), (0, [(x, y * 0 - 1) for x, y in batches(9, 3)])):
        trainer = make_trainer(tmp_path, callback)
        with pytest.warns(UserWarning, match="EmbeddingMetrics") as caught:
            trainer.fit(unscored(Net()), Loader(batches(0)), Loader(val))
        texts = [str(warning.message) for warning in caught if "EmbeddingMetrics" in str(warning.message)]
        assert texts == [f"EmbeddingMetrics: the samples of val have labels of {classes} classes, and two are needed: no score is logged"]
        assert found(trainer) == {}


@pytest.mark.parametrize("reference", ["own", "train"])
def test_without_a_neighbour_of_the_class(reference: Any, tmp_path: Path) -> None:
    train = [(x, y + 10) for x, y in batches(3)] if reference == "train" else None
    model, val = unscored(Net()), [(torch.randn(4, FEATURES), torch.arange(4))]
    trainer = make_trainer(tmp_path, EmbeddingMetrics(reference=reference, reference_loader=train))
    with pytest.warns(UserWarning, match="no sample of val has another one of its class to find: retrieval is not logged"):
        trainer.validate(model, Loader(val), verbose=False)
    assert found(trainer) == pytest.approx(clusters(*of(model, val)))


def test_a_training_that_diverges_goes_on(tmp_path: Path) -> None:
    class Diverged(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) / (0 if not self.training else 1)

    trainer = make_trainer(tmp_path, EmbeddingMetrics())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Diverged(), Loader(batches(0)), Loader(batches(9, 2)))
    assert not [warning for warning in caught if "distinct clusters" in str(warning.message)]
    assert found(trainer)["ami"] == pytest.approx(0.0, abs=1e-6)


def test_fast_dev_run_and_a_plain_loader(tmp_path: Path) -> None:
    val = DataLoader(TensorDataset(torch.randn(7, FEATURES), torch.arange(7) % 2), batch_size=7)
    trainer = make_trainer(tmp_path, EmbeddingMetrics(reference="train", reference_loader=batches(3)), fast_dev_run=True)
    trainer.fit(Net(), Loader(batches(0)), val)
    assert set(found(trainer)) == {*(f"{name}_vs_train" for name in RETRIEVAL), "ami", "nmi"}


def test_chooses_the_checkpoint_of_an_average(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/embedding_map_at_r", mode="max")
    model = Net()
    trainer = make_trainer(tmp_path, EMA(0.9), EmbeddingMetrics(clusters=False), best, enable_checkpointing=True)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    assert found(trainer) == pytest.approx(retrieval(*of(model, batches(9, 6))), abs=1e-6)
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert float(best.best_model_score) == pytest.approx(retrieval(*of(model, batches(9, 6)))["map_at_r"], abs=1e-6)


def test_mistakes(tmp_path: Path) -> None:
    for settings, match in (
        ({"reference": "val"}, "reference must be one of own, train, got 'val'"),
        ({"max_samples": 1}, "max_samples must be at least 2"),
        ({"reference_loader": batches(3)}, "with reference='train' only"),
        ({"features": "z"}, "features must be 'encode' or 'forward'"),
    ):
        with pytest.raises(ValueError, match=match):
            EmbeddingMetrics(**settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only once"):
        EmbeddingMetrics(reference="train", reference_loader=iter(batches(3)))
    with pytest.raises(MisconfigurationException, match="EmbeddingMetrics has no training samples to compare with"):
        make_trainer(tmp_path, EmbeddingMetrics(reference="train")).fit(Net(), Loader(batches(0)), Loader(batches(9, 2)))
    with pytest.raises(MisconfigurationException, match="same names as another one"):
        make_trainer(tmp_path, EmbeddingMetrics(), EmbeddingMetrics(clusters=False)).validate(Net(), Loader(batches(9, 2)))
    train = Loader(batches(0))
    with pytest.raises(MisconfigurationException, match="must not go through the training's own loader"):
        make_trainer(tmp_path, EmbeddingMetrics(reference="train", reference_loader=train)).fit(Net(), train, Loader(batches(9, 2)))


def val_set(number: int = 21) -> TensorDataset:
    """An odd number, of which a distributed sampler repeats one."""
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(number, FEATURES, generator=generator), torch.arange(number) % 3)


def run_rank(folder: Path) -> None:
    """One of two processes; Lightning deals out the validation samples, and repeats one."""
    metrics = EmbeddingMetrics(max_samples=15, reference="train", reference_loader=batches(3)), EmbeddingMetrics("forward")
    trainer = make_trainer(folder, *metrics, strategy="ddp", devices=2)
    model = Net()
    trainer.validate(model, DataLoader(val_set(), batch_size=4), verbose=False)
    torch.save(found(trainer), folder / f"rank_{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_equal_one(rank_folder: Path) -> None:
    model, val = Net(), [val_set().tensors]
    features, label = of(model, val)  # type: ignore[arg-type]
    kept = stratified_subset(label, 15)
    wanted = {**retrieval(features[kept], label[kept], of(model, batches(3))), **clusters(features[kept], label[kept])}
    after = of(model, val, "forward")  # type: ignore[arg-type]
    wanted |= {f"{name}_forward": value for name, value in {**retrieval(*after), **clusters(*after)}.items()}
    for rank in range(2):
        assert torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True) == pytest.approx(wanted, abs=1e-6)
