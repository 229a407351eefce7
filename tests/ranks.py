"""Run functions and tests on several ranks: CPU processes that share a gloo process group.

`run_on_ranks` starts new ranks for one call. `@on_ranks(2, 4)` runs a test on every rank; consecutive test ids of one
function and one number of ranks share a launch, and pytest reports each id on its own. A case that fails ends its
launch, and the next id starts another.

The processes are forked from a server that has imported torch, so that a launch takes a fraction of a second. They see
the environment variables that were set when the server started. A rank that fails sends its traceback and then waits,
with its sockets open, until it is terminated; otherwise its peers would fail with connection errors.
"""

import contextlib
import faulthandler
import functools
import gc
import inspect
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
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
_PRELOAD += ["lightning.pytorch", "composer"]  # the fork server ignores packages that are not installed
_SERVER.set_forkserver_preload(_PRELOAD)

_SETTLE_S = 1.0  # how long to wait for further reports after the first failure
_GRACE_S = 2.0  # between SIGTERM and SIGKILL
_BAD = ("died", "failed", "hung", "skipped")  # a death causes failures, a failure causes hangs
_IGNORED_WARNINGS = (
    # FSDP2 over tensor parallelism: RowwiseParallel returns a view.
    "FSDP2-wrapped module .* returned a view tensor",
    # FSDP1 on one rank, and FSDP1 with NO_SHARD.
    "FSDP is switching to use `NO_SHARD`",
    "The `NO_SHARD` sharding strategy is deprecated",
    "When using ``NO_SHARD`` for ``ShardingStrategy``",
    # FSDP1 without a device mesh saves ShardedTensors, which are deprecated.
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "`_get_pg_default_device` will be deprecated",
    "Multiple backends are registered with this ProcessGroup",
    # torch.compile traces into the wrapper of a model.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "Dynamo does not know how to trace the builtin",
)
_SHARED = pytest.StashKey["_Launch"]()

_Test = Callable[..., None]


