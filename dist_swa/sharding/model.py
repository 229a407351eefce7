"""All shards of a model: those that are averaged, the other parameters, and the buffers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dist_swa.collectives import all_reduce_max, check_replicas, fingerprint, raise_on_all
from dist_swa.sharding.find import (
    FlatMeshes,
    find_buffers,
    find_flat_meshes,
    find_parameters,
    is_sharded,
    storage_fingerprint,
    write_marks,
)
from dist_swa.sharding.fqn import NamePattern, clean_name, select
from dist_swa.sharding.shard import LocalShard, copy_unless_expanded
from dist_swa.sharding.wrappers import (
    collective_device,
    find_fsdp_modules,
    preserve_broadcast_flags,
    preserve_buffers,
    reshard,
    unwrap,
)

_OWN_STATE = ("get_extra_state", "_save_to_state_dict")  # the methods of a module with a state dict of its own


class ModelShards:
    """This rank's shards of a model.

    `averaged` are the parameters that are trainable and selected by `parameters`, `others` the other parameters, and
    `buffers` the buffers. Where the parameters are replicated over a group, construction is a collective of the group:
    it checks that names, shapes and values are the same.
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
        check_group(self.group)
        self._fsdp_modules = find_fsdp_modules(self.module)
        self._flat_meshes: FlatMeshes = {}
        self._replica_mesh: DeviceMesh | None = None
        self._marks: dict[tuple[str, torch.Size], tuple[int, int, int]] = {}  # of the parameters that are not averaged
        self._written: set[str] = set()
        self.averaged: list[LocalShard] = []
        self.others: list[LocalShard] = []
        with self.raise_on_replicas():
            self._find(parameters)
        if self._replica_mesh is not None:
            self._check_replicas(self._replica_mesh)
        self.is_first_rank = all(shard.is_on_first_rank for shard in [*self.averaged, *self.others])

    @property
    def everything(self) -> list[LocalShard]:
        """Every parameter and buffer."""
        return [*self.averaged, *self.others, *self.buffers]

    def raise_on_replicas(self) -> AbstractContextManager[None]:
        """Raise an error of the body on all replicas. A collective of them."""
        return nullcontext() if self.group is None else raise_on_all(self.group, self.device)

    def reshard(self) -> None:
        reshard(self._fsdp_modules)

    def refresh(self) -> None:
        """Reshard, and use the parameters and buffers that the model has now. Local.

        Raises ValueError, with the first name that differs, unless all names are as before, and the shapes and layouts
        of averaged parameters.
        """
        self.reshard()
        now = {shard.name: shard for shard in self._find_parameters()}
        before = {shard.name: shard for shard in self.averaged}
        others = {shard.name for shard in self.others}  # a quantised weight may change its shape
        for name in [*before, *others, *now]:
            is_known = name in others or (name in before and name in now and now[name].has_layout_of(before[name]))
            if name not in now or not is_known:
                raise ValueError(
                    "ShardedAverage needs the parameters it was built on, got other names, another shape or layout of"
                    f" parameter={name!r}; build the average after the model has its parameters and wrapper"
                )
        self.averaged = [now[shard.name] for shard in self.averaged]
        self.others = [now[shard.name] for shard in self.others]
        self.buffers = find_buffers(self.module)
        self._fingerprint = self._storage_fingerprint()

    def select_trainable(self, *, may_leave: bool) -> list[str]:
        """Average the parameters that are trainable now, and return the names of those that joined. Local.

        `may_leave`: those that were frozen are no longer averaged. Otherwise they stay.
        """
        joined = {shard.name for shard in self.others if self._is_to_be_averaged(shard)}
        left = {shard.name for shard in self.averaged if may_leave and not self._is_to_be_averaged(shard)}
        if joined or left:
            shards = [*self.averaged, *self.others]
            names = {shard.name for shard in self.averaged} - left | joined
            averaged = [shard for shard in shards if shard.name in names]
            self._require_one(averaged, shards)
            self.averaged, self.others = averaged, [shard for shard in shards if shard.name not in names]
        return sorted(joined)

    def parameters_unchanged(self) -> bool:
        """Reshard, and return whether modules, parameters and storage are those of the last `refresh`. Cheap."""
        self.reshard()
        return self._storage_fingerprint() == self._fingerprint

    def note_writes(self) -> None:
        """Note which parameters that are not averaged were written since the last call, such as a momentum encoder.

        Under FSDP1, parameters that were flattened with averaged ones are left out: a write to one marks all of them.
        """
        flattened = {id(shard.owner[shard.key]) for shard in self.averaged} if self.others else set()
        others = [shard for shard in self.others if not shard.is_opaque]
        marks = write_marks(shard for shard in others if id(shard.owner[shard.key]) not in flattened)
        self._written |= {key[0] for key, mark in marks.items() if mark != self._marks.get(key, mark)}
        self._marks = marks

    def write(self, averages: Sequence[Tensor]) -> None:
        """Copy averaged shards into the model's parameters. A collective of the replicas, local otherwise."""
        reshard(self._fsdp_modules, discard_prefetched=True)
        for shard, average in zip(self.averaged, averages, strict=True):
            shard.write(average)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Restore averaged parameters, buffers and DDP's broadcast flags on exit. Local. Takes a copy of them.

        Other parameters are restored if the model has written them between updates. One that is written for the first
        time inside keeps its new value, with a warning.
        """
        self.note_writes()
        written = [shard for shard in self.others if shard.name in self._written]
        with torch.no_grad():
            values = [(shard, shard.local_tensor.clone()) for shard in [*self.averaged, *written, *self.buffers]]
        try:
            with preserve_broadcast_flags([self._ddp, *self.module.modules()]), preserve_buffers(self.module):
                yield
        finally:
            reshard(self._fsdp_modules, discard_prefetched=True)
            with torch.no_grad():
                for shard, value in values:
                    if shard.local_tensor.shape == value.shape:
                        copy_unless_expanded(shard.local_tensor, value)
            known = set(self._written)
            self.note_writes()
            if new := sorted(self._written - known):
                warnings.warn(
                    f"parameters that are not averaged were written inside swapped_in, for the first time, and keep"
                    f" these values: {', '.join(new)}; evaluate after a training step that writes them",
                    stacklevel=4,
                )

    def extra_state(self) -> dict[str, Any]:
        """Return what only the modules' own state dicts give, by its key.

        That is `torch.nn.Module.get_extra_state`, quantised weights, and what belongs to these, such as their scales.
        """
        sharded = [shard for shard in self.others if shard.layout is not None and not shard.is_replica]
        known = {name for shard in [*self.averaged, *sharded, *self.buffers] for name in shard.names}
        extra = {name: s.local_tensor for s in self.others if s.is_opaque for name in s.names}
        for name, module in self.module.named_modules(remove_duplicate=False):
            if any(getattr(type(module), method) is not getattr(nn.Module, method) for method in _OWN_STATE):
                own: dict[str, Any] = {}
                # Private, but made to be overridden: `state_dict` would include children, which FSDP1 gathers.
                module._save_to_state_dict(own, f"{name}." if name else "", keep_vars=False)
                extra |= {key: value for stored, value in own.items() if (key := clean_name(stored)) not in known}
        return extra

    def are_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether no rank's `tensors` have NaN or inf. One small all-reduce for each axis of the meshes."""
        parts = [torch.view_as_real(part) if part.is_complex() else part for part in tensors if part.numel()]
        largest = torch._foreach_norm(parts, torch.inf) if parts else []
        is_finite = [value.isfinite().to(self.device) for value in largest]
        (num_bad,) = self.all_reduce_max([int(bool(parts) and not torch.stack(is_finite).all())])
        return num_bad == 0

    def distance(self, averages: Sequence[Tensor]) -> float:
        """Return the L2 norm of the model's averaged parameters minus `averages`, over all ranks. A collective of them.

        Each mesh sums what its ranks have. Ranks that have the same part share it in the sum.
        """
        squares: dict[DeviceMesh | None, float] = {None: 0.0}
        for shard, average in zip(self.averaged, averages, strict=True):
            mesh, num_replicas = (None, 1) if shard.layout is None else (shard.layout.mesh, shard.layout.num_replicas)
            trained = shard.local.to(average.device, torch.promote_types(average.dtype, torch.float32))
            difference = torch.view_as_real(trained - average) if trained.is_complex() else trained - average
            norm = torch.linalg.vector_norm(difference, dtype=torch.float64)
            squares[mesh] = squares.get(mesh, 0.0) + float(norm) ** 2 / num_replicas
        total = squares.pop(None)
        for mesh, of_rank in squares.items():
            assert mesh is not None
            sums = torch.tensor(of_rank, dtype=torch.float64, device=mesh.device_type)
            for axis in range(mesh.ndim):
                dist.all_reduce(sums, group=mesh.get_group(axis))
            total += float(sums)
        return math.sqrt(total)

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the maximum of each of `values` over the ranks that share the model. A collective of them."""
        meshes = dict.fromkeys(shard.layout.mesh for shard in self.averaged if shard.layout)
        axes = {mesh.get_group(axis): mesh.device_type for mesh in meshes for axis in range(mesh.ndim)}
        for group, device_type in axes.items():
            values = all_reduce_max(values, group, torch.device(device_type))
        return list(values)

    @property
    def device(self) -> torch.device:
        return collective_device(self.module)

    def _find(self, parameters: NamePattern | None) -> None:
        """Find the shards for the first time, and decide which of them are averaged."""
        self.reshard()
        if self.group is not None:
            if is_sharded(self.module, self._fsdp_modules):
                raise ValueError(
                    "process_group needs a model with replicated parameters, got sharded ones; leave process_group out"
                )
            self._replica_mesh = DeviceMesh.from_group(self.group, self.device.type)
        self._flat_meshes = find_flat_meshes(self._fsdp_modules)
        shards = self._find_parameters()
        names = [name for shard in shards for name in shard.names]
        self._selected = set(names) if parameters is None else select(names, parameters, "parameters")
        self.averaged = [shard for shard in shards if self._is_to_be_averaged(shard)]
        self.others = [shard for shard in shards if not self._is_to_be_averaged(shard)]
        self._require_one(self.averaged, shards)
        self.buffers = find_buffers(self.module)
        self._fingerprint = self._storage_fingerprint()

    def _require_one(self, averaged: Sequence[LocalShard], shards: Sequence[LocalShard]) -> None:
        if not averaged:
            num_trainable = sum(shard.is_trainable for shard in shards)
            raise ValueError(
                f"ShardedAverage needs a parameter that requires a gradient and is selected by `parameters`, got none"
                f" among num_parameters={len(shards)}, {num_trainable=}; set requires_grad first, or see the names in"
                " model.named_parameters()"
            )

    def _find_parameters(self) -> list[LocalShard]:
        return find_parameters(self.module, self._replica_mesh, self._flat_meshes)

    def _is_to_be_averaged(self, shard: LocalShard) -> bool:
        return shard.is_trainable and not self._selected.isdisjoint(shard.names)

    def _storage_fingerprint(self) -> tuple[list[Any], ...]:
        return storage_fingerprint(self.module, [*self.averaged, *self.others])

    def _check_replicas(self, mesh: DeviceMesh) -> None:
        """Raise ValueError on all replicas unless they have the same parameters. A collective of them."""
        shards = [shard for shard in [*self.averaged, *self.others] if shard.is_replica]
        averaged = {shard.name for shard in self.averaged}
        fingerprints = [
            fingerprint(shard.local_tensor, f"{shard.names} {tuple(shard.shape)} {shard.name in averaged}")
            for shard in shards
        ]
        check_replicas([shard.name for shard in shards], fingerprints, mesh.get_group(), self.device)


def check_group(group: Any) -> None:
    """Raise TypeError unless `group` is None or a process group that this rank is in."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group needs a group that this rank is in, got process_group={group!r}; call this on its ranks"
            " only"
        )
