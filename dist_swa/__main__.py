"""The command dist-swa: inspect checkpoints; export, merge and synthesize averages."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import click
import torch
import torch.distributed as dist

from dist_swa import __version__, checkpoint
from dist_swa.averaging.rules import EMA, DecayShaped, Equal, Polynomial, Rule
from dist_swa.checkpoint.entries import Contents, Entry
from dist_swa.checkpoint.keys import Reader, spec_of
from dist_swa.checkpoint.readers import TrainerReader, open_reader
from dist_swa.checkpoint.safetensors_io import SafetensorsReader
from dist_swa.checkpoint.sources import is_one_model
from dist_swa.checkpoint.terms import printable
from dist_swa.checkpoint.torch_files import TorchReader

_RULES = "equal, polynomial:ETA, ema:DECAY, linear, minus_sqrt, cosine"
_EXAMPLES = """\b
examples:
  dist-swa inspect step-840
  dist-swa export step-840 deployed --key swa.mean --dtype bfloat16
  dist-swa merge step-280 step-560 step-840 --key model --rule minus_sqrt --out merged
  dist-swa merge a.safetensors b.safetensors --weights 0.3,0.7 --out c.safetensors
  dist-swa synthesize step-280 step-560 step-840 --sigma-rel 0.08 --out other
  torchrun --nproc_per_node 8 -m dist_swa merge ...

exit codes: 0 done, 1 the command failed (the reason is one line on stderr), 2 wrong usage, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; --help, --version and wrong usage raise SystemExit."""
    with _first_rank_prints(), _interrupt_event() as interrupted:
        try:  # not click's main(), which prints on Ctrl-C and exits with 1
            with _cli.make_context("dist-swa", list(sys.argv[1:] if arguments is None else arguments)) as context:
                _cli.invoke(context)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.UsageError as error:
            _print_error(f"error: {error.format_message().rstrip('.')}; see --help")
            sys.exit(2)
        except (Exception, KeyboardInterrupt) as error:
            if interrupted.is_set() or isinstance(error, KeyboardInterrupt):
                return 130
            _print_error(f"error: {error}" if str(error).strip() else f"error: {type(error).__name__}")
            return 1
    return 0


@contextmanager
def _first_rank_prints() -> Iterator[None]:
    """Discard the output of all ranks but the first, and print a warning as one line."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "").strip("0").isdecimal():
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _print_error(f"warning: {message}")
        yield


@contextmanager
def _interrupt_event() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets. Torch replaces a KeyboardInterrupt by other errors."""
    interrupted = threading.Event()

    def handle(number: int, frame: Any) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    with ExitStack() as stack:
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_default and threading.current_thread() is threading.main_thread():  # keep a handler of the caller
            signal.signal(signal.SIGINT, handle)
            stack.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
        yield interrupted


def _print_error(text: str) -> None:
    click.echo(f"dist-swa: {printable(' '.join(text.split()))}", err=True)


@click.group(epilog=_EXAMPLES, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def _cli(context: click.Context) -> None:
    """Inspect checkpoints; export, merge and synthesize averages."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not ranks.isdecimal():
        raise ValueError(f"dist-swa needs the number of ranks, got WORLD_SIZE={ranks}; unset it, or use torchrun")
    if int(ranks) > 1:
        dist.init_process_group("gloo")
        context.call_on_close(dist.destroy_process_group)


_sources = click.argument("sources", nargs=-1, required=True)
_out = click.option("--out", required=True, help="a new folder, or a new .safetensors file")
_key = click.option(
    "--key",
    help="""the entry of a checkpoint, as "swa" or "app.model"; "" is the top level of the saved state dict; default:
    the only average, or without one the only entry that is not an optimizer""",
)
_dtype = click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    callback=lambda _context, _option, name: name and getattr(torch, name),
    help="of floating tensors",
)
_quiet = click.option("--quiet", is_flag=True, help="no progress bar, and no list of the sources of a merge")


