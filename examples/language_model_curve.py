"""Plot what averaging saves: a language model at a constant learning rate, its average, and an annealed run.

    torchrun --nproc_per_node=2 examples/language_model_curve.py      # about ten minutes on two cores
    python examples/language_model_curve.py                           # a single process, without a launcher

For each seed, the GPT of language_model.py is trained twice: at a constant learning rate, and with a rate that decays
to zero in the last part of the run. During the constant run, the trained weights and their EMA are evaluated on
held-out text. The plot shows the mean over the seeds, and the lowest and highest value as a band.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from dist_swa import SWA
from language_model import EVAL_BATCH, build, evaluate, load_text, train
from train import process_group


def curve(args: argparse.Namespace, seed: int, anneal: float, device: torch.device) -> Tensor:
    """Train one model; return bits per byte of trained and averaged weights at each evaluation: (evaluations, 2)."""
    args = argparse.Namespace(**{**vars(args), "seed": seed, "anneal": anneal})
    text, held_out = load_text()
    windows = held_out.unfold(0, args.context + 1, args.context)
    batches = windows.unfold(0, EVAL_BATCH, EVAL_BATCH).mT[:: args.eval_stride]
    model, data = build(args, device)
    rows: list[list[float]] = []

    def after_step(step: int, swa: SWA) -> None:
        if step % (args.steps // args.points) == 0:
            trained = evaluate(model, data, batches)
            with swa.swapped_in("ema"):
                rows.append([trained, evaluate(model, data, batches)])

    train(args, model, data, text, after_step)
    return torch.tensor(rows)


def report(args: argparse.Namespace, constant: Tensor, annealed: Tensor) -> None:
    """Print the results at the end of the runs, and plot the curves: (seeds, evaluations, 2)."""
    steps = torch.arange(1, args.points + 1) * (args.steps // args.points)
    last, averaged, decayed = constant[:, -1, 0], constant[:, -1, 1], annealed[:, -1, 0]
    print(f"{'bits per byte at the end':28}    mean   lowest  highest   ({args.seeds} seeds)")
    for name, values in (("constant rate", last), ("constant rate, EMA", averaged), ("annealed rate", decayed)):
        print(f"{name:28}{values.mean():8.4f} {values.min():8.4f} {values.max():8.4f}")
    reached = steps[constant[..., 1].mean(0) <= last.mean()]
    if len(reached):
        print(f"The EMA reaches the end of the constant rate after {int(reached[0])} of {args.steps} steps.")

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    curves = {"constant rate": (constant[..., 0], "tab:gray"), "its EMA": (constant[..., 1], "tab:red")}
    for name, (values, color) in (curves | {"annealed rate": (annealed[..., 0], "tab:blue")}).items():
        axes.plot(steps, values.mean(0), color=color, label=f"{name}: {values[:, -1].mean():.3f}")
        axes.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.25, linewidth=0)
    low, high = float(annealed[..., 0].min()), float(constant[:, args.points // 4 :, 0].max())
    axes.set(xlabel="step", ylabel="bits per byte of held-out text", ylim=(low - 0.05 * (high - low), high))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=150)


def parse_args() -> argparse.Namespace:
    description = "Plot a language model's loss at a constant rate, with and without averaging, and at an annealed one."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="length of each run")
    add("--seeds", type=int, default=3, help="number of runs at each learning rate")
    add("--anneal", type=float, default=0.3, help="part of the annealed run in which the learning rate decays to 0")
    add("--points", type=int, default=30, help="evaluations of each run")
    add("--eval-stride", type=int, default=8, help="evaluate every n-th batch of held-out text")
    add("--lr", type=float, default=3e-3, help="learning rate of AdamW after the warmup")
    add("--plot", type=Path, default=Path("outputs/language_model_curve.png"), metavar="PATH", help="the plot")
    args = parser.parse_args()
    # A smaller model than that of language_model.py, and an EMA of the whole run.
    small = {"batch": 16, "context": 64, "layers": 2, "width": 64, "window": 1, "update_interval": "1ba"}
    return argparse.Namespace(**small, swa_start="1ba", half_life=f"{max(1, args.steps // 20)}ba", **vars(args))


def main() -> None:
    args = parse_args()
    with process_group() as device:
        runs = [torch.stack([curve(args, s, a, device) for s in range(args.seeds)]) for a in (0.0, args.anneal)]
        if dist.get_rank() == 0:
            report(args, *runs)


if __name__ == "__main__":
    main()
