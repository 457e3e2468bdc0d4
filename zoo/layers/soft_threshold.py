"""Soft thresholding with thresholds that the network learns, of deep residual shrinkage networks."""

from torch import Tensor, nn


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Shrink towards zero: sign(x) max(|x| - threshold, 0). With a fixed threshold it is `torch.nn.Softshrink`.

    Args:
        x: any shape, float.
        threshold: at least 0; broadcasts with x.

    Returns:
        The shape of x.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
        tensor([-2.,  0.,  1.])
    """
    return x - x.clamp(-threshold, threshold)


class SoftThreshold(nn.Module):
    """Soft thresholding of each sample by thresholds made from it: tau = alpha mean |x|, alpha = sigmoid(net(GAP |x|)).

    GAP is the mean over all positions of a channel, the net two linear layers with BatchNorm and ReLU between. Channel-wise, each
    channel has its alpha and its mean of |x|, so that no threshold removes all of a channel, as alpha < 1; shared, one alpha and the mean
    over all channels make one tau for the sample, which may.

    Args:
        channels: C.
        shared: one threshold for all channels of a sample (DRSN-CS) instead of one each (DRSN-CW).

    Raises:
        ValueError: in `forward`, if the input has no positions, or a training batch is a single sample.

    Example:
        >>> SoftThreshold(16)(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])

    Source:
        Zhao, Zhong, Fu & Pecht, "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE Transactions on Industrial Informatics
        16(7), 2020.
    """

    def __init__(self, channels: int, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.net = nn.Sequential(
            nn.Linear(channels, channels, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, 1 if shared else channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, N)`, `(B, C, H, W)`, ... -> the same shape."""
        if x.dim() < 3:
            raise ValueError(
                f"thresholds are made from positions: the input must be (batch, channels, positions ...), got {tuple(x.shape)}"
            )
        if len(x) == 1 and self.net[1].training:  # BatchNorm over the batch alone
            raise ValueError("thresholds are trained on batches of at least two samples, got one: set drop_last, or another batch size")
        average = x.abs().mean(dim=tuple(range(2, x.dim())))
        scale = average.mean(dim=1, keepdim=True) if self.shared else average
        threshold = self.net(average).to(x.dtype) * scale
        return soft_threshold(x, threshold.view(*threshold.shape, *[1] * (x.dim() - 2)))
