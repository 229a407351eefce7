"""Train a small GPT on the source of Python's standard library, with FSDP2 and tensor parallelism, and average it.

    torchrun --nproc_per_node=4 examples/language_model.py     # a 2 x 2 mesh; an odd number of ranks: FSDP2 alone
    python examples/language_model.py                          # a single process, without a launcher

The model predicts bytes. The learning rate is constant after a short warmup. Three averages are updated together: the
equal average of all models from `--swa-start` on (SWA), an exponential moving average (EMA), and the average of the
last few models (a window). Comments with "dist_swa:" mark everything that averaging adds to an ordinary script. Data
and initial weights depend only on the seed and the Python version: any number of ranks trains on the same batches.
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, SequentialLR
from tqdm import tqdm

from dist_swa import EMA, SWA, Equal, Window  # dist_swa: the controller, and a rule for each average
from train import logger, process_group

# Single-file modules of Python 3.11 to 3.13; every tenth is held out. The list is fixed, so that the text depends only
# on the Python version.
MODULES = """
    _pydecimal _pyio _strptime argparse ast base64 bdb calendar cmd code codecs compileall configparser contextlib copy
    csv dataclasses datetime difflib dis doctest enum fileinput fractions ftplib functools getopt gettext gzip hashlib
    heapq imaplib inspect ipaddress locale mailbox mimetypes modulefinder netrc ntpath numbers operator optparse os pdb
    pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pyclbr pydoc queue random runpy
    sched selectors shelve shlex shutil site smtplib socket socketserver ssl statistics stringprep subprocess symtable
    tarfile tempfile textwrap threading timeit tokenize trace traceback tracemalloc types typing uuid warnings wave
    weakref webbrowser zipapp zipimport
"""
VOCABULARY, HEAD = 256, 32  # the number of byte values; the width of an attention head
EVAL_BATCH = 64


def load_text() -> tuple[Tensor, Tensor]:
    """Return the bytes of the training modules and of the held-out modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [(folder / f"{name}.py").read_bytes() for name in MODULES.split()]
    held_out = b"".join(texts[9::10])
    del texts[9::10]
    train, test = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (b"".join(texts), held_out))
    return train.long(), test.long()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # rows grouped by head, for tensor parallelism
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_1(hidden)).unflatten(-1, (-1, 3 * HEAD)).transpose(1, 2).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        change: Tensor = self.down(F.gelu(self.up(self.norm_2(hidden))))
        return hidden + change


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.tokens.weight

    def forward(self, windows: Tensor) -> Tensor:
        """Return the summed cross-entropy (nats) of all bytes but the first, each predicted from those before it."""
        text, following = windows[:, :-1], windows[:, 1:]
        hidden = self.tokens(text) + self.positions(torch.arange(text.shape[1], device=text.device).unsqueeze(0))
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")


