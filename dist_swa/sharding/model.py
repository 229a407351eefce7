"""Which shards does a model consist of, which of them are averaged, and are they still the same?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_swa.collectives import all_reduce_max, check_replicas, fingerprint, raise_on_all
from dist_swa.sharding.fqn import NamePattern, select
from dist_swa.sharding.shard import (
    LoadOnlyTensor,
    LocalShard,
    are_sharded,
    clean_name,
    find_buffers,
    find_flat_meshes,
    find_fsdp_modules,
    find_parameters,
    is_first_rank,
    preserve_broadcast_flags,
    preserve_buffers,
    reshard,
    storage_fingerprint,
    unwrap,
    write_into,
)


class ModelShards:
    """This rank's shards of a model: the averaged parameters (trainable and selected), the others, the buffers.

    Where the parameters are replicated over a group, construction is a collective of that group: it checks that
    names, shapes and values agree.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        parameters: NamePattern | None = None,
    ) -> None:
        self.module, self._ddp = unwrap(model)
        if self._ddp is not None and process_group is not None:
            raise ValueError("a DDP model needs no process_group, got one besides its own; leave process_group out")
        self.group = process_group if self._ddp is None else self._ddp.process_group
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                f"process_group needs a group that this rank is in, got process_group={self.group!r}; call this on its"
                " ranks only"
            )
        self._fsdp_modules = find_fsdp_modules(self.module)
        self._replica_mesh: DeviceMesh | None = None
        self._flat_meshes: dict[FullyShardedDataParallel, DeviceMesh] = {}
        with self.raise_on_replicas():
            self._capture(parameters)
        if self._replica_mesh is not None:
            shards = [(shard, True) for shard in self.averaged] + [(shard, False) for shard in self.others]
            names = [shard.name for shard, _ in shards]
            fingerprints = [
                fingerprint(shard.local_tensor, f"{shard.names} {tuple(shard.shape)} {is_averaged}")
                for shard, is_averaged in shards
            ]
            check_replicas(names, fingerprints, self._replica_mesh.get_group(), self._device)
        self.is_first_rank = is_first_rank([*self.averaged, *self.others], self._flat_meshes)

    def _capture(self, parameters: NamePattern | None) -> None:
        self.reshard()
        if self.group is not None:
            if are_sharded(self.module):
                raise ValueError(
                    "process_group needs a model with replicated parameters, got sharded ones; leave process_group out"
                )
            self._replica_mesh = DeviceMesh.from_group(self.group, self._device.type)
        self._flat_meshes = find_flat_meshes(self._fsdp_modules)
        shards = find_parameters(self.module, self._replica_mesh, self._flat_meshes)
        names = [name for shard in shards for name in shard.names]
        self._selected = set(names) if parameters is None else select(names, parameters, "parameters")
        self.averaged = [shard for shard in shards if self._is_to_be_averaged(shard)]
        self.others = [shard for shard in shards if not self._is_to_be_averaged(shard)]
        if not self.averaged:
            num_trainable = sum(shard.is_trainable for shard in shards)
            raise ValueError(
                f"ShardedAverage needs a parameter that requires a gradient and is selected by `parameters`, got none"
                f" among num_parameters={len(shards)}, {num_trainable=}; set requires_grad first, or see the names in"
                " model.named_parameters()"
            )
        self.buffers = find_buffers(self.module)
        self._seen = self._identity()

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def everything(self) -> list[LocalShard]:
        """Every parameter and buffer."""
        return [*self.averaged, *self.others, *self.buffers]

    def raise_on_replicas(self) -> AbstractContextManager[None]:
        """Raise an error of the body on all replicas. A collective of them."""
        return nullcontext() if self.group is None else raise_on_all(self.group)

    def reshard(self) -> None:
        reshard(self._fsdp_modules)

    def follow(self) -> None:
        """Reshard, and take over parameters that were replaced by others of the same names, shapes and layouts.

        Raises ValueError that names the first parameter that differs.
        """
        self.reshard()
        now = {shard.name: shard for shard in find_parameters(self.module, self._replica_mesh, self._flat_meshes)}
        before = {shard.name: shard for shard in [*self.averaged, *self.others]}
        for name in [*before, *now]:
            if name not in now or not now[name].is_same_as(before.get(name)):
                raise ValueError(
                    "ShardedAverage needs the parameters it was built on, got other names, another shape or layout of"
                    f" parameter={name!r}; build the average after the model has its parameters and wrapper"
                )
        for shard in self.others:
            if self._is_to_be_averaged(now[shard.name]):
                raise ValueError(
                    "ShardedAverage needs frozen parameters to stay frozen, got requires_grad=True now for"
                    f" parameter={shard.name!r}; build the average once all trained parameters require gradients"
                )
        self.averaged = [now[shard.name] for shard in self.averaged]
        self.others = [now[shard.name] for shard in self.others]
        self.buffers = find_buffers(self.module)
        self._seen = self._identity()

    def parameters_unchanged(self) -> bool:
        """Reshard, and return whether modules, parameters, storage and buffers are those seen last. Local, cheap."""
        self.reshard()
        return self._identity() == self._seen

    def write(self, averages: Sequence[Tensor]) -> None:
        """Put averaged shards into the model's parameters. A collective of the replicas, local otherwise."""
        reshard(self._fsdp_modules, discard_prefetched=True)
        for shard, average in zip(self.averaged, averages, strict=True):
            whole = average if shard.rows is None else shard.full_tensor(average.to(shard.tensor.dtype))
            write_into(shard.local_tensor, whole)

    def checkpoint_view(self, shard: LocalShard, local: Tensor) -> Tensor:
        """Return the whole of it so that the first rank's goes into a checkpoint, from which all ranks read.

        Buffers may differ between ranks, and torch.distributed.checkpoint takes plain tensors from any of them.
        """
        if shard.layout is None and not self.is_first_rank:
            return local.as_subclass(LoadOnlyTensor)
        return shard.as_dtensor(local)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Give back, on exit, the parameters that are averaged, all buffers, and what a forward changes in DDP.

        Local. Takes a copy of them.
        """
        with torch.no_grad():
            values = [(shard, shard.local_tensor.clone()) for shard in [*self.averaged, *self.buffers]]
        try:
            with preserve_broadcast_flags((self._ddp, *self.module.modules())), preserve_buffers(self.module):
                yield
        finally:
            reshard(self._fsdp_modules, discard_prefetched=True)
            with torch.no_grad():
                for shard, held in values:
                    write_into(shard.local_tensor, held)

    def extra_state(self) -> dict[str, Any]:
        """Return what modules keep besides tensors (`torch.nn.Module.get_extra_state`)."""
        return {
            clean_name(f"{name}._extra_state"): module.get_extra_state()
            for name, module in self.module.named_modules(remove_duplicate=False)
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def is_finite(self) -> bool:
        """Whether no rank's averaged shard holds NaN or inf now. One small all-reduce for each axis of the meshes."""
        self.reshard()
        held = [shard.local for shard in self.averaged if shard.local.numel()]
        held = [torch.view_as_real(local) if local.is_complex() else local for local in held]
        largest = torch._foreach_norm(held, torch.inf) if held else []
        is_finite = [value.isfinite().to(self._device) for value in largest]
        num_bad = int(bool(held) and not torch.stack(is_finite).all())
        meshes = dict.fromkeys(shard.layout.mesh for shard in self.averaged if shard.layout)
        axes = {mesh.get_group(axis): mesh.device_type for mesh in meshes for axis in range(mesh.ndim)}
        for group, device_type in axes.items():
            (num_bad,) = all_reduce_max([num_bad], group, torch.device(device_type))
        return num_bad == 0

    def _is_to_be_averaged(self, shard: LocalShard) -> bool:
        return shard.is_trainable and not self._selected.isdisjoint(shard.names)

    def _identity(self) -> tuple[list[Any], ...]:
        return storage_fingerprint(self.module, chain(self.averaged, self.others))
