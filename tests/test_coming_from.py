"""The rows of "Coming from" in dist_swa/README.md: what is named beside each other has the same averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import read
from dist_swa import EMA, SWA, PowerEMA
from dist_swa.integrations.lightning import SWACallback
from lightning_run import Module, fit
from markdown_blocks import ROOT
from small_run import loader, loss_of, network, sgd

EPOCHS, STEPS = 6, 4
TEXT = (ROOT / "dist_swa/README.md").read_text()


def test_torch_once_an_epoch() -> None:
    """`if epoch > 2` there is `swa_start="4ep"` here, as `if epoch > 160` is "162ep"."""
    model = network()
    optimizer = sgd(model)
    theirs = AveragedModel(model)
    swa = SWA(model, steps_per_epoch=STEPS, swa_start="4ep", update_interval="1ep")
    for epoch in range(EPOCHS):
        for batch in loader(STEPS, False):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            swa.step()
        if epoch > 2:
            theirs.update_parameters(model)
    assert swa.num_averaged == int(theirs.n_averaged) == 3
    swa.finalize()
    torch.testing.assert_close(model.state_dict(), theirs.module.state_dict())
    assert "`if epoch > 160: swa_model.update_parameters(model)`" in TEXT
    assert 'swa_start="162ep", update_interval="1ep"`' in TEXT


def test_torch_ema() -> None:
    model = network()
    optimizer = sgd(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    swa = SWA(model, swa_start="0ba", rule=EMA(decay=0.9))
    for batch in loader(STEPS, False):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        swa.step()
        theirs.update_parameters(model)
    swa.finalize()
    torch.testing.assert_close(model.state_dict(), theirs.module.state_dict())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (WeightAveraging, {"swa_start": "0ba"}),
        (
            lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=3),
            {"swa_start": "4ba", "rule": EMA(decay=0.9)},
        ),
    ],
    ids=["WeightAveraging", "EMAWeightAveraging"],
)
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_lightning(theirs: Any, ours: dict[str, Any]) -> None:
    results = []
    for callback in (theirs(), SWACallback(buffers="average", **ours)):
        module = Module(with_norm=True)
        fit(module, [callback])
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        results.append(read(module) | buffers)
    torch.testing.assert_close(results[0], results[1])


def test_torchtitans_half_life_fraction_is_nearly_a_power_ema() -> None:
    total = 5000
    coefficients, rest = [0.0] * total, 1.0
    for n in range(total, 0, -1):
        weight = 1.0 if n == 1 else 1 - 2 ** (-1 / (0.05 * n))
        coefficients[n - 1] = weight * rest
        rest *= 1 - weight
    ours = PowerEMA(0.063).coefficients(total)
    assert sum(abs(a - b) for a, b in zip(coefficients, ours, strict=True)) < 0.01
    assert "| `half_life_fraction=0.05` | `PowerEMA(0.063)` |" in TEXT
