"""Which buffers are averaged. The others are copied from the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dist_swa.sharding.fqn import NamePattern, matches, select
from dist_swa.sharding.shard import LocalShard

# The vectors of torch.nn.utils.parametrizations.spectral_norm, and of the older torch.nn.utils.spectral_norm.
_PARAMETRIZED = re.compile(r"(?:.*\.)?parametrizations\.[^.]+\.\d+\._[uv]")
_HOOKED = re.compile(r"(.+)_[uv]")


def buffer_filter(
    buffers: NamePattern, found: Sequence[LocalShard], parameters: Sequence[LocalShard]
) -> Callable[[LocalShard], bool]:
    """Return a function that says whether a buffer is averaged, where it is floating.

    `found` are the buffers of the model. Raises ValueError or TypeError for `buffers` that name none of them. An
    average of the singular vectors of spectral normalisation is no singular vector of the averaged weight, so only a
    pattern selects them.
    """
    if buffers == "copy":
        return lambda shard: False
    if buffers == "average":
        original = {name for shard in parameters for name in shard.names}
        return lambda shard: not any(_is_singular_vector(name, original) for name in shard.names)
    select([name for shard in found for name in shard.names], buffers, "buffers")
    return lambda shard: any(matches(name, buffers, "buffers") for name in shard.names)


def _is_singular_vector(name: str, parameters: set[str]) -> bool:
    hooked = _HOOKED.fullmatch(name)
    return bool(_PARAMETRIZED.fullmatch(name)) or (hooked is not None and f"{hooked[1]}_orig" in parameters)
