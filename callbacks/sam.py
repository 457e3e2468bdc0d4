"""SAM: sharpness-aware minimisation."""

import math
from typing import ClassVar

from .perturbed_pass import PerturbedPass


class SAM(PerturbedPass):
    """Takes each gradient at the worst weights nearby, which leads to flat minima.

    With G(w) the gradient of a whole optimiser step, the optimiser gets

        G(w + e),   e = rho G(w) / ||G(w)||_2,

    with one norm over all weights. It wraps whatever optimiser the module has, and gradient clipping acts on G(w + e). With
    accumulation, e is that of the whole optimiser step, and under DDP that of all processes (the paper lets each
    accelerator perturb along its own gradient; here two processes equal one with the whole batch).

    Logs, torchmetrics, buffers such as BatchNorm's statistics and the random streams do not see the second pass, in which dropout
    draws other masks. What else the training step does, such as calling a logger itself, happens twice, and so do
    `on_before_backward` and `on_after_backward` of the module and of other callbacks: change gradients in
    `on_before_optimizer_step` instead. A training step must not change its batch in place.

    Cost: twice the forward and backward passes, two copies of the weights for the time of a step, and with accumulation
    the batches of a step. Composes with every callback but `FGM`. Refuses manual optimisation, LBFGS, sparse gradients and
    sharding strategies.

    Args:
        rho: radius of the neighbourhood, at least 0; the paper tries 0.01 to 0.5 and takes 0.05. 0 switches it off.
        every_n_steps: take every n-th optimiser step at the perturbed weights, the others plainly, which saves time.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> trainer = Trainer(callbacks=[SAM(rho=0.05)])

    Source:
        Foret, Kleiner, Mobahi & Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, algorithm 1 and equation 2 (p = 2).
    """

    replaces_gradient: ClassVar[bool] = True

    def __init__(self, rho: float = 0.05, every_n_steps: int = 1) -> None:
        if not (rho >= 0 and math.isfinite(rho)):
            raise ValueError(f"rho is the radius of the neighbourhood, and must be at least 0, got {rho}")
        super().__init__(every_n_steps)
        self.rho = rho

    def radius(self) -> float:
        return self.rho
