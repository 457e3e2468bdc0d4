"""The synthetic patients of the CNTK-101 tutorial."""

import numpy as np
import torch

from .arrays import ArrayDataModule, Arrays
from .splits import TEST, TRAIN, VAL

_MINIBATCHES, _MINIBATCH = 800, 25


class PatientsDataModule(ArrayDataModule):
    """Synthetic patients with age and tumour size: benign ~ N((3, 3), I), malignant ~ N((6, 6), 4 I), in equal parts.

    The stream of the CNTK-101 tutorial: 32 samples (here the validation split), then 800 minibatches of 25 in fixed order,
    drawn one after the other, then 25 test samples. The best line errs on 7.3 % of such patients, the best rule on 6.3 %.

    Args:
        data_seed: seed of the stream; the tutorial's is 0.
        batch_size: the tutorial's is 25.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of the samples' keys; None takes that of `seed_everything`, or 0. Nothing here depends on it.

    Example:
        >>> PatientsDataModule().class_names
        ['benign', 'malignant']

    Source:
        Microsoft CNTK, tutorial 101, "Logistic Regression and ML Primer".
    """

    def __init__(
        self,
        *,
        data_seed: int = 0,
        batch_size: int = 25,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, shuffle=False)
        self.data_seed = data_seed

    def read(self) -> Arrays:
        stream = np.random.RandomState(self.data_seed)
        points, labels = [], []
        for size in (32, *[_MINIBATCH] * _MINIBATCHES, 25):
            label = stream.randint(0, 2, size=(size, 1))
            points.append((stream.randn(size, 2) + 3) * (label + 1))
            labels.append(label[:, 0])
        split = np.repeat([VAL, TRAIN, TEST], [32, _MINIBATCHES * _MINIBATCH, 25]).astype(np.uint8)
        return Arrays(
            input=torch.from_numpy(np.concatenate(points).astype(np.float32)),
            label=torch.from_numpy(np.concatenate(labels)).long(),
            split=torch.from_numpy(split),
            class_names=("benign", "malignant"),
        )
