"""A signal that asks all ranks of a run to end, as SLURM sends one before the time limit."""

import signal

import torch
import torch.distributed as dist


class StopRequest:
    """Receives SIGUSR1. Ask it between two steps, save and return if `is_agreed`.

    The signal reaches the ranks at different times, so they agree before which step they end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._received = device, False
        signal.signal(signal.SIGUSR1, lambda *_: self._receive())

    def is_agreed(self) -> bool:
        """Whether any rank has received the signal. A collective; every rank gets the same answer."""
        received = torch.tensor(int(self._received), device=self._device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return bool(received)

    def _receive(self) -> None:
        self._received = True
