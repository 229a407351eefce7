"""Composer's Trainer with `SWA`: evaluation of averaged weights, and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer import Event
from torch import Tensor

import dist_swa
from cases import read
from composer_run import STEPS, AfterBatch, Model, Record, swa_of, trainer
from dist_swa.integrations.composer import SWA
from models import same_bits
from ranks import on_ranks
from small_run import loader, mean_of, samples, statistics_of


def test_evaluation_uses_the_average_and_changes_nothing() -> None:
    trained, averaged = Model(), Model()
    records = []
    for model, evaluate in ((trained, "trained"), (averaged, "averaged")):
        record = Record(lambda: read(model.net))  # noqa: B023 (called within this turn)
        swa = SWA("8ba", None, "1ba", evaluate=evaluate)
        data = loader(STEPS, dist.is_initialized())
        trainer(model, [swa], record, eval_dataloader=data, eval_interval="4ba").fit()
        records.append([weights for _, weights in record.entries])
    steps = records[0]
    assert all(same_bits(one, other) for one, other in zip(*records, strict=True))
    assert same_bits(read(trained.net), read(averaged.net))
    evaluations = zip(trained.evaluated[::STEPS], averaged.evaluated[::STEPS], strict=True)
    for batch, (seen_trained, seen_averaged) in zip(range(4, 33, 4), evaluations, strict=True):
        assert same_bits(seen_trained, steps[batch - 1])
        torch.testing.assert_close(seen_averaged, mean_of(steps[7:batch] or steps[batch - 1 : batch]))


class Fails(Model):
    def eval_forward(self, batch: Sequence[Tensor], outputs: Any = None) -> Tensor:
        super().eval_forward(batch)
        raise ZeroDivisionError


def test_a_fit_after_an_evaluation_that_raised_continues_from_the_trained_weights() -> None:
    model, swa = Fails(), SWA("1ba", None, "1ba")
    record = Record(lambda: read(model.net))
    it = trainer(model, [swa], record)
    with pytest.raises(ZeroDivisionError):
        it.fit(duration="4ba", eval_dataloader=loader(STEPS, dist.is_initialized()), eval_interval="4ba")
    assert not same_bits(model.evaluated[0], record.entries[-1][1])
    with pytest.raises(RuntimeError, match="inside swapped_in"):  # a checkpoint now would lose the trained weights
        swa.state_dict()
    it.fit(duration="4ba", eval_dataloader=[])
    plain = Model()
    expected = Record(lambda: read(plain.net))
    trainer(plain, [], expected, max_duration="8ba").fit()
    assert [batch for batch, _ in record.entries] == list(range(1, 9))
    assert all(same_bits(one, other) for (_, one), (_, other) in zip(record.entries, expected.entries, strict=True))


def is_recalibrated(model: Model) -> bool:
    """Whether the BatchNorm statistics are those of the current weights on the training data."""
    norm: Any = model.net[1]
    expected = statistics_of(read(model.net), samples(STEPS).tensors[0])
    pairs = zip((norm.running_mean, norm.running_var), expected, strict=True)
    return all(torch.allclose(found, exact, rtol=1e-4, atol=1e-5) for found, exact in pairs)


# swa_end -> the first event of a run of 12 batches after which BatchNorm is recalibrated
RECALIBRATIONS = {"5ba": (STEPS, Event.EPOCH_END), "11ba": (12, Event.FIT_END), None: (12, Event.FIT_END)}


@pytest.mark.parametrize("swa_end", RECALIBRATIONS)
@on_ranks(2)
def test_batch_norm_is_recalibrated_at_the_end_of_the_epoch_or_of_fit(swa_end: str | None) -> None:
    model = Model(with_norm=True)
    records = {
        event: Record(lambda: is_recalibrated(model), event)
        for event in (Event.BATCH_END, Event.EPOCH_END, Event.FIT_END)
    }
    trainer(model, [SWA("2ba", swa_end, "1ba")], *records.values(), max_duration="12ba").fit()
    found = [(batch, event) for event, one in records.items() for batch, is_exact in one.entries if is_exact]
    assert min(found, key=lambda entry: entry[0]) == RECALIBRATIONS[swa_end]


def test_a_swa_end_in_a_further_fit_recalibrates_again() -> None:
    """The first fit stops early, so that the average enters the model before `swa_end`."""
    model, swa = Model(with_norm=True), SWA("1ba", "0.9dur", "1ba")
    it = trainer(model, [swa], AfterBatch(STEPS, lambda state: state.stop_training()), max_duration="16ba")
    it.fit()
    assert swa_of(swa).completed
    assert is_recalibrated(model)
    it.fit(duration="8ba")
    assert swa_of(swa).num_averaged == 15
    assert is_recalibrated(model)


def test_a_resumed_run_keeps_the_recalibrated_statistics(tmp_path: Path) -> None:
    arguments = ("2ba", "9ba", "1ba")
    plain, resumed, swa = Model(with_norm=True), Model(with_norm=True), SWA(*arguments)
    trainer(plain, [SWA(*arguments)], max_duration="3ep").fit()
    before = trainer(Model(with_norm=True), [SWA(*arguments)], max_duration="2ep")
    before.fit()
    path = before.save_checkpoint(str(tmp_path / "last.pt"))
    trainer(resumed, [swa], max_duration="3ep", load_path=path).fit()
    assert swa_of(swa).completed
    assert same_bits(resumed.net.state_dict(), plain.net.state_dict())


def test_a_further_fit_does_not_recalibrate_the_model_that_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    swa = SWA(update_interval="1ba")
    it = trainer(Model(with_norm=True), [swa], max_duration="5ba")  # swa_end, 0.97dur, is the end of the fit
    it.fit()
    assert swa_of(swa).completed
    monkeypatch.setattr(dist_swa, "recalibrate_batch_norm", lambda *_, **__: pytest.fail("a model that trains"))
    it.fit(duration="2ep")


@pytest.mark.parametrize("swa_end", RECALIBRATIONS)
def test_averaged_statistics_are_kept(swa_end: str | None) -> None:
    model = Model(with_norm=True)
    norm: Any = model.net[1]
    means = Record(lambda: norm.running_mean.clone())
    ends = Record(lambda: is_recalibrated(model), Event.EPOCH_END, Event.FIT_END)
    trainer(model, [SWA("2ba", swa_end, "1ba", buffers="average")], means, ends, max_duration="12ba").fit()
    assert not any(is_exact for _, is_exact in ends.entries)
    if swa_end is None:
        averaged = [value for batch, value in means.entries if batch >= 2]
        torch.testing.assert_close(norm.running_mean, torch.stack(averaged).mean(0))
