"""Weight averaging (SWA, EMA, windows) for PyTorch training that is already distributed."""

# What does a training loop talk to, and where is the average?
from dist_swa.average import ShardedAverage

# Are the BatchNorm statistics those of the averaged weights?
from dist_swa.batch_norm import recalibrate_batch_norm

# How much does each model weigh in the average?
from dist_swa.rules import EMA, DecayShaped, Equal, Polynomial, PowerEMA, Window
from dist_swa.swa import SWA

__all__ = [
    "EMA",
    "SWA",
    "DecayShaped",
    "Equal",
    "Polynomial",
    "PowerEMA",
    "ShardedAverage",
    "Window",
    "recalibrate_batch_norm",
]
