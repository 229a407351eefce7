"""Train a small BatchNorm classifier on scikit-learn's digits, on any number of ranks, and average its weights.

    torchrun --nproc_per_node=8 examples/train.py       # FSDP2; also --wrapper hsdp, --wrapper ddp
    python examples/train.py                            # a single process, without a launcher

This is an ordinary distributed training script. Comments with "dist_swa:" mark everything that averaging adds to it.

In every epoch, 30 % of the labels are replaced by random wrong ones, which keeps the gradients noisy. At a constant
learning rate the last iterate then moves around the optimum, and the average of the iterates is closer to it.
BatchNorm statistics depend on the weights, so those of the average are measured again ("recalibrated").
The order and the noise of the data depend on the seed only: any number of ranks trains on the same global batches.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dist_swa import SWA, recalibrate_batch_norm  # dist_swa: the controller, and the BatchNorm pass
from dist_swa.checkpoint import CheckpointFolder  # dist_swa: a killed save leaves the older checkpoints intact
from stop_request import StopRequest

Data = tuple[Tensor, Tensor]  # images, labels

NUM_TRAIN, GLOBAL_BATCH, WRONG_LABELS = 900, 32, 0.3
STEPS_PER_EPOCH = NUM_TRAIN // GLOBAL_BATCH
ROWS = ("last iterate", "averaged, stale BatchNorm", "averaged, recalibrated")


def load_data() -> tuple[Data, Data]:
    """Return 900 training and 897 test images with their labels, in a fixed split."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float().view(-1, 1, 8, 8) / 16, labels[order]
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])


def load_batches(train: Data, seed: int, epoch: int, device: torch.device) -> Iterator[Data]:
    """Yield this rank's slices of the global batches of an epoch."""
    (images, labels), generator = train, torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(NUM_TRAIN, generator=generator)
    is_wrong = torch.rand(NUM_TRAIN, generator=generator) < WRONG_LABELS
    labels = (labels + is_wrong * torch.randint(1, 10, (NUM_TRAIN,), generator=generator)) % 10
    for batch in order[: STEPS_PER_EPOCH * GLOBAL_BATCH].view(-1, GLOBAL_BATCH):
        mine = slice_of_rank(batch)
        yield images[mine].to(device), labels[mine].to(device)


def slice_of_rank(tensor: Tensor) -> Tensor:
    return tensor.tensor_split(dist.get_world_size())[dist.get_rank()]


def build_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def wrap(model: nn.Module, wrapper: str, device: torch.device) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    ranks = dist.get_world_size()
    replicas = 2 if wrapper == "hsdp" and ranks % 2 == 0 else 1
    mesh = init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh if wrapper == "hsdp" else mesh["shard"])
    return model


