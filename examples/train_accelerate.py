"""Train the classifier of train.py with Hugging Face Accelerate, and average its weights.

    accelerate launch --config_file launch/accelerate/fsdp2.yaml examples/train_accelerate.py --num-processes 2
    python examples/train_accelerate.py                 # a single process, without a launcher

The other files in launch/accelerate are for DDP and FSDP1, and for machines without a GPU. Comments that begin with
"dist_swa:" mark everything that weight averaging adds to the script.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dist_swa.integrations.accelerate import prepare_swa  # dist_swa: needs pip install 'dist_swa[accelerate]'
from train import GLOBAL_BATCH, WRONG_LABELS, build_model, load_data


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any) -> float:
    """Return the accuracy (%) on all of the loader's data."""
    model.eval()
    hits = [accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in loader]
    model.train()
    return float(100 * torch.cat(hits).double().mean())


def noisy(labels: Tensor) -> Tensor:
    """Return labels of which some are wrong. The wrong ones are drawn anew in each call."""
    is_wrong = torch.rand(labels.shape, device=labels.device) < WRONG_LABELS
    return (labels + is_wrong * torch.randint_like(labels, 1, 10)) % 10


def train(args: argparse.Namespace) -> None:
    # The global batches do not depend on the number of processes; their order depends on seed and epoch only.
    data_config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(dataloader_config=data_config)
    set_seed(args.seed)
    train_data, test_data = (TensorDataset(*data) for data in load_data())
    model = build_model()
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=args.lr),
        DataLoader(train_data, batch_size=GLOBAL_BATCH, shuffle=True, drop_last=True),
        DataLoader(test_data, batch_size=8 * GLOBAL_BATCH),
    )
    swa = prepare_swa(  # dist_swa: after prepare, before load_state; averages every step of the last half
        accelerator,
        model,
        optimizer,
        num_processes=args.num_processes,  # dist_swa: raises if the launch runs another number
        max_duration=f"{args.epochs}ep",
        steps_per_epoch=len(loader),
        swa_start="0.5dur",
    )
    set_seed(args.seed, device_specific=True)
    if args.checkpoint and args.checkpoint.exists():
        accelerator.load_state(args.checkpoint)  # dist_swa: also loads the average

    for epoch in range(swa.schedule.now.epochs, args.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), noisy(labels)))
                optimizer.step()
                optimizer.zero_grad()
                swa.step()  # dist_swa: counts the optimizer step, if one was made
        if args.checkpoint:
            accelerator.save_state(args.checkpoint)  # dist_swa: also saves the average

    last = evaluate(accelerator, model, test_loader)
    swa.finalize(loader)  # dist_swa: the model has the average now, with BatchNorm recalibrated over all processes
    averaged = evaluate(accelerator, model, test_loader)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}")
    accelerator.print(f"last iterate {last:10.2f} %\naveraged {averaged:14.2f} %")
    accelerator.wait_for_everyone()  # a rank that exits early breaks the connections of the others
    time.sleep(0.1)  # gloo's thread releases the barrier, for which it needs a live interpreter
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="length of the run")
    add("--lr", type=float, default=0.5, help="learning rate of SGD, constant")
    add("--seed", type=int, default=0, help="seed of the initial weights, the order of the data and the wrong labels")
    add("--num-processes", type=int, metavar="N", help="raise if the launch runs another number of processes")
    add("--checkpoint", type=Path, metavar="DIR", help="save after every epoch here, and resume from it")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
