"""The harness in `ranks.py` passes on what ranks return, and a rank that ends badly fails the test."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from ranks import on_ranks, run_on_ranks


def _all_reduce_ones() -> int:
    """The number of ranks, by asking them."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones)


def _message(function: Any, world_size: int, *args: Any, **kwargs: Any) -> str:
    """The message with which the ranks fail."""
    with pytest.raises((AssertionError, pytest.skip.Exception)) as failure:  # a skip would hide this very test
        run_on_ranks(function, world_size, *args, **kwargs)
    assert failure.type is AssertionError
    return str(failure.value)


# What comes back


def _rank_later_if_lower(world_size: int) -> tuple[int, int]:
    time.sleep(0.1 * (world_size - dist.get_rank()))
    return dist.get_rank(), dist.get_world_size()


def test_results_come_in_rank_order() -> None:
    assert run_on_ranks(_rank_later_if_lower, 3, 3) == [(0, 3), (1, 3), (2, 3)]


def _plus_rank(tensor: torch.Tensor, *, times: int) -> tuple[torch.Tensor, int]:
    return (tensor + dist.get_rank()) * times, torch.get_num_threads()


def test_tensors_travel_both_ways_larger_than_a_pipe() -> None:
    tensor = torch.arange(300_000.0).view(3, 100_000).t()
    for rank, (result, threads) in enumerate(run_on_ranks(_plus_rank, 2, tensor, times=2)):
        assert torch.equal(result, (tensor + rank) * 2)
        assert threads == 1


def test_every_call_has_fresh_ranks() -> None:
    first, second = run_on_ranks(os.getpid, 2), run_on_ranks(os.getpid, 2)
    assert len({os.getpid(), *first, *second}) == 5


@on_ranks(1, 2, 4)
def test_a_collective_reaches_every_rank() -> None:
    assert _all_reduce_ones() == dist.get_world_size()


# The decorator


@pytest.mark.parametrize("word", ["one", "two"])
@on_ranks(1, 2)
def test_the_decorator_passes_fixtures_and_parameters(tmp_path: Path, word: str) -> None:
    assert word in ("one", "two")
    (tmp_path / f"{word} {dist.get_rank()}").touch()
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{word} {r}" for r in range(dist.get_world_size())]


@pytest.mark.parametrize("draw", [1, 2])
@on_ranks(2)
def test_every_case_starts_with_the_same_random_state(draw: int) -> None:
    assert torch.equal(torch.rand(draw), torch.rand(draw, generator=torch.Generator().manual_seed(0)))


CASES = """
import multiprocessing, os, threading, time, warnings
from pathlib import Path
import pytest
import torch, torch.distributed as dist
from ranks import on_ranks

multiprocessing.set_forkserver_preload(["pytest", "torch.distributed"])  # all that is needed here

def note(case):
    name = f"{case} on {dist.get_rank()} of {dist.get_world_size()}"
    with open(Path(__file__).parent / "log", "a") as log:
        log.write(f"{name}={os.getpid()}\\n")

@pytest.mark.parametrize("case", ["passes", "fails", "second", "skips", "third", "hangs", "dies", "skips everywhere",
                                  "fourth"])
@on_ranks(2, timeout_s=3)
def test_case(case):
    note(case)
    if case == "skips everywhere":
        pytest.skip("nowhere")
    if dist.get_rank() == 1:
        if case == "fails":
            raise ValueError("no good")
        if case == "skips":
            pytest.skip("not here")
        if case == "hangs":
            time.sleep(60)
        if case == "dies":
            os._exit(3)
    dist.all_reduce(torch.ones(1))

@pytest.mark.parametrize("case", ["a", "b"])
@on_ranks(1, 2)
def test_world_size(case):
    note(case)

@pytest.mark.parametrize("case", ["early", "late"])
@on_ranks(1)
def test_end(case):
    threading.Thread(target=lambda: (threading.main_thread().join(), os._exit(3))).start()

@pytest.mark.parametrize("case", ["changed", "unchanged"])
@on_ranks(1)
def test_warnings(case):
    if case == "changed":
        warnings.simplefilter("ignore")
    warnings.warn("mind the step")

@pytest.fixture
def stop(case):
    if case == "late":
        pytest.exit("stopped")

@pytest.mark.parametrize("case", ["early", "late"])
@on_ranks(1)
def test_stop(case, stop):
    note(case)
"""


class Run(NamedTuple):
    outcomes: dict[str, str]
    output: str
    process_ids: dict[str, str]