def evaluate(model: nn.Module, test: Data, device: torch.device) -> Tensor:
    """Return accuracy (%) and negative log-likelihood (nats) on the test set. Each rank evaluates a slice of it.

    BatchNorm statistics differ between ranks; all ranks use those of rank 0.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    images, labels = (slice_of_rank(part).to(device) for part in test)
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train()
    sums = torch.stack([100 * (logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")])
    dist.all_reduce(sums)
    return sums.cpu() / len(test[1])


class Run(NamedTuple):
    """The state that a checkpoint contains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    history: Tensor  # accuracy and NLL for each epoch and each of ROWS; NaN before averaging starts
    swa: SWA  # dist_swa: the average and the position in the schedule

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "history": self.history}
        return state | {"swa": self.swa}  # dist_swa: loads on any number of ranks

    @property
    def step(self) -> int:
        """The number of optimizer steps made."""
        return self.swa.schedule.now.batches

    def save(self, folder: CheckpointFolder) -> None:
        folder.save(self.step, self.state_dict())

    def resume(self, folder: CheckpointFolder) -> None:
        """Load the latest checkpoint, if there is one."""
        state = self.state_dict()
        if folder.load_latest(state) is not None:
            model, optimizer = state["model"], state["optimizer"]
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def train(args: argparse.Namespace, device: torch.device) -> None:
    train_data, test_data = load_data()
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = wrap(build_model().to(device), args.wrapper, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    num_steps = args.epochs * STEPS_PER_EPOCH
    # dist_swa: each rank averages its own shard of the weights, after every step from swa_start to the end
    swa = SWA(model, max_duration=f"{num_steps}ba", steps_per_epoch=STEPS_PER_EPOCH, swa_start=args.swa_start)
    history = torch.full((args.epochs, len(ROWS), 2), torch.nan)
    run = Run(model, optimizer, history, swa)
    folder = CheckpointFolder(args.checkpoint_dir) if args.checkpoint_dir else None
    stop = StopRequest(device) if folder else None  # SIGUSR1: save and end
    if folder:
        run.resume(folder)

    is_first, done, saved = dist.get_rank() == 0, run.step, run.step
    stack = ExitStack()
    bar = stack.enter_context(tqdm(total=num_steps, initial=done, unit="step", disable=not is_first))
    log = stack.enter_context(logger(args.tensorboard))
    for epoch in range(done // STEPS_PER_EPOCH, args.epochs):
        made = run.step - epoch * STEPS_PER_EPOCH  # in this epoch, before the run was resumed
        for images, labels in islice(load_batches(train_data, args.seed, epoch, device), made, None):
            if folder and stop and stop.is_agreed():
                if run.step > saved:
                    run.save(folder)
                stack.close()
                return
            # The wrappers average gradients over ranks; this scale makes them the mean over the global batch.
            loss = F.cross_entropy(model(images), labels, reduction="sum") * dist.get_world_size() / GLOBAL_BATCH
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            swa.step()  # dist_swa: counts the step and updates the average when it is due
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
        history[epoch, 0] = evaluate(model, test_data, device)
        if swa.started:  # dist_swa: evaluates the average; this does not change the training run
            with swa.swapped_in():  # dist_swa: inside, the model has the averaged weights
                history[epoch, 1] = evaluate(model, test_data, device)
                # dist_swa: BatchNorm statistics of the averaged weights, from the batches of all ranks
                recalibrate_batch_norm(model, load_batches(train_data, args.seed, epoch, device))
                history[epoch, 2] = evaluate(model, test_data, device)
        log(
            (epoch + 1) * STEPS_PER_EPOCH,
            {"accuracy": float(history[epoch, 0, 0]), **swa.metrics(distance=swa.started)},
        )
        if folder and (epoch + 1) % args.checkpoint_every == 0:
            run.save(folder)
            saved = run.step
    stack.close()

    # dist_swa: copies the average into the model and recalibrates BatchNorm
    swa.finalize(load_batches(train_data, args.seed, args.epochs - 1, device))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first:
        report(args, history, weights)


def report(args: argparse.Namespace, history: Tensor, weights: dict[str, Any]) -> None:
    """Print the results of the last epoch, and write the requested files."""
    table = {row: {"accuracy": acc, "nll": nll} for row, (acc, nll) in zip(ROWS, history[-1].tolist(), strict=True)}
    print(f"{'':28}accuracy     NLL")
    for row, figures in table.items():
        print(f"{row:28}{figures['accuracy']:6.2f} %{figures['nll']:8.4f}")
    plot(history[..., 0], args.plot)
    if args.json:
        args.json.write_text(json.dumps({"table": table, "history": history.tolist()}, indent=2))
    if args.save:
        torch.save(weights, args.save)


def plot(accuracy: Tensor, path: Path) -> None:
    """Plot the accuracy of the last iterate and of the recalibrated average over the epochs."""
    last, _, averaged = accuracy.T.tolist()
    start = 1 + sum(value != value for value in averaged)
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    epochs = range(1, len(last) + 1)
    axes.plot(epochs, last, color="tab:gray", label=f"last iterate: {last[-1]:.1f} %")
    axes.plot(epochs, averaged, color="tab:red", linewidth=2.5, label=f"average, recalibrated: {averaged[-1]:.1f} %")
    axes.axvline(start, color="black", linestyle=":", linewidth=1, label="averaging starts")
    axes.set_title("Digits, 30 % of the training labels wrong", pad=30)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(min(last[len(last) // 6 :]) - 1, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, handlelength=1.5, columnspacing=1.5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    description = "Train a small BatchNorm classifier on scikit-learn's digits and average its weights."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--wrapper", choices=("fsdp2", "hsdp", "ddp"), default="fsdp2", help="how the model is distributed")
    add("--epochs", type=int, default=30, help=f"length of the run, {STEPS_PER_EPOCH} steps each")
    add("--lr", type=float, default=0.1, help="learning rate of SGD, constant")
    add("--seed", type=int, default=0, help="seed of the initial weights, the order of the data and the wrong labels")
    add("--swa-start", default="0.7dur", metavar="TIME", help='when averaging starts: "0.7dur", "20ep", "500ba"')
    add("--checkpoint-dir", type=Path, metavar="DIR", help="save here, and resume the latest (of as many epochs)")
    add("--checkpoint-every", type=int, default=5, metavar="EPOCHS", help="epochs between checkpoints")
    add("--plot", type=Path, default=Path("outputs/digits_swa.png"), metavar="PATH", help="plot of the accuracy")
    add("--tensorboard", type=Path, metavar="FOLDER", help="write swa.metrics() there for TensorBoard")
    add("--json", type=Path, metavar="PATH", help="write the results of every epoch here")
    add("--save", type=Path, metavar="PATH", help="write the state dict of the averaged model here")
    return parser.parse_args()


@contextmanager
def logger(folder: Path | None) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield a function that writes numbers of a step for TensorBoard, on the first rank, if there is a `folder`."""
    if folder is None or dist.get_rank() > 0:
        yield lambda step, numbers: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        yield log


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Initialize torchrun's process group, or one of a single process; destroy it when all ranks are done."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield device
    dist.barrier()  # no rank exits while another still communicates with it
    time.sleep(0.1)  # gloo's thread releases the barrier, for which it needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    args = parse_args()
    with process_group() as device:
        train(args, device)
