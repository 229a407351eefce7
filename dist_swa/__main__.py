"""The command line: look into checkpoints, export, merge and synthesize averages."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dist_swa import checkpoint
from dist_swa.averaging.rules import EMA, DecayShaped, Equal, Polynomial, Rule
from dist_swa.checkpoint.sources import averages_in, entries_in, names_in, open_reader

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_EXAMPLES = """examples:
  dist-swa inspect step-840
  dist-swa export step-840 deployed --key swa.mean --dtype bfloat16
  dist-swa merge step-280 step-560 step-840 --key model --rule minus_sqrt --out merged
  dist-swa merge a.safetensors b.safetensors --weights 0.3,0.7 --out c.safetensors
  dist-swa synthesize step-280 step-560 step-840 --sigma-rel 0.08 --out other
  torchrun --nproc_per_node 8 -m dist_swa merge ...

exit codes: 0 done, 1 the command failed (the reason is one line on stderr), 2 wrong usage, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; wrong usage raises SystemExit(2)."""
    parser = _parser()
    parsed = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    if parsed.command == "merge":
        try:
            parsed.rule = Equal() if parsed.rule is None else _rule(parsed.rule, len(parsed.sources))
        except ValueError as error:
            parser.error(f"--rule needs one of {_RULES}, got {parsed.rule} ({error})")
        if parsed.no_normalize and parsed.weights is None:
            parser.error("--no-normalize needs --weights, got none; a rule's weights sum to 1")
    with _noted_interrupt() as was_interrupted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
                if _num_ranks() > 1:
                    dist.init_process_group("gloo")
                _COMMANDS[parsed.command](parsed)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if was_interrupted():
                return 130
            _say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
            return 1
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed: torch turns a KeyboardInterrupt into errors of its own."""
    pressed = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():  # not ours to change
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _inspect(parsed: argparse.Namespace) -> None:
    facts = _facts(parsed.path)
    if parsed.json:
        _print(json.dumps(facts, indent=2))
        return
    _print(f"{_printable(parsed.path)}: {facts['format']}{'' if facts['has_checksums'] else ', without checksums'}")
    columns = ("key", "rule", "num_averaged", "step", "tensors", "elements", "dtypes")
    rows = [columns, *([_cell(entry[column]) for column in columns] for entry in facts["entries"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _facts(path: str) -> dict[str, Any]:
    """Return what is in a checkpoint or in safetensors, as JSON takes it."""
    reader = open_reader(path)
    if not isinstance(reader, checkpoint.CheckpointReader):
        return {"format": "safetensors", "has_checksums": False, "entries": [_entry(reader, None, reader.keys)]}
    averages = averages_in(reader)
    entries = []
    for key, average in averages.items():
        of_average = {"rule": average.rule, "num_averaged": average.num_averaged, "step": average.step}
        parts = (f"{key}.slots.0.", f"{key}.buffers.")
        tensors = {n.removeprefix(part): n for part in parts for n in reader.keys if n.startswith(part)}
        entries.append(_entry(reader, key, tensors.values(), **of_average))
    for key in entries_in(reader, averages):
        entries.append(_entry(reader, key, names_in(reader, key).values()))
    return {"format": "checkpoint", "has_checksums": reader.has_checksums, "entries": entries}


def _entry(reader: Any, key: str | None, names: Iterable[str], **of_average: Any) -> dict[str, Any]:
    """Return the facts of one entry, whose tensors have these names."""
    shapes = {name: shape for name in names if (shape := reader.shape(name)) is not None}
    dtypes = Counter(str(reader.dtype(name)).removeprefix("torch.") for name in shapes)
    facts = {"key": key, "rule": None, "num_averaged": None, "step": None, **of_average}
    numel = sum(shape.numel() for shape in shapes.values())
    return facts | {"tensors": len(shapes), "elements": numel, "dtypes": [name for name, _ in dtypes.most_common()]}


def _export(parsed: argparse.Namespace) -> None:
    dtype = None if parsed.dtype is None else getattr(torch, parsed.dtype)
    checkpoint.export(parsed.path, parsed.out, key=parsed.key, dtype=dtype, progress=not parsed.quiet)


def _merge(parsed: argparse.Namespace) -> None:
    options = {"rule": parsed.rule, "weights": parsed.weights, "normalize": not parsed.no_normalize}
    checkpoint.merge(parsed.sources, parsed.out, key=parsed.key, **options, progress=not parsed.quiet)


def _synthesize(parsed: argparse.Namespace) -> None:
    options = {"key": parsed.key, "sigma_rel": parsed.sigma_rel}
    error = checkpoint.synthesize(parsed.sources, parsed.out, **options, progress=not parsed.quiet)
    _print(f"sigma_rel {parsed.sigma_rel:g}, relative error of the weights of models {error:.2e}")


_COMMANDS = {"inspect": _inspect, "export": _export, "merge": _merge, "synthesize": _synthesize}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_printable(message)}; see --help\n" if _is_first() else None)

    def print_help(self, file: Any = None) -> None:
        if _is_first():
            super().print_help(file)


def _parser() -> argparse.ArgumentParser:
    layout: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EXAMPLES}
    parser = _Parser("dist-swa", description=__doc__, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    inspect = commands.add_parser("inspect", help="show what is in a checkpoint or in safetensors", **layout)
    inspect.add_argument("path")
    inspect.add_argument("--json", action="store_true", help="machine-readable")
    export = commands.add_parser("export", help="write the averaged model of a checkpoint as safetensors", **layout)
    export.add_argument("path")
    export.add_argument("out", help="a new folder, or a new .safetensors file")
    export.add_argument("--dtype", choices=_DTYPES, help="of all floating tensors; default: as they are")
    merge = commands.add_parser("merge", help="average checkpoints or safetensors, oldest first", **layout)
    weighing = merge.add_mutually_exclusive_group()
    weighing.add_argument("--rule", help=f"{_RULES}; default: equal")
    weighing.add_argument(
        "--weights", type=_numbers, metavar="W1,W2,...", help="one for each source, instead of a rule"
    )
    merge.add_argument("--no-normalize", action="store_true", help="do not divide --weights by their sum")
    synthesize = commands.add_parser("synthesize", help="make the PowerEMA of another width (post-hoc EMA)", **layout)
    synthesize.add_argument("--sigma-rel", type=float, required=True, help="the width, between 0 and 0.2886")
    for command in (merge, synthesize):
        command.add_argument("sources", nargs="+", metavar="source", help="checkpoints or safetensors")
        command.add_argument("--out", required=True, help="a new folder, or a new .safetensors file")
    for command in (export, merge, synthesize):
        command.add_argument("--key", help=_KEY)
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


_KEY = """the entry of a checkpoint, as "swa" or "model", or "", what stands at its top level; default: the only
average, or, without any, the only entry"""
_RULES = "equal, polynomial:ETA, ema:DECAY, linear, minus_sqrt, cosine"


def _rule(text: str, count: int) -> Rule:
    """Return the rule for so many sources; ValueError for anything else than `_RULES`."""
    name, _, number = text.partition(":")
    if name == "polynomial":
        return Polynomial(float(number))
    if name == "ema":
        return EMA(decay=float(number))
    return Equal() if text == "equal" else DecayShaped(text, total=count)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return "--weights -1,3" as "--weights=-1,3", for argparse takes a "-1,3" on its own for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--weights" and re.match(r"-[0-9.]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else _printable(str(value)) or '""'


def _printable(text: str) -> str:
    """Return a text that leaves the terminal as it is: names in files may hold anything."""
    return text if text.isprintable() else repr(text)[1:-1]


def _num_ranks() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise ValueError(f"dist-swa needs the number of ranks, got WORLD_SIZE={text}; unset it, or use torchrun")
    return int(text)


def _is_first() -> bool:
    """Whether this process speaks: the first rank, or one that does not know its rank."""
    return not os.environ.get("RANK", "").strip("0").isdecimal()


def _print(text: str) -> None:
    if _is_first():
        print(text)


def _say(text: str) -> None:
    if _is_first():
        print(f"dist-swa: {_printable(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
