"""Fine-tuning that starts at the output: one more layer group trains every few epochs."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from .guards import refuse, refuse_sharded, refuse_together
from .layer_groups import check_patterns, layer_groups


class GradualUnfreeze(Callback):
    """Trains the last layer group first, and one more, towards the input, every few epochs.

    Epoch e trains the last 1 + floor(e / every_n_epochs) groups. The others are frozen: no gradient, no weight decay, and
    running statistics of BatchNorm stand still (eval mode). Parameters that were frozen before stay frozen, though their
    groups count. What is frozen depends on the epoch alone, so a resumed run equals the uninterrupted one. The end of
    `fit`, or an exception, gives back `requires_grad` and the modes. With one group it changes nothing.

    Cost: none; in one process the backward pass stops at the first trained group. Under DDP, whose reducer wants every
    gradient, the backward pass is whole, and the gradients of frozen groups are dropped before clipping and the step.
    Composes with every callback but other freezers (BaseFinetuning) and StochasticWeightAveraging; not with strategies
    that shard parameters. Put it before FGM and SAM, which then see no gradient of a frozen group under DDP either. Give
    the optimizer all parameters, including those that start frozen.

    Args:
        every_n_epochs: epochs between two groups, at least 1.
        groups: regular expressions for parameter names, from the input to the output, the first that matches wins; None
            takes the module's children in order of registration, which must then be that from the input to the output.
            A tied weight belongs to the group of its first name.

    Raises:
        ValueError: if `every_n_epochs` is below 1, or `groups` does not fit the module.
        MisconfigurationException: at the start of `fit`, under what it does not compose with, and if no optimizer holds a
            parameter that is to be unfrozen.

    Example:
        >>> trainer = Trainer(callbacks=[GradualUnfreeze(groups=[r"stem", r"layer[12]", r"layer[34]", r"head"])])

    Source:
        Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.3.
    """

    def __init__(self, every_n_epochs: int = 1, groups: Sequence[str] | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        check_patterns(groups)
        self.every_n_epochs = every_n_epochs
        self.groups = groups
        self._parameters: list[list[nn.Parameter]] = []
        self._norms: list[tuple[nn.Module, int]] = []
        self._frozen: list[nn.Parameter] = []
        self._stilled: set[nn.Module] = set()
        self._first = 0
        self._wrapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(self, trainer)
        refuse_together(self, trainer, {"BaseFinetuning", "GradualUnfreeze"}, "which freezes parameters too")
        refuse_together(self, trainer, {"StochasticWeightAveraging"}, "which measures anew the statistics of BatchNorm, frozen or not")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here optimizers exist, and hold what they would hold without this callback."""
        groups = layer_groups(pl_module, self.groups)
        held = {parameter for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        for _, members in groups[:-1]:
            for name, parameter in members:
                if parameter.requires_grad and parameter not in held:
                    raise refuse(
                        self, f"is to unfreeze {name!r}, which no optimizer holds", "give the optimizer all parameters from the start"
                    )
        self._parameters = [[parameter for _, parameter in members] for _, members in groups]
        self._norms = _norms(pl_module, {parameter: depth for depth, members in enumerate(self._parameters) for parameter in members})
        # The reducer of DDP is built by now: it waits for the gradient of each parameter that required one then.
        self._wrapped = trainer.world_size > 1 or trainer.model is not pl_module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Every batch, because a run resumed within an epoch gets no on_train_epoch_start, and modules may change their modes."""
        first = max(len(self._parameters) - 1 - trainer.current_epoch // self.every_n_epochs, 0)
        if first != self._first:
            self._thaw()
            self._frozen = [parameter for members in self._parameters[:first] for parameter in members if parameter.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad = self._wrapped
            self._first = first
        for norm, depth in self._norms:
            if depth < first and norm.training:
                norm.eval()
                self._stilled.add(norm)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Again, because FGM and SAM run a second backward pass, and manual optimisation may hide the first."""
        self._drop_gradients()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._thaw()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw()
        self._parameters, self._norms = [], []  # a callback that is copied or pickled carries no network

    def _drop_gradients(self) -> None:
        """A gradient of None, unlike one of zero, lets the optimizer skip weight decay and momentum too."""
        for parameter in self._frozen:
            parameter.grad = None

    def _thaw(self) -> None:
        """Undo what was done to the module; a second call does nothing."""
        self._drop_gradients()
        for parameter in self._frozen:
            parameter.requires_grad = True
        for norm in self._stilled:
            norm.train()
        self._frozen, self._stilled, self._first = [], set(), 0


def _norms(module: nn.Module, depth_of: dict[nn.Parameter, int]) -> list[tuple[nn.Module, int]]:
    """The layers with running statistics, each with its group: the last one in the smallest module around it with parameters."""
    found: list[tuple[nn.Module, int]] = []
    for name, norm in module.named_modules():
        if isinstance(norm, _NormBase):
            around: nn.Module = norm
            while name and next(around.parameters(), None) is None:
                name = name.rpartition(".")[0]
                around = module.get_submodule(name)
            found.append((norm, max((depth_of[parameter] for parameter in around.parameters()), default=0)))
    return found
