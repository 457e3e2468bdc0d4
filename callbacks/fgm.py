"""FGM: adversarial training by the fast gradient method on weights, usually those of an embedding."""

import math
import re
from collections.abc import Callable
from typing import ClassVar

from lightning.pytorch import LightningModule
from torch import nn

from .guards import refuse
from .perturbed_pass import PerturbedPass


class FGM(PerturbedPass):
    """Adds to each gradient that of the loss at adversarially perturbed target weights.

    With G(w) the gradient of a whole optimiser step and its part G_t on the target weights, the optimiser gets

        G(w) + G(w + r),   r = epsilon G_t(w) / ||G_t(w)||_2,

    one norm over all target weights together. The target is usually the embedding matrix, which turns the fast gradient
    method of the paper, made for the embedded words of each sample, into one perturbation of the matrix for the batch;
    that is how it is used in practice. With accumulation, r is that of the whole optimiser step (so 4 batches of 8 equal one
    of 32), and under DDP that of all processes.

    Logs, torchmetrics, buffers such as BatchNorm's statistics and the random streams do not see the second pass, in which dropout
    draws other masks. What else the training step does, such as calling a logger itself, happens twice, and so do
    `on_before_backward` and `on_after_backward` of the module and of other callbacks: change gradients in
    `on_before_optimizer_step` instead. A training step must not change its batch in place.

    Cost: twice the forward and backward passes, a copy of the target weights, and with accumulation the batches of a step.
    Composes with every callback but `SAM`. Refuses manual optimisation, LBFGS, sparse gradients and sharding strategies.

    Args:
        epsilon: length of the perturbation, at least 0; 0.1 to 1 for word embeddings. 0 switches it off.
        target: the weights: a regular expression that is searched in their names, such as "embedding", a module of the model
            (all its weights), or a function of name and parameter.
        every_n_steps: perturb every n-th optimiser step only, which saves time.

    Raises:
        ValueError: if a setting is out of range, or `target` is no regular expression.
        MisconfigurationException: at the start of `fit`, if nothing matches `target`.

    Example:
        >>> trainer = Trainer(callbacks=[FGM(0.5, target="embedding")])

    Source:
        Miyato, Dai & Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017,
        equation 5; Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """

    replaces_gradient: ClassVar[bool] = False

    # A module is callable, too; naming nn.Module here would make the command line's completion list all of torch.
    def __init__(self, epsilon: float, target: str | Callable[[str, nn.Parameter], bool], every_n_steps: int = 1) -> None:
        if not (epsilon >= 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon is the length of the perturbation, and must be at least 0, got {epsilon}")
        if isinstance(target, str):
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f"target {target!r} is no regular expression ({error}): escape special characters by a backslash"
                ) from error
        super().__init__(every_n_steps)
        self.epsilon = epsilon
        self.target = target

    def radius(self) -> float:
        return self.epsilon

    def targets(self, pl_module: LightningModule) -> list[nn.Parameter]:
        named = dict(pl_module.named_parameters())
        target = self.target
        if isinstance(target, str):
            found = [parameter for name, parameter in named.items() if re.search(target, name)]
        elif isinstance(target, nn.Module):
            wanted = {id(parameter) for parameter in target.parameters()}
            found = [parameter for parameter in named.values() if id(parameter) in wanted]
        else:
            found = [parameter for name, parameter in named.items() if target(name, parameter)]
        if not found:
            shown = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
            names = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
            raise refuse(self, f"found no weight for target {shown!r}", f"the names are {names}")
        return found
