"""Run functions and tests on several ranks: fresh CPU processes that share a gloo process group.

The processes come from a fork server that has imported torch once, so that a few take a fraction of a second.
They see the environment variables as they were when the fork server started. A rank that fails says so and
then stands still, its sockets open, until it is ended: no other rank fails because that one went away.
"""

import contextlib
import faulthandler
import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

os.environ["OMP_NUM_THREADS"] = "1"  # read when the fork server imports torch
_SERVER = multiprocessing.get_context("forkserver")
_PRELOAD = ["pytest", "torch._dynamo", "torch.nn.parallel", "torch.distributed.fsdp"]
_PRELOAD += ["torch.distributed.tensor.parallel", "torch.distributed.checkpoint.state_dict"]
_PRELOAD += ["lightning.pytorch", "composer"]  # what is not installed is passed over
_SERVER.set_forkserver_preload(_PRELOAD)

_SETTLE_S = 1.0  # after the first bad news: of a death one may hear later than of the errors that it causes
_GRACE_S = 2.0  # between SIGTERM and SIGKILL
_BAD = ("died", "failed", "hung", "skipped")  # causes before effects
_TORCHS_OWN_WARNINGS = (
    # FSDP2 over tensor parallelism: what RowwiseParallel returns is a view, whoever wrote the model.
    "FSDP2-wrapped module .* returned a view tensor",
    # FSDP1 with nothing to shard, be it on one rank or by NO_SHARD, as one has to ask for it.
    "FSDP is switching to use `NO_SHARD`",
    "The `NO_SHARD` sharding strategy is deprecated",
    "When using ``NO_SHARD`` for ``ShardingStrategy``",
    # FSDP1 without a device mesh saves ShardedTensors, which are deprecated and use what is deprecated.
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "`_get_pg_default_device` will be deprecated",
    "Multiple backends are registered with this ProcessGroup",
    # torch.compile of a wrapped model: it traces into the wrapper, up to where that calls into C.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "Dynamo does not know how to trace the builtin",
)

_Test = Callable[..., None]


def run_on_ranks(
    function: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Returns every rank's `function(*args, **kwargs)`, in rank order; raises if a rank ends badly."""
    __tracebackhide__ = True
    call = pickle.dumps((function, args, kwargs))  # plain pickle: tensors go by value, not by file descriptor
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ranks.append(_Rank(rank, world_size, Path(folder), call))
            _follow(ranks, timeout_s)
        finally:
            _end(ranks)
    bad = sorted((r for r in ranks if r.state in _BAD), key=lambda r: (_BAD.index(r.state), r.since))
    if not bad:
        return [pickle.loads(r.result) for r in ranks]
    if bad[0].state == "skipped":
        pytest.skip(bad[0].details)
    others = bad[1:] + [r for r in ranks if r not in bad]
    raise AssertionError("\n".join([bad[0].story(), *(r.story(short=r.state != "hung") for r in others)]))


def on_ranks(*world_sizes: int, timeout_s: float = 120.0) -> Callable[[_Test], _Test]:
    """Makes a test's body run on every rank, for each of the world sizes; its arguments have to pickle."""

    def decorate(body: _Test) -> _Test:
        @functools.wraps(body)
        def test(*args: Any, ranks: int, **kwargs: Any) -> None:
            __tracebackhide__ = True
            run_on_ranks(functools.partial(_run_body, test, *args, **kwargs), ranks, timeout_s=timeout_s)

        signature = inspect.signature(body)
        ranks = inspect.Parameter("ranks", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), ranks]
        )
        ids = [f"{n} rank{'s' if n > 1 else ''}" for n in world_sizes]
        decorated: _Test = pytest.mark.parametrize("ranks", world_sizes, ids=ids)(test)
        return decorated

    return decorate


def _run_body(test: Any, *args: Any, **kwargs: Any) -> None:
    """Runs the function under the decorator: by its name, pickle finds only the decorated one."""
    test.__wrapped__(*args, **kwargs)


