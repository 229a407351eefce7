"""Count, mean and squared deviations per channel: of a batch, of all batches, of all ranks.

Sums are float64, and parts are merged by Chan's formula (Chan, Golub, LeVeque 1983): never a mean of variances, and
never ``E[x^2] - E[x]^2``, which cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Moments:
    """Moments per channel of what a layer was given.

    Of values: `count` of them have the `mean`, and `deviations` is the sum of their squared deviations from it.
    Of instances (InstanceNorm): `mean` is the mean over `count` instances of their means, and `deviations` the sum of
    their variances; how far their means lie apart does not enter, as torch has it.
    """

    mean: Tensor
    deviations: Tensor
    is_of_instances: bool = False
    count: int = 0
    num_forwards: int = 0
    num_skipped: int = 0  # forwards that had one value per channel, and so no variance

    @classmethod
    def zeros(cls, num_channels: int, device: torch.device, is_of_instances: bool) -> Moments:
        mean, deviations = torch.zeros(2, num_channels, dtype=torch.float64, device=device)
        return cls(mean, deviations, is_of_instances)

    def add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Merge the mean and unbiased variance of `count` values in, or the means of those of `count` instances."""
        total = self.count + count
        delta = mean - self.mean
        self.mean.add_(delta, alpha=count / total)
        self.deviations.add_(variance, alpha=self._freedom(count))
        if not self.is_of_instances:
            self.deviations.addcmul_(delta, delta, value=self.count / total * count)
        self.count = total
        self.num_forwards += 1

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of all values, or the mean of those of all instances."""
        return self.deviations / self._freedom(self.count)

    def _freedom(self, count: int) -> int:
        return count if self.is_of_instances else count - 1


def merge_ranks(moments: Sequence[Moments], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Make every rank's moments those of all ranks. Two all-reduces, whatever the number of layers and ranks."""
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