def _run_pytest(folder: Path, *arguments: str) -> Run:
    """Run `CASES` in a pytest of its own; return the outcome of each id, and which process ran which case."""
    (folder / "test_cases.py").write_text(CASES)
    (folder / "pytest.ini").write_text("[pytest]")
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "ranks", *arguments]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": tests}, capture_output=True, text=True, timeout=100
    )
    found = re.findall(r"^test_cases.py::(.*\]) (PASSED|FAILED|SKIPPED|ERROR)", result.stdout, re.MULTILINE)
    lines = (folder / "log").read_text().splitlines()
    process_ids = dict(line.split("=") for line in lines)
    assert len(process_ids) == len(lines), "a case ran twice"
    return Run(dict(found), result.stdout + result.stderr, process_ids)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run_pytest(tmp_path_factory.mktemp("cases"), "-k", "not stop")


OUTCOMES = {
    "passes": ("PASSED", ""),
    "fails": ("FAILED", "rank 1 of 2 failed:"),
    "second": ("PASSED", ""),
    "skips": ("SKIPPED", "not here"),
    "third": ("PASSED", ""),
    "hangs": ("FAILED", "rank 1 of 2 hung for 3 s:"),
    "dies": ("FAILED", "rank 1 of 2 died: exit code 3"),
    "skips everywhere": ("SKIPPED", "nowhere"),
    "fourth": ("PASSED", ""),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_each_id_has_its_own_outcome(run: Run, case: str) -> None:
    outcome, message = OUTCOMES[case]
    assert run.outcomes[f"test_case[2 ranks-{case}]"] == outcome
    heading = f" test_case[2 ranks-{case}] "
    if outcome == "FAILED":
        assert message in run.output.partition(heading)[2].partition("\n____")[0]
    else:
        assert message in run.output
        assert heading not in run.output.replace("test_cases.py::", "")


def test_ids_of_one_function_share_a_launch_until_one_leaves_a_rank_behind(run: Run) -> None:
    launches = [["passes", "fails"], ["second", "skips"], ["third", "hangs"], ["dies"], ["skips everywhere", "fourth"]]
    for rank in (0, 1):
        ids = [{run.process_ids[f"{case} on {rank} of 2"] for case in cases} for cases in launches]
        assert [len(each) for each in ids] == [1] * len(launches)
        assert len(set.union(*ids)) == len(launches)


def test_each_world_size_has_a_launch(run: Run) -> None:
    ids = {name: run.process_ids[f"{name}"] for name in ("a on 0 of 1", "b on 0 of 1", "a on 0 of 2", "b on 0 of 2")}
    assert ids["a on 0 of 1"] == ids["b on 0 of 1"] != ids["a on 0 of 2"] == ids["b on 0 of 2"]


def test_a_launch_that_ends_badly_is_an_error_of_its_last_id(run: Run) -> None:
    assert run.outcomes["test_end[1 rank-early]"] == "PASSED"
    assert run.outcomes["test_end[1 rank-late]"] == "ERROR"
    assert "rank 0 of 1 died after it returned: exit code 3" in run.output


def test_a_case_does_not_change_the_warnings_of_the_next(run: Run) -> None:
    assert run.outcomes["test_warnings[1 rank-changed]"] == "PASSED"
    assert run.outcomes["test_warnings[1 rank-unchanged]"] == "FAILED"


def test_a_session_that_is_stopped_between_two_ids_ends_their_launch(tmp_path: Path) -> None:
    found = _run_pytest(tmp_path, "-k", "stop")
    assert found.outcomes == {"test_stop[1 rank-early]": "PASSED"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(found.process_ids["early on 0 of 1"]), 0)


# Failures


def _raise_on_rank_1(error: BaseException) -> None:
    if dist.get_rank() == 1:
        raise error
    _all_reduce_ones()


@pytest.mark.parametrize("error", [ValueError("no good"), SystemExit(0), KeyboardInterrupt()])
def test_a_failing_rank_fails_the_test_and_no_other_rank(error: BaseException) -> None:
    message = _message(_raise_on_rank_1, 3, error)
    assert message.startswith("rank 1 of 3 failed:\nTraceback (most recent call last):\n")
    assert "in _raise_on_rank_1" in message
    *_, own, _, other_0, other_2 = message.splitlines()
    assert own.startswith(type(error).__name__)
    assert [other_0, other_2] == ["rank 0 of 3 was still running", "rank 2 of 3 was still running"]


def _fail_by_and_by() -> None:
    time.sleep(0.2 * (2 - dist.get_rank()))
    raise ValueError(f"this is {dist.get_rank()}")


def test_the_first_of_several_failures_comes_first() -> None:
    message = _message(_fail_by_and_by, 3)
    assert message.startswith("rank 2 of 3 failed:\n")
    assert message.index("this is 2") < message.index("this is 1") < message.index("this is 0")
    assert message.splitlines()[-1] == "rank 0 of 3 failed: ValueError: this is 0"


def _return_a_function() -> Any:
    return lambda: None


def test_a_result_that_does_not_pickle_fails_the_test() -> None:
    assert "_return_a_function.<locals>" in _message(_return_a_function, 1)


def _close_the_group_early() -> None:
    if dist.get_rank() == 1:
        dist.destroy_process_group()


def test_a_rank_that_cannot_close_the_group_fails_the_test() -> None:
    assert "has not been initialized" in _message(_close_the_group_early, 2)


# Deaths


def _die_on_rank_1(number: int) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    _all_reduce_ones()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_rank_comes_before_the_errors_that_it_causes(number: int) -> None:
    message = _message(_die_on_rank_1, 3, number)
    assert message.startswith(f"rank 1 of 3 died: exit code -{int(number)}\n")
    assert "\nrank 0 of 3 failed: " in message  # with a connection error, by its dead neighbour
    assert ("in _die_on_rank_1" in message) == (number == signal.SIGSEGV)  # SIGKILL lets nobody look


def _die_by_and_by() -> None:
    time.sleep((0.2, 0.0, 60.0)[dist.get_rank()])
    os._exit(dist.get_rank())


def test_the_first_of_several_deaths_comes_first() -> None:
    story, _, *others = _message(_die_by_and_by, 3).splitlines()
    assert story == "rank 1 of 3 died: exit code 1"
    assert others == ["rank 0 of 3 died: exit code 0", "rank 2 of 3 was still running"]


def _exit_on_rank_0(code: int) -> None:
    if dist.get_rank() == 0:
        os._exit(code)
    _all_reduce_ones()


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_leaves_without_a_word_fails_the_test(code: int) -> None:
    assert _message(_exit_on_rank_0, 2, code).startswith(f"rank 0 of 2 died: exit code {code}\n")


def _die_after_returning_on_rank_1(code: int) -> str:
    if dist.get_rank() == 1:
        threading.Thread(target=_exit_when_the_main_thread_is_done, args=(code,)).start()
    else:
        threading.Thread(target=time.sleep, args=(0.3,)).start()  # this one ends well, but later
    return "all is well"


def _exit_when_the_main_thread_is_done(code: int) -> None:
    threading.main_thread().join()
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


@pytest.mark.parametrize("code", [3, -signal.SIGKILL])
def test_a_rank_that_dies_after_it_returned_fails_the_test(code: int) -> None:
    message = _message(_die_after_returning_on_rank_1, 2, code)
    assert message.startswith(f"rank 1 of 2 died after it returned: exit code {int(code)}\n")


# Hangs


def _sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    _all_reduce_ones()


def test_a_hung_rank_comes_before_those_that_wait_for_it() -> None:
    run_on_ranks(os.getpid, 1)  # the fork server's start shall not count
    message = _message(_sleep_on_rank_1, 3, timeout_s=3)
    assert message.startswith("rank 1 of 3 hung for 3 s:\n")
    culprit, *others = message.split("rank 0 of 3 hung")
    assert "in _sleep_on_rank_1" in culprit
    assert "in _all_reduce_ones" not in culprit
    assert "".join(others).count("in _all_reduce_ones") == 2


def _receive_in_vain_on_rank_1() -> None:
    if dist.get_rank() == 1:
        dist.recv(torch.ones(1), src=0)


def test_a_hung_rank_comes_before_those_that_have_returned() -> None:
    run_on_ranks(os.getpid, 1)
    message = _message(_receive_in_vain_on_rank_1, 2, timeout_s=3)
    assert message.startswith("rank 1 of 2 hung for 3 s:\n")
    assert message.splitlines()[-1] == "rank 0 of 2 returned"


def _never_end_on_rank_0() -> None:
    if dist.get_rank() == 0:
        threading.Thread(target=time.sleep, args=(60,)).start()


def test_a_rank_that_does_not_end_is_hung() -> None:
    run_on_ranks(os.getpid, 1)
    message = _message(_never_end_on_rank_0, 2, timeout_s=3)
    assert message.startswith("rank 0 of 2 hung after it returned for 3 s:\n")
    assert message.splitlines()[-1] == "rank 1 of 2 returned"


def _fail_and_refuse_to_end(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    raise ValueError("and ends nevertheless")


def test_no_rank_outlives_its_call(tmp_path: Path) -> None:
    assert "and ends nevertheless" in _message(_fail_and_refuse_to_end, 1, tmp_path)
    (pid,) = (int(p.name) for p in tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Warnings and skips


def _warn() -> None:
    warnings.warn("mind the step", stacklevel=1)


def test_a_warning_fails_the_test() -> None:
    assert _message(_warn, 1).splitlines()[-1] == "UserWarning: mind the step"


def _skip_on_rank_1() -> None:
    if dist.get_rank() == 1:
        pytest.skip("not here")
    _all_reduce_ones()


def test_a_skip_on_one_rank_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^not here$"):
        run_on_ranks(_skip_on_rank_1, 2)


def _skip_or_fail() -> None:
    if dist.get_rank() == 1:
        pytest.skip("not here")
    raise ValueError("no good")


def test_a_failure_counts_more_than_a_skip() -> None:
    assert _message(_skip_or_fail, 2).startswith("rank 0 of 2 failed:\n")
