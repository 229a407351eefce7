"""Composer's Trainer with `SWA`: checkpoints, and runs that resume from them or continue."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Event
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cases import read
from composer_run import EPOCHS, STEPS, AfterBatch, Model, Record, as_by_launcher, composers_own, swa_of, trainer
from dist_swa import EMA, Equal, Window
from dist_swa.integrations.composer import SWA
from markdown_blocks import code_for, execute
from models import same_bits
from ranks import run_on_ranks
from small_run import averages_of, loader, mean_of, network, plain_loop

SEVERAL: dict[str, Any] = {
    "swa_start": "0.3dur",  # of four epochs: two have ended
    "swa_end": None,
    "update_interval": "1ba",
    "rule": {"swa": Equal(), "ema": EMA(decay=0.8), "last": Window(3)},
    "transfer": "swa",
}


def stop(state: Any) -> None:
    raise ZeroDivisionError


def run_and_kill(folder: Path) -> dict[str, Tensor]:
    """Compare an uninterrupted run with a plain loop, and stop another one in its last epoch."""
    averages, steps = plain_loop(DistributedDataParallel(network()), EPOCHS, STEPS, counts_steps=False, **SEVERAL)
    equal = {name: value for name, value in averages.items() if name.startswith("swa.")}
    torch.testing.assert_close(equal, mean_of(steps[2 * STEPS :], "swa."))
    model, swa = Model(), SWA(**SEVERAL)
    trainer(model, [swa]).fit()
    assert same_bits(averages_of(swa_of(swa)), averages)
    assert same_bits({f"swa.{name}": value for name, value in read(model.net).items()}, equal)

    killed = AfterBatch(3 * STEPS + 2, stop)
    with pytest.raises(ZeroDivisionError):
        trainer(Model(), [SWA(**SEVERAL)], killed, save_folder=str(folder), save_interval="1ep").fit()
    return averages


def resume(path: Path) -> dict[str, Tensor]:
    swa = SWA(**SEVERAL)
    warnings.filterwarnings("ignore", "The current world size")  # Composer's: the checkpoint has two random states
    trainer(Model(), [swa], load_path=str(path)).fit()
    assert swa_of(swa).schedule.now.batches == EPOCHS * STEPS
    return averages_of(swa_of(swa))


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return the checkpoint of a killed run on two ranks, and the averages of one that was not killed."""
    folder = tmp_path_factory.mktemp("killed")
    averages = run_on_ranks(run_and_kill, 2, folder)[0]
    return folder / f"ep3-ba{3 * STEPS}-rank0.pt", averages


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_run_ends_as_a_plain_loop(killed_run: tuple[Path, dict[str, Tensor]], ranks: int) -> None:
    """With the same bits on as many ranks; on others, up to the order of sums."""
    path, expected = killed_run
    for averages in run_on_ranks(resume, ranks, path):
        if ranks == 2:
            assert same_bits(averages, expected)
        torch.testing.assert_close(averages, expected)


def test_a_checkpoint_of_composers_own_swa_warns(tmp_path: Path) -> None:
    before = trainer(Model(), [composers_own()], max_duration="1ep")
    before.fit()
    path = before.save_checkpoint(str(tmp_path / "last.pt"))
    swa = SWA("1ba", None, "1ba")
    it = trainer(Model(), [swa], load_path=path)
    message = f"has no averaging state: averaging starts anew; the schedule starts at step {STEPS}$"
    with pytest.warns(UserWarning, match=message) as caught:
        it.fit()
    assert sum("averaging" in str(warning.message) for warning in caught) == 1
    assert swa_of(swa).num_averaged == (EPOCHS - 1) * STEPS
    assert swa_of(swa).schedule.now.batches == EPOCHS * STEPS