def _rank_main(pipe: Connection, rank: int, world_size: int, folder: Path, call: bytes) -> None:
    """Makes the call within a process group, and says what came of it before the group's sockets close."""
    stack = os.open(folder / f"stack {rank}", os.O_CREAT | os.O_WRONLY)  # never closed: an exit may hang too
    faulthandler.register(signal.SIGUSR1, stack)
    faulthandler.enable(stack)
    try:
        function, args, kwargs = pickle.loads(call)  # before warnings are errors: it imports the test module
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        for message in _TORCHS_OWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        dist.barrier()  # all are connected: a rank that dies from here on breaks no connection that is being made
        pipe.send(("returned", pickle.dumps(function(*args, **kwargs)), time.monotonic()))
        dist.barrier()
        dist.destroy_process_group()
    except pytest.skip.Exception as skip:
        pipe.send(("skipped", str(skip), time.monotonic()))
        pipe.poll(None)
    except BaseException:  # torch.distributed.checkpoint's own exception is no Exception
        pipe.send(("failed", traceback.format_exc(), time.monotonic()))
        pipe.poll(None)


class _Rank:
    """A rank as its parent sees it: running, returned, skipped, failed, died or hung."""

    def __init__(self, rank: int, world_size: int, folder: Path, call: bytes) -> None:
        self.name, self.stack_file = f"rank {rank} of {world_size}", folder / f"stack {rank}"
        self.state, self.headline, self.details = "running", "was still running", ""
        self.result, self.since = b"", 0.0
        self.pipe, theirs = _SERVER.Pipe()
        self.process = _SERVER.Process(target=_rank_main, args=(theirs, rank, world_size, folder, call))
        self.process.start()
        theirs.close()
        self.sources: list[Any] = [self.pipe, self.process.sentinel]  # none: there is no more to hear

    def listen(self) -> None:
        """Takes in what the rank has said, and whether it has ended."""
        exit_code = self.process.exitcode  # asked first: what an ended rank said is in the pipe by then
        try:
            while self.pipe in self.sources and self.pipe.poll():
                self.state, said, self.since = self.pipe.recv()
                if self.state == "returned":
                    self.headline, self.result = "returned", said
                else:
                    self.headline, self.details = f"{self.state}:", said
        except (EOFError, OSError):
            self.sources.remove(self.pipe)
        if self.state in ("failed", "skipped"):
            self.sources.clear()  # it stands still now
        elif exit_code is not None:
            self.sources.clear()
            if exit_code or self.state == "running":
                self.state, self.since = "died", time.monotonic()
                self.headline, self.details = f"died{self.after()}: exit code {exit_code}", self.stack()

    def hang(self, timeout_s: float) -> None:
        """Marks the rank as hung, with its stack; one that does not wait inside torch comes first."""
        self.headline, self.details = f"hung{self.after()} for {timeout_s:g} s:", self.stack()
        innermost = self.details.partition("Current thread")[2].partition("File ")[2].partition("\n")[0]
        self.state, self.since = "hung", float("/torch/" in innermost) * (2 if self.result else 1)

    def after(self) -> str:
        """When the rank's end came, if that is not plain."""
        return " after it returned" if self.result else ""

    def stack(self) -> str:
        """What `faulthandler` wrote in the rank, if it did."""
        return self.stack_file.read_text() if self.stack_file.exists() else ""

    def story(self, short: bool = False) -> str:
        """What became of the rank, with its traceback or stack; or in one line."""
        if not short:
            return f"{self.name} {self.headline}\n{self.details}"
        last_line = self.details.rstrip().rpartition("\n")[2] if self.headline.endswith(":") else ""
        return f"{self.name} {self.headline} {last_line}".rstrip()


def _follow(ranks: list[_Rank], timeout_s: float) -> None:
    """Listens to the ranks until all have ended, one has ended badly, or the time is over."""
    deadline, settling = time.monotonic() + timeout_s, False
    while sources := [source for r in ranks for source in r.sources]:
        if not wait(sources, max(0.0, deadline - time.monotonic())):
            break
        for r in ranks:
            if r.sources:
                r.listen()
        if not settling and any(r.state in _BAD for r in ranks):
            deadline, settling = time.monotonic() + _SETTLE_S, True
    if sources and not settling:
        hung = [r for r in ranks if r.sources]
        for r in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(r.process.ident or 0, signal.SIGUSR1)
        time.sleep(0.5)  # for `faulthandler` to write
        for r in hung:
            r.hang(timeout_s)


def _end(ranks: list[_Rank]) -> None:
    """Ends what still runs, gently at first."""
    for r in ranks:
        r.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for r in ranks:
        r.process.join(max(0.0, deadline - time.monotonic()))
        if r.process.is_alive():
            r.process.kill()
            r.process.join()
        r.process.close()
        r.pipe.close()