def run_on_ranks(
    function: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Return the results of `function(*args, **kwargs)` on new ranks, in rank order; raise if a rank ends badly."""
    __tracebackhide__ = True
    launch = _Launch(world_size)
    try:
        results = launch.run(functools.partial(function, *args, **kwargs), timeout_s)
        launch.finish(timeout_s)
        return results
    finally:
        launch.kill()


def on_ranks(*world_sizes: int, timeout_s: float = 120.0) -> Callable[[_Test], _Test]:
    """Run the body of a test on every rank, for each of the world sizes. Its arguments must pickle.

    Put `pytest.mark.parametrize` above this decorator: then the ids of one world size run one after the other and
    share a launch. What a case changes in a rank's process is still changed in the next case.
    """

    def decorate(body: _Test) -> _Test:
        @functools.wraps(body)
        def test(*args: Any, ranks: int, request: pytest.FixtureRequest, **kwargs: Any) -> None:
            __tracebackhide__ = True
            launch = request.session.stash.get(_SHARED, None)
            if launch is None or not launch.is_ready():
                launch = request.session.stash[_SHARED] = _Launch(ranks)
            try:
                launch.run(functools.partial(_run_body, test, *args, **kwargs), timeout_s)
            finally:
                if not launch.is_ready():
                    launch.kill()

        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("ranks", "request")]
        signature = inspect.signature(body)
        test.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *added]
        )
        ids = [f"{n} rank{'s' if n > 1 else ''}" for n in world_sizes]
        decorated: _Test = pytest.mark.parametrize("ranks", world_sizes, ids=ids)(test)
        return decorated

    return decorate


@pytest.hookimpl(trylast=True)  # an error here must not keep pytest from its own teardown
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the launch of a test function after its last id, and fail there if a rank does not end well."""
    launch = item.session.stash.get(_SHARED, None)
    if launch is None or (nextitem is not None and _launch_key(item) == _launch_key(nextitem)):
        return
    del item.session.stash[_SHARED]
    try:
        if launch.is_ready():
            launch.finish(timeout_s=60.0)
    finally:
        launch.kill()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the launch that an interrupted session has left."""
    if launch := session.stash.get(_SHARED, None):
        launch.kill()


def _launch_key(item: pytest.Item) -> tuple[Any, Any]:
    """Return the test function and its number of ranks."""
    callspec = getattr(item, "callspec", None)
    return getattr(item, "function", None), callspec and callspec.params.get("ranks")


def _run_body(test: Any, *args: Any, **kwargs: Any) -> None:
    """Run the undecorated test; pickle finds only the decorated one by its name."""
    test.__wrapped__(*args, **kwargs)


@contextlib.contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in _IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def _rank_main(pipe: Connection, rank: int, world_size: int, folder: Path) -> None:
    """Run the calls that the parent announces on `pipe`, within one process group, and report each outcome."""
    stack = os.open(folder / f"stack {rank}", os.O_CREAT | os.O_WRONLY)  # never closed: the exit may hang, too
    faulthandler.register(signal.SIGUSR1, stack)
    faulthandler.enable(stack)
    torch.set_num_threads(1)
    gc.freeze()  # collections after each call need not visit what the fork server imported
    try:
        with _warnings_as_errors():
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            dist.barrier()  # all are connected: a rank that dies later does not break a connection in the making
        while pipe.recv() == "call":
            pipe.send((*_outcome((folder / "call").read_bytes()), time.monotonic()))
            gc.collect()
        with _warnings_as_errors():
            dist.barrier()
            dist.destroy_process_group()
    except EOFError:  # the parent has gone
        os._exit(1)
    except BaseException:  # torch.distributed.checkpoint raises a BaseException
        pipe.send(("failed", traceback.format_exc(), time.monotonic()))
        pipe.poll(None)


def _outcome(call: bytes) -> tuple[str, Any]:
    """Run a pickled function. Raise what it raises, but for a skip."""
    function = pickle.loads(call)  # before warnings are errors: it imports the test module
    torch.manual_seed(0)
    try:
        with _warnings_as_errors():
            return "returned", pickle.dumps(function())
    except pytest.skip.Exception as skip:
        return "skipped", str(skip)


class _Rank:
    """A rank as its parent sees it: running, returned, skipped, failed, ending, ended, died or hung."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.name, self.stack_file = f"rank {rank} of {world_size}", folder / f"stack {rank}"
        self.result, self.since = b"", 0.0
        self.pipe, theirs = _SERVER.Pipe()
        self.process = _SERVER.Process(target=_rank_main, args=(theirs, rank, world_size, folder))
        self.process.start()
        theirs.close()
        self.sources: list[Any] = [self.pipe, self.process.sentinel]
        self.begin("running")

    def begin(self, state: str) -> None:
        """Note that the rank is about to run a call, or to end."""
        self.state, self.headline, self.details = state, "was still running", ""

    def send(self, message: str) -> None:
        """Tell the rank what to do next. A dead rank is noticed in `listen`."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def is_busy(self) -> bool:
        return self.state in ("running", "ending")

    def listen(self) -> None:
        """Receive the rank's reports and notice its end."""
        exit_code = self.process.exitcode  # before the pipe is read: it holds all reports of an ended rank
        try:
            while self.pipe in self.sources and self.pipe.poll():
                self.state, report, self.since = self.pipe.recv()
                if self.state == "returned":
                    self.headline, self.result = "returned", report
                else:
                    self.headline, self.details = f"{self.state}:", report
        except (EOFError, OSError):
            self.sources.remove(self.pipe)
        if self.state == "failed":
            self.sources.clear()  # it waits to be terminated
        elif exit_code == 0 and self.state == "ending":
            self.sources.clear()
            self.state, self.headline = "ended", "returned"
        elif exit_code is not None:
            self.sources.clear()
            self.headline, self.details = f"died{self.after()}: exit code {exit_code}", self.stack()
            self.state, self.since = "died", time.monotonic()

    def hang(self, timeout_s: float) -> None:
        """Mark the rank as hung, with its stack; a rank that does not wait inside torch is listed first."""
        self.headline, self.details = f"hung{self.after()} for {timeout_s:g} s:", self.stack()
        innermost = self.details.partition("Current thread")[2].partition("File ")[2].partition("\n")[0]
        self.state, self.since = "hung", float("/torch/" in innermost)

    def after(self) -> str:
        """Say so if the rank had returned from its last call."""
        return "" if self.state == "running" else " after it returned"

    def stack(self) -> str:
        """Return what `faulthandler` wrote in the rank, if anything."""
        return self.stack_file.read_text() if self.stack_file.exists() else ""

    def story(self, short: bool = False) -> str:
        """Describe the rank's end with its traceback or stack, or in one line."""
        if not short:
            return f"{self.name} {self.headline}\n{self.details}"
        last_line = self.details.rstrip().rpartition("\n")[2] if self.headline.endswith(":") else ""
        return f"{self.name} {self.headline} {last_line}".rstrip()


class _Launch:
    """Ranks that run one call after another, until one of them ends badly."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                self.ranks.append(_Rank(rank, world_size, Path(self.folder.name)))
        except BaseException:
            self.kill()
            raise

    def run(self, function: Callable[[], Any], timeout_s: float) -> list[Any]:
        """Return the results of `function()`, in rank order; raise if a rank ends badly, skip if one skips."""
        __tracebackhide__ = True
        call = Path(self.folder.name, "call")  # a file, since a pipe blocks while nobody reads it
        call.write_bytes(pickle.dumps(function))  # plain pickle: tensors by value, not by file descriptor
        for r in self.ranks:
            r.begin("running")
            r.send("call")
        self._follow(timeout_s)
        return [pickle.loads(r.result) for r in self.ranks]

    def is_ready(self) -> bool:
        """Return whether every rank waits for another call."""
        return bool(self.ranks) and all(r.state in ("returned", "skipped") for r in self.ranks)

    def finish(self, timeout_s: float) -> None:
        """Let the ranks leave the process group and end; raise if one of them ends badly."""
        __tracebackhide__ = True
        for r in self.ranks:
            r.begin("ending")
            r.send("end")
        self._follow(timeout_s)

    def kill(self) -> None:
        """End the ranks that still run, with SIGTERM at first."""
        ranks, self.ranks = self.ranks, []
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
        self.folder.cleanup()

    def _follow(self, timeout_s: float) -> None:
        """Wait until no rank is busy, one has ended badly, or the time is over; raise if one has ended badly."""
        __tracebackhide__ = True
        deadline, is_settling = time.monotonic() + timeout_s, False
        while any(r.is_busy() for r in self.ranks):
            sources = [source for r in self.ranks for source in r.sources]
            if not wait(sources, max(0.0, deadline - time.monotonic())):
                break
            for r in self.ranks:
                if r.sources:
                    r.listen()
            if not is_settling and any(r.state in _BAD for r in self.ranks):
                deadline, is_settling = time.monotonic() + _SETTLE_S, True
        if not is_settling:
            self._mark_hung(timeout_s)
        self._raise_if_bad()

    def _mark_hung(self, timeout_s: float) -> None:
        hung = [r for r in self.ranks if r.is_busy()]
        for r in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(r.process.ident or 0, signal.SIGUSR1)
        if hung:
            time.sleep(0.5)  # `faulthandler` writes the stacks
        for r in hung:
            r.hang(timeout_s)

    def _raise_if_bad(self) -> None:
        __tracebackhide__ = True
        bad = sorted((r for r in self.ranks if r.state in _BAD), key=lambda r: (_BAD.index(r.state), r.since))
        if not bad:
            return
        if bad[0].state == "skipped":
            pytest.skip(bad[0].details)
        others = bad[1:] + [r for r in self.ranks if r not in bad]
        raise AssertionError("\n".join([bad[0].story(), *(r.story(short=r.state != "hung") for r in others)]))