def build(args: argparse.Namespace, device: torch.device) -> tuple[GPT, DeviceMesh]:
    """Return the sharded model and the data-parallel axis of the mesh."""
    ranks = dist.get_world_size()
    tensor = 2 if ranks % 2 == 0 else 1
    mesh = init_device_mesh(device.type, (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = GPT(args.layers, args.width, args.context).to(device)
    if tensor > 1:
        text = Shard(1)  # activations are (batch, text, width): sequence parallelism splits dim 1
        norm = SequenceParallel()
        columns, rows = ColwiseParallel(input_layouts=text), RowwiseParallel(output_layouts=text)
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=text)
        head = ColwiseParallel(input_layouts=text, output_layouts=Replicate())
        plan = {"tokens": embedding, "positions": embedding, "norm": norm, "head": head}
        plan |= {"blocks.*.norm_1": norm, "blocks.*.qkv": columns, "blocks.*.out": rows}
        plan |= {"blocks.*.norm_2": norm, "blocks.*.up": columns, "blocks.*.down": rows}
        parallelize_module(model, mesh["tensor"], plan)
        model.tie()  # again: parallelize_module gave each module its own parameter, both sharded by rows
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model, mesh["data"]


def share(batch: Tensor, data: DeviceMesh) -> Tensor:
    """Return this rank's windows of a global batch, the same on all ranks of a "tensor" axis."""
    return batch.tensor_split(data.size())[data.get_local_rank()].to(data.device_type)


def train(
    args: argparse.Namespace,
    model: GPT,
    data: DeviceMesh,
    text: Tensor,
    after_step: Callable[[int, SWA], None] = lambda step, swa: None,
) -> SWA:
    """Train the model, call `after_step` after each step, and return the averages."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    annealed = round(args.anneal * args.steps)
    warmup, decay = LinearLR(optimizer, 0.01, total_iters=args.steps // 10), LinearLR(optimizer, 1, 0, max(1, annealed))
    schedule = SequentialLR(optimizer, [warmup, decay], [args.steps - annealed])
    swa = SWA(  # dist_swa: each rank averages its own shards, and updates all three averages together
        model,
        max_duration=f"{args.steps}ba",
        swa_start=args.swa_start,
        update_interval=args.update_interval,
        rule={"swa": Equal(), "ema": EMA(half_life=args.half_life), "window": Window(args.window)},
        transfer="swa",
    )
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(range(args.steps), unit="step", disable=dist.get_rank() > 0) as bar:
        for step in bar:
            starts = torch.randint(len(text) - args.context, (args.batch, 1), generator=generator)
            batch = text[starts + torch.arange(args.context + 1)]
            # FSDP2 averages gradients over its ranks; this scale makes them the mean over the global batch.
            loss = model(share(batch, data)) * data.size() / batch[:, 1:].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            swa.step()  # dist_swa: counts the step and updates the averages when they are due
            after_step(step + 1, swa)
            bar.set_postfix(loss=f"{loss.item() / math.log(2):.3f}", refresh=False)
    return swa


@torch.no_grad()
def evaluate(model: GPT, data: DeviceMesh, batches: Tensor) -> float:
    """Return bits per byte of the text in `batches`. Each rank evaluates its windows of every batch."""
    total = torch.stack([model(share(batch, data)) for batch in batches]).sum()
    dist.all_reduce(total, group=data.get_group())
    return float(total) / batches[..., 1:].numel() / math.log(2)


def run(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], SWA]:
    """Train; return bits per byte of held-out text for the last iterate and for each average, and the averages."""
    text, held_out = load_text()
    windows = held_out.unfold(0, args.context + 1, args.context)
    batches = windows.unfold(0, EVAL_BATCH, EVAL_BATCH).mT[: args.eval_batches]  # (number, EVAL_BATCH, context + 1)
    model, data = build(args, device)
    with logger(args.tensorboard) as log:
        swa = train(args, model, data, text, lambda step, swa: log(step, swa.metrics(distance=step % 50 == 0)))
    figures = {"last iterate": evaluate(model, data, batches)}
    for name in swa.average.names:
        with swa.swapped_in(name):  # dist_swa: inside, the model has the weights of this average
            figures[name] = evaluate(model, data, batches)
    swa.finalize()  # dist_swa: copies the average named by `transfer` into the model
    if args.save:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(weights, args.save)
    return figures, swa


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description = "Train a small GPT on the source of Python's standard library and average its weights."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="length of the run")
    add("--batch", type=int, default=16, help="windows in a global batch")
    add("--context", type=int, default=128, help="bytes in a window")
    add("--layers", type=int, default=3, help="blocks of the model")
    add("--width", type=int, default=128, help=f"width of the model, a multiple of {2 * HEAD}")
    add("--lr", type=float, default=3e-3, help="learning rate of AdamW after a warmup of a tenth of the steps")
    add("--anneal", type=float, default=0.0, help="part of the run in which the learning rate decays to 0")
    add("--seed", type=int, default=0, help="seed of the initial weights and the order of the data")
    add("--swa-start", default="0.8dur", metavar="TIME", help='when averaging starts: "0.8dur", "500ba"')
    add("--update-interval", default="5ba", metavar="TIME", help="time between updates of the averages")
    add("--half-life", default="50ba", metavar="TIME", help="half-life of a model's weight in the EMA")
    add("--window", type=int, default=20, metavar="MODELS", help="number of models in the window")
    add("--save", type=Path, metavar="PATH", help='write the state dict of the average "swa" here')
    add("--tensorboard", type=Path, metavar="FOLDER", help="write swa.metrics() there for TensorBoard")
    add("--eval-batches", type=int, default=1000, help="maximum number of batches of held-out text")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    with process_group() as device:
        begin = time.perf_counter()
        figures, swa = run(args, device)
        if dist.get_rank() == 0:
            print(f"{'':16}bits per byte")
            for name, bits in figures.items():
                print(f"{name:16}{bits:13.4f}")
            print(f"{args.steps} steps, {swa.num_averaged} models averaged: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
