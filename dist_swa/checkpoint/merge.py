"""Average checkpoints and safetensors on disk, one tensor at a time."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from tqdm import tqdm

from dist_swa.averaging.rules import Equal, Rule
from dist_swa.checkpoint.adapter import open_adapter
from dist_swa.checkpoint.beside import ADAPTER_FILES, copy_beside
from dist_swa.checkpoint.cast import check_dtype
from dist_swa.checkpoint.not_averaged import MODEL
from dist_swa.checkpoint.safetensors_io import (
    SUFFIX,
    Spec,
    atomic_output,
    check_new,
    created,
    files_of,
    write_safetensors,
)
from dist_swa.checkpoint.sources import Source, open_sources
from dist_swa.checkpoint.sums import WeightedSums
from dist_swa.checkpoint.terms import RECORD, Term, make_terms, record, table, warn_unless_oldest_first
from dist_swa.collectives import raise_on_all, rank_and_world_size
from dist_swa.storage.save_load import no_group_is_fine, unwrap_dcp_errors
from dist_swa.storage.writer import CheckpointWriter


def merge(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    key: str | None = None,
    rule: Rule = Equal(),
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> None:
    """Write the weighted average of `sources`, oldest first, to `out`. A collective if there is a process group.

    Tensors are summed in float64 and rounded once to their dtype, so a single source keeps its bits. Tensors that are
    not floating come from the last source; one warning says if integer tensors, such as those of quantised weights,
    differ. BatchNorm statistics are averaged; `recalibrate_batch_norm` is better.

    The order of sources is never changed. One warning says if they are weighted by it and their steps do not rise, as
    in ``checkpoint-*`` of a shell. The steps are those in the files if all have one, else the steps or epochs in names.

    Args:
        sources: paths of what `export` reads, also mixed.
        out: a path where nothing exists. A name that ends in ".safetensors" becomes a file; any other a folder: a
            checkpoint with the entry "model" if the last source is a checkpoint of torch.distributed.checkpoint, else
            safetensors. What was merged (paths, keys, steps, weights, rule, date) is in its ``dist_swa.json``, or under
            "dist_swa" in the metadata of the file. Beside safetensors, the folder has the files that from_pretrained
            reads, from the last source if that is a folder or a ``model.safetensors``: configurations, tokenizer,
            processor, chat templates. A ``config.json`` gets `dtype`. Adapters that PEFT or `export` saved become an
            adapter with the ``adapter_config.json``, tokenizer and processor of the first source.
        key: the entry of each checkpoint, as in `export`; "model" or "" averages trained weights.
        rule: the weight of each source by its position, such as ``DecayShaped(shape, total=len(sources))``,
            arXiv:2507.17634. An EMA with a half-life is refused.
        weights: the weight of each source, instead of a rule. Negative weights warn.
        normalize: whether `weights` are divided by their sum.
        dtype: of all floating tensors; default: their own. Complex tensors keep theirs.
        progress: whether the first rank prints the step and weight of each source, and shows a progress bar.

    In a process group the ranks share the work: by files for safetensors, by tensors for a checkpoint. Memory per rank:
    five times the largest tensor in float32.

    A tied tensor, such as a head, that a source has under one of its names only is written under all names.

    Raises ValueError if sources differ (it names the first name, shape or dtype that does), if `weights` do not fit,
    or if a sum overflows its dtype; and what `export` raises. Every rank raises the same error, and `out` is not
    created. Tensors in which all is NaN, as from a run whose loss was NaN, warn.

    Example:

    >>> import torch
    >>> from safetensors.torch import load_file, save_file
    >>> from dist_swa import checkpoint
    >>> save_file({"weight": torch.tensor([1.0])}, "a.safetensors")
    >>> save_file({"weight": torch.tensor([2.0])}, "b.safetensors")
    >>> checkpoint.merge(["a.safetensors", "b.safetensors"], "c.safetensors", weights=[1, 3])
    >>> load_file("c.safetensors")
    {'weight': tensor([1.7500])}
    """
    with raise_on_all():
        check_dtype("merge", dtype)
        paths = checked_paths(sources)
        coefficients = _coefficients(len(paths), rule, weights, normalize)
        terms = make_terms(paths, open_sources(paths, key), coefficients)
        warn_unless_oldest_first(terms)
    facts = {"rule": repr(rule) if weights is None else None, "dtype": None if dtype is None else str(dtype)}
    made_by = record(terms, command="merge", **facts)
    write_combination(terms, Path(out), made_by, progress, dtype, heading=table(terms) if progress else "")


def checked_paths(sources: Iterable[str | Path]) -> list[str | Path]:
    """Return `sources` as a list; TypeError or ValueError unless they are one path or more."""
    is_list = isinstance(sources, Iterable) and not isinstance(sources, str)
    paths = list(sources) if is_list else []
    if not is_list or not all(isinstance(path, str | Path) for path in paths):
        raise TypeError(f"merging needs a list of paths, got sources={sources!r}; put it into a list")
    if not paths:
        raise ValueError("merging needs a source or more, got sources=[]; pass paths")
    return paths


def _coefficients(count: int, rule: Rule, weights: Sequence[float] | None, normalize: bool) -> list[float]:
    if not isinstance(rule, Rule):
        raise TypeError(f"merge needs a rule, got {rule=}; pass Equal(), EMA(decay=0.9), ...")
    if weights is None:
        if rule.unit is not None:
            raise ValueError(f"merge needs a rule that counts models, got {rule=}; pass EMA(decay=...)")
        return rule.coefficients(count)
    if rule != Equal():
        raise ValueError(f"merge needs a rule or weights, got {rule=} and {weights=}; leave one out")
    numbers = _finite(weights, count)
    if min(numbers) < 0:
        warnings.warn(f"negative weights move away from a source: {weights=}", stacklevel=3)
    total = math.fsum(numbers) if normalize else 1.0
    rounding = 4 * sys.float_info.epsilon * math.fsum(map(abs, numbers))
    if not any(numbers) or (normalize and abs(total) <= rounding):
        raise ValueError(f"merge needs weights whose sum is not 0, got {weights=}; pass normalize=False, or others")
    return [number / total for number in numbers]


def _finite(weights: Sequence[float], count: int) -> list[float]:
    """Return `weights` as floats; TypeError or ValueError unless there are `count` of them with a finite sum."""
    try:
        if len(weights) == count and math.isfinite(math.fsum(map(abs, weights))):
            return [float(weight) for weight in weights]
    except TypeError as error:
        raise TypeError(f"merge needs a list of numbers, got {weights=}; pass a float for each source") from error
    except OverflowError:
        pass
    raise ValueError(
        f"merge needs a finite weight for each of {count} sources, got {weights=}; pass as many, of a finite sum"
    )


def write_combination(
    terms: Sequence[Term],
    out: Path,
    made_by: str,
    progress: bool,
    dtype: torch.dtype | None = None,
    heading: str = "",
) -> None:
    """Write the sum of the sources, each times its weight, as described in `merge`. A collective.

    `made_by` is the record of what was done. The first rank prints `heading` before the work starts.
    """
    is_first = rank_and_world_size(None)[0] == 0
    with raise_on_all():
        check_new(out)
        first, last = terms[0], terms[-1]
        specs = {name: spec.in_dtype(dtype) for name, spec in _common_specs([term.source for term in terms]).items()}
        is_file = out.suffix == SUFFIX
        is_checkpoint = not is_file and last.source.is_checkpoint
        adapter = None if is_file or is_checkpoint else open_adapter(first.path, first.source, is_averaged=False)
        files = {} if is_checkpoint else files_of(specs, out, ADAPTER_FILES[0] if adapter else None)
        if last.source.skipped:
            warnings.warn(f"a merge stores tensors only; not written: {', '.join(last.source.skipped)}", stacklevel=3)
        if heading and is_first:
            print(heading, flush=True)

    sums = WeightedSums(terms, specs)
    if is_checkpoint:
        _write_checkpoint(specs, out, sums.read, progress, made_by)
    else:
        with atomic_output(out, None) as folder:
            write_safetensors(files, folder, sums.read, None, progress, {"dist_swa": made_by} if is_file else None)
            if not is_file and is_first:
                source = first if adapter else last
                copy_beside(source.path, folder, dtype, adapter.folder if adapter else None)
                with created(folder / RECORD) as file:
                    file.write(made_by.encode())
    sums.warn()


def _common_specs(sources: Sequence[Source]) -> dict[str, Spec]:
    """Return the shapes and dtypes of all sources; ValueError names the first that differs.

    A name that a source lacks is that of another tensor of it, if the two are tied in all sources that have both.
    """
    for name in dict.fromkeys(name for source in sources for name in source.specs):
        having = [source for source in sources if name in source.specs]
        lacking = [source for source in sources if name not in source.specs]
        if lacking and (tied := _tied_name(name, having, lacking)):
            for source in lacking:
                source.tie(name, tied)
    first = sources[0]
    for other in sources[1:]:
        for name in [*first.specs, *other.specs]:
            mine, others = first.specs.get(name), other.specs.get(name)
            if mine != others:
                raise ValueError(
                    f"merging needs sources with the same names, shapes and dtypes, got {name}={mine or 'missing'} in"
                    f" {first} and {others or 'missing'} in {other}; merge checkpoints of one model"
                )
    return first.specs


def _tied_name(name: str, having: Sequence[Source], lacking: Sequence[Source]) -> str | None:
    """Return another name of the tensor `name`, such as that of the embedding to which a head is tied."""
    rest = set.intersection(*(set(source.specs) for source in [*having, *lacking]))
    found: Iterator[str] = (other for other in having[0].specs if other in rest)
    for source in having:
        found = source.tied_to(name, found)
    return next(found, None)


def _write_checkpoint(
    specs: Mapping[str, Spec], out: Path, read: Callable[[str], Tensor], progress: bool, made_by: str
) -> None:
    """Write a checkpoint with the entry "model". The ranks take its tensors in turn."""
    rank, ranks = rank_and_world_size(None)
    mine = list(specs.items())[rank::ranks]
    state = {MODEL: {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in mine}}
    writer = CheckpointWriter(out, one_file_per_tensor=True, beside={RECORD: made_by.encode()})
    with (
        writer.cleaned_up(),
        unwrap_dcp_errors(),
        no_group_is_fine(),
        tqdm(total=len(mine), unit="tensor", disable=not progress or rank > 0) as bar,
    ):
        dcp_save(state, storage_writer=writer, planner=_ReadingPlanner(read, bar))


class _ReadingPlanner(DefaultSavePlanner):
    """Computes a tensor when it is written; the state dict contains meta tensors."""

    def __init__(self, read: Callable[[str], Tensor], bar: tqdm[NoReturn]) -> None:
        super().__init__()
        self._read, self._bar = read, bar

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._read(write_item.index.fqn.removeprefix(f"{MODEL}."))
        self._bar.update()
        return tensor