@_cli.command("inspect", epilog=_EXAMPLES)
@click.argument("path")
@click.option("--tensors", "with_tensors", is_flag=True, help="the names, shapes and dtypes of all tensors, too")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def _inspect(path: str, with_tensors: bool, as_json: bool) -> None:
    """Show the entries of a checkpoint, of safetensors, or of a file of torch.save."""
    facts = _facts(path, with_tensors)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{printable(path)}: {facts['format']}{'' if facts['has_checksums'] else ', without checksums'}")
    columns = ("key", "rule", "num_averaged", "step", "tensors", "elements", "dtypes")
    _print_table([columns, *([_cell(entry[column]) for column in columns] for entry in facts["entries"])])
    for entry in facts["entries"] if with_tensors else ():
        click.echo("" if entry["key"] is None else f"\n{_cell(entry['key'])}:")
        _print_table([[f"  {_cell(s['name'])}", s["dtype"], str(s["shape"])] for s in entry["specs"]])


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _facts(path: str, with_tensors: bool) -> dict[str, Any]:
    """Describe what is under a path by JSON values."""
    contents = Contents(open_reader(path))
    reader, needs_no_key = contents.reader, is_one_model(contents)
    entries = [
        _entry_facts(reader, None if needs_no_key else key, entry, with_tensors)
        for key, entry in contents.entries.items()
    ]
    formats = {SafetensorsReader: "safetensors", TorchReader: "torch.save", TrainerReader: "checkpoint of a trainer"}
    has_checksums = bool(getattr(reader, "has_checksums", False))
    return {"format": formats.get(type(reader), "checkpoint"), "has_checksums": has_checksums, "entries": entries}


def _entry_facts(reader: Reader, key: str | None, entry: Entry, with_tensors: bool) -> dict[str, Any]:
    specs = {name: spec for name, stored in entry.stored.items() if (spec := spec_of(reader, stored))}
    dtypes = Counter(_name_of(spec.dtype) for spec in specs.values()).most_common()
    facts: dict[str, Any] = {"key": key}
    facts |= zip(("rule", "num_averaged", "step"), entry.average or (None, None, None), strict=True)
    numel = sum(spec.shape.numel() for spec in specs.values())
    facts |= {"tensors": len(specs), "elements": numel, "dtypes": [name for name, _ in dtypes]}
    if with_tensors:
        facts["specs"] = [{"name": n, "shape": [*s.shape], "dtype": _name_of(s.dtype)} for n, s in specs.items()]
    return facts


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else printable(str(value)) or '""'


@_cli.command("export", epilog=_EXAMPLES)
@click.argument("source")
@click.argument("out")
@_key
@_dtype
@click.option("--only", type=click.Choice(["averaged"]), help="the averaged parameters only, as of a LoRA adapter")
@_quiet
def _export(quiet: bool, **options: Any) -> None:
    """Write an average as safetensors.

    OUT is a new folder, or a new .safetensors file.
    """
    checkpoint.export(progress=not quiet, **options)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


@_cli.command("merge", epilog=_EXAMPLES)
@_sources
@_out
@_key
@click.option("--rule", help=f"{_RULES}; default: equal")
@click.option("--weights", type=_numbers, metavar="W1,W2,...", help="one for each source, instead of a rule")
@click.option("--no-normalize", is_flag=True, help="do not divide --weights by their sum")
@_dtype
@_quiet
def _merge(rule: str | None, weights: list[float] | None, no_normalize: bool, quiet: bool, **options: Any) -> None:
    """Average checkpoints or safetensors, oldest first.

    The step and the weight of each source are printed first. In a shell, checkpoint-* gives 1000, 1500, 500.
    """
    if weights is not None and rule is not None:
        raise click.UsageError("merge needs --rule or --weights, got both; leave one out")
    if weights is None and no_normalize:
        raise click.UsageError("--no-normalize needs --weights, got none; a rule's weights sum to 1")
    by_rule = _rule("equal" if rule is None else rule, len(options["sources"]))
    checkpoint.merge(rule=by_rule, weights=weights, normalize=not no_normalize, progress=not quiet, **options)


def _rule(text: str, num_sources: int) -> Rule:
    name, _, number = text.partition(":")
    try:
        if name == "polynomial":
            return Polynomial(float(number))
        if name == "ema":
            return EMA(decay=float(number))
        return Equal() if text == "equal" else DecayShaped(text, total=num_sources)
    except ValueError as error:
        raise click.UsageError(f"--rule needs one of {_RULES}, got {text} ({error})") from error


@_cli.command("synthesize", epilog=_EXAMPLES)
@_sources
@_out
@_key
@click.option("--sigma-rel", type=float, required=True, help="the width, between 0 and 0.2886")
@_quiet
def _synthesize(sigma_rel: float, quiet: bool, **options: Any) -> None:
    """Compute the PowerEMA of another width (post-hoc EMA)."""
    error = checkpoint.synthesize(sigma_rel=sigma_rel, progress=not quiet, **options)
    click.echo(f"sigma_rel {sigma_rel:g}, relative error of the weights of models {error:.2e}")


if __name__ == "__main__":
    sys.exit(main())
