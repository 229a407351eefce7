"""Weight averaging (SWA, EMA, windows) for PyTorch training that is already distributed."""

# What does a training loop talk to, and where is the average?
from dist_swa.averaging.average import ShardedAverage

# How much does each model weigh in the average?
from dist_swa.averaging.rules import EMA, DecayShaped, Equal, Polynomial, PowerEMA, Rule, Window

# Are the BatchNorm statistics those of the averaged weights?
from dist_swa.batch_norm.recalibrate import recalibrate_batch_norm
from dist_swa.swa import SWA

__version__ = "0.2.0"

__all__ = [
    "EMA",
    "SWA",
    "DecayShaped",
    "Equal",
    "Polynomial",
    "PowerEMA",
    "Rule",
    "ShardedAverage",
    "Window",
    "__version__",
    "recalibrate_batch_norm",
]
