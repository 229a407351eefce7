"""Mean and variance per channel, accumulated in float64 over batches and merged over ranks.

Partial results are merged with the formula of Chan, Golub and LeVeque (1983). Averaging the variances of batches would
be wrong, and ``E[x^2] - E[x]^2`` loses precision by cancellation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Moments:
    """Moments per channel of the inputs of a layer.

    BatchNorm: `count` is the number of values, `deviations` the sum of their squared deviations from `mean`.
    InstanceNorm: `count` is the number of instances, `mean` the mean of their means, `deviations` the sum of their
    variances. The spread between the means of instances is ignored, as torch does.
    """

    mean: Tensor
    deviations: Tensor
    is_of_instances: bool = False
    count: int = 0
    num_forwards: int = 0
    num_skipped: int = 0  # forwards with one value per channel, which has no variance

    @classmethod
    def zeros(cls, num_channels: int, device: torch.device, is_of_instances: bool) -> Moments:
        mean, deviations = torch.zeros(2, num_channels, dtype=torch.float64, device=device)
        return cls(mean, deviations, is_of_instances)

    def add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Add the mean and the unbiased variance of `count` values, or their means over `count` instances."""
        total = self.count + count
        delta = mean - self.mean
        self.mean.add_(delta, alpha=count / total)
        self.deviations.add_(variance, alpha=self._degrees_of_freedom(count))
        if not self.is_of_instances:
            self.deviations.addcmul_(delta, delta, value=self.count / total * count)
        self.count = total
        self.num_forwards += 1

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of all values, or the mean of the variances of all instances."""
        return self.deviations / self._degrees_of_freedom(self.count)

    def _degrees_of_freedom(self, count: int) -> int:
        return count if self.is_of_instances else count - 1


def merge_ranks(moments: Sequence[Moments], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Replace the moments of every rank by those of all ranks of `group`, with two all-reduces. A collective."""
    if not dist.is_initialized():
        return
    sizes = [part.mean.numel() for part in moments]
    counts = [[part.count, part.num_forwards, part.num_skipped] for part in moments]
    sums = torch.cat(
        [
            torch.tensor(counts, dtype=torch.float64, device=device).flatten(),
            *(part.mean.to(device) * part.count for part in moments),
        ]
    )
    dist.all_reduce(sums, group=group)
    totals = sums[: 3 * len(moments)].view(-1, 3).tolist()
    means = sums[3 * len(moments) :].split_with_sizes(sizes)
    for part, (count, num_forwards, num_skipped), mean_sum in zip(moments, totals, means, strict=True):
        mean = mean_sum.to(part.mean.device) / max(count, 1)
        if not part.is_of_instances:
            part.deviations += (part.mean - mean).square() * part.count
        part.mean, part.count = mean, int(count)
        part.num_forwards, part.num_skipped = int(num_forwards), int(num_skipped)
    deviations = torch.cat([part.deviations.to(device) for part in moments])
    dist.all_reduce(deviations, group=group)
    for part, merged in zip(moments, deviations.split_with_sizes(sizes), strict=True):
        part.deviations = merged.to(part.deviations.device)
