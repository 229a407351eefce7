"""Which layers are recalibrated: not the skipped ones, and not the frozen ones, also in a resumed SWA."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from batch_norm_models import batches_of, build, dealt, in_every_wrapper, layers_of, statistics, unread, unwrapped, wrap
from batch_norm_oracle import assert_all_statistics
from dist_swa import SWA, recalibrate_batch_norm
from ranks import on_ranks


def changed_layers(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name.rpartition(".")[0] for name in after if after[name] != before[name]}


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval()], ids=["untracked", "frozen"]
)
def test_without_layers_the_loader_is_not_read(layer: nn.Module) -> None:
    batches = unread()
    recalibrate_batch_norm(nn.Sequential(nn.Linear(3, 3), layer), batches)
    assert inspect.getgeneratorstate(batches) == inspect.GEN_CREATED


# Skipped layers


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = build(), nn.BatchNorm1d(4)

    def forward(self, given: torch.Tensor) -> Any:
        return self.after(self.inner(given))


SKIPS: dict[str, tuple[Any, set[str]]] = {
    "a name": ("inner.0", {"inner.0"}),
    "a pattern": ("inner.*", {"inner.0", "inner.2"}),
    "names": (["inner.0", "after"], {"inner.0", "after"}),
    "a function": (lambda name: name == "after", {"after"}),
    "nested": (["inner.2", [lambda name: name.startswith("a")]], {"inner.2", "after"}),
    "nothing": ([], set()),
    "everything": ("*", {"inner.0", "inner.2", "after"}),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("case", SKIPS)
def test_skip_takes_patterns_and_functions(case: str, is_training: bool) -> None:
    skip, skipped = SKIPS[case]
    model = Nested().train(is_training)
    before = statistics(model)
    recalibrate_batch_norm(model, unread() if case == "everything" else batches_of(3), skip=skip)
    assert changed_layers(before, statistics(model)) == layers_of(model).keys() - skipped


def test_a_skip_that_matches_no_layer_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"skip needs a pattern that .* got skip='bakcbone\.\*'; as 0, 2"):
        recalibrate_batch_norm(build(), batches_of(1), skip="bakcbone.*")


def test_a_skip_of_a_wrong_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"skip needs a pattern such as .* got skip=7; leave it out"):
        recalibrate_batch_norm(build(), batches_of(1), skip=7)  # type: ignore[arg-type]


# Frozen layers


def test_a_frozen_layer_keeps_its_statistics() -> None:
    model, batches = build(), batches_of(3)
    model[0].eval()
    before = statistics(model)
    recalibrate_batch_norm(model, batches)
    assert changed_layers(before, statistics(model)) == {"2"}
    assert model[2].num_batches_tracked == 3


def test_in_a_model_in_evaluation_mode_no_layer_is_frozen() -> None:
    model, batches = build().eval(), batches_of(3)
    recalibrate_batch_norm(model, batches)
    assert_all_statistics(model, build(), batches)
    assert not any(part.training for part in model.modules())


def frozen_backbone() -> nn.Sequential:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


def new_swa(model: nn.Module) -> SWA:
    return SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")


@pytest.mark.parametrize("is_resumed", [False, True])
@in_every_wrapper
@on_ranks(1, 2)
def test_swa_remembers_which_layers_were_frozen(wrapper: str, is_resumed: bool) -> None:
    model = wrap(frozen_backbone(), wrapper)
    swa = new_swa(model)
    model.train()
    layers_of(model)["0.1"].eval()
    before = statistics(model)
    assert swa.step()
    unwrapped(model).eval()  # an evaluation; DDP's own flag stays
    assert swa.step()  # in evaluation mode the modes of layers say nothing
    if is_resumed:
        state = swa.state_dict()
        swa = new_swa(model)
        swa.load_state_dict(state)
    swa.finalize(dealt(batches_of(4)))
    assert changed_layers(before, statistics(model)) == {"2"}
    swa.finalize(dealt(batches_of(4)), skip="2")  # frozen and skipped
    assert statistics(model)["0.1.running_mean"] == before["0.1.running_mean"]


def test_a_layer_that_trains_again_is_not_frozen() -> None:
    model = frozen_backbone()
    swa = new_swa(model)
    layers_of(model)["0.1"].eval()
    swa.step()
    model.train()
    swa.step()
    swa.finalize(batches_of(3))
    assert layers_of(model)["0.1"].num_batches_tracked == 3
    with pytest.raises(ValueError, match="skip needs a pattern"):
        swa.finalize(batches_of(3), skip="typo")