@pytest.mark.parametrize("resumed", [False, True], ids=["in a further fit", "from a checkpoint"])
def test_a_run_continues_its_average_after_its_end(resumed: bool, tmp_path: Path) -> None:
    model, swa = Model(), SWA("1ba", None, "1ba")
    record = Record(lambda: read(model.net))
    it = trainer(model, [swa], record, max_duration="1ep")
    it.fit()
    path = it.save_checkpoint(str(tmp_path / "ended.pt"))
    it.fit(duration="1ep")
    if resumed:
        model, swa = Model(), SWA("1ba", None, "1ba")
        trainer(model, [swa], max_duration="2ep", load_path=path).fit()
    assert (swa_of(swa).num_averaged, swa_of(swa).completed) == (2 * STEPS, True)
    torch.testing.assert_close(read(model.net), mean_of([weights for _, weights in record.entries]))


@pytest.mark.parametrize("evaluate", ["averaged", "trained"])
def test_a_loaded_checkpoint_is_evaluated_as_the_run_that_saved_it_and_then_resumes(
    evaluate: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"swa_start": "1ep", "swa_end": None, "update_interval": "1ba", "evaluate": evaluate}
    data = loader(STEPS, False)
    plain, before = Model(with_norm=True), SWA(**arguments)
    save = Record(lambda: it.save_checkpoint(str(tmp_path / "ep{epoch}.pt")), Event.EPOCH_CHECKPOINT)
    it = trainer(plain, [before], save, eval_dataloader=data)
    it.fit()
    model = Model(with_norm=True)
    resumed = trainer(model, [SWA(**arguments)], load_path=str(tmp_path / "ep2.pt"), eval_dataloader=data)
    for _ in range(2):
        resumed.eval()
        assert same_bits(model.evaluated[-1], plain.evaluated[2 * STEPS - 1])
    assert resumed.save_checkpoint(str(tmp_path / "again.pt"))
    resumed.fit()
    assert same_bits(model.net.state_dict(), plain.net.state_dict())


def test_a_checkpoint_from_after_swa_end_is_evaluated_with_the_weights_that_train(tmp_path: Path) -> None:
    arguments = ("2ba", "9ba", "1ba")
    before = trainer(Model(), [SWA(*arguments)], max_duration="2ep")
    before.fit()
    path = before.save_checkpoint(str(tmp_path / "last.pt"))
    model = Model()
    trainer(model, [SWA(*arguments)], max_duration=None, load_path=path, eval_dataloader=loader(STEPS, False)).eval()
    assert same_bits(model.evaluated[-1], read(before.state.model.net))


README = "tests/integrations/in_composer/test_composer_resume.py::test_the_readme_resumes_and_loads_what_was_scored"


def run_readme(folder: Path, length: str) -> None:
    """Run the program of the guide, or its first epochs, and check that it loads what it scored."""
    os.chdir(folder)
    as_by_launcher()
    warnings.filterwarnings("ignore", "The current world size")  # Composer's: the checkpoint has other random states
    names: dict[str, Any] = {}
    code, fit = code_for(README), "trainer.fit()"
    assert fit in code
    code = code.replace(fit, f"assert trainer.state.timestamp.epoch == {3 if length == '4ep' else 0}\n{fit}")
    execute(code.replace('"4ep"', repr(length)), "dist_swa/integrations/README.md", names)
    chosen, best = names["chosen"].state.eval_metrics["eval"]["loss"].compute().item(), names["best"].loss
    assert chosen == pytest.approx(best, rel=1e-6)
    model = names["Model"]()
    model.load_state_dict(load_file("averaged/model.safetensors"))
    torch.manual_seed(0)
    held_out = [torch.randn(192, 4), torch.randn(48, 4)][1]
    assert model.loss(model.eval()(held_out), held_out).item() == pytest.approx(best, rel=1e-6)
    trained = torch.load("best/best.pt", weights_only=False)["state"]["model"]
    assert not same_bits(trained, model.state_dict())
    torch.distributed.barrier()  # all ranks have read it
    shutil.rmtree("averaged", ignore_errors=True)


def test_the_readme_resumes_and_loads_what_was_scored(tmp_path: Path) -> None:
    run_on_ranks(run_readme, 2, tmp_path, "3ep")
    run_on_ranks(run_readme, 3, tmp_path, "4ep")
