"""FSDP2 (`fully_shard`): reshard a module, after any kind of pass. The only file with private members of FSDP2.

`FSDPModule.reshard` alone leaves three things: a pass that has not ended, prefetched all-gathers, and the event that
the next forward waits for. They have no public calls, except for the event.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule


def reshard(module: FSDPModule, *, discard_prefetched: bool = False) -> None:
    """Free the unsharded parameters of `module`, and end a pass that raised. Local.

    `discard_prefetched`: also drop all-gathers that were prefetched. Pass it before new values are written into the
    shards: otherwise the next forward would use a prefetched all-gather of stale weights.
    """
    state = module._get_fsdp_state()
    if _has_unfinished_pass(state):
        _end_pass(state)
    if discard_prefetched:
        _synchronize()  # offloaded shards may still be on their way to the device
        # None: the next forward waits for the current stream, and not for an event from before the write.
        module.set_post_optim_event(cast(torch.Event, None))
        for group in _param_groups(state):
            group.wait_for_unshard()  # torch reshards only all-gathers that were waited for
    module.reshard()


def num_fsdp_axes(module: FSDPModule) -> dict[int, int]:
    """Return how many axes of its mesh FSDP2 uses, by the id of each parameter. The others are tensor parallelism's."""
    return {
        id(sharded.sharded_param): group.mesh_info.mesh.ndim
        for group in _param_groups(module._get_fsdp_state())
        for sharded in group.fsdp_params
    }


def _has_unfinished_pass(state: Any) -> bool:
    """Whether FSDP2 believes that a pass is running: it raised, or it ran only some modules of a group."""
    states = [state._training_state, *(group._training_state for group in _param_groups(state))]
    return state._state_ctx.post_backward_final_callback_queued or any(one.name != "IDLE" for one in states)


def _end_pass(state: Any) -> None:
    """Reset what FSDP2 keeps of an unfinished pass, and drop the unreduced gradients of a backward.

    Torch's own `reset_iter_state` also drops the gradients that earlier passes have accumulated.
    """
    context, idle = state._state_ctx, type(state._training_state).IDLE
    for group in state._comm_ctx.post_forward_order:  # also those of other roots with the same communication context
        group._post_forward_indices.clear()
    state._comm_ctx.post_forward_order.clear()
    context.iter_forward_root = None
    has_backward, context.post_backward_final_callback_queued = context.post_backward_final_callback_queued, False
    if has_backward:
        _synchronize()  # for reductions that are still running
    for part in context.all_states:
        part._training_state = idle
        part._modules_to_run_forward.clear()
        for group in _param_groups(part):
            group._training_state = idle
            for sharded in group.fsdp_params if has_backward and group.reduce_grads else ():
                if "unsharded_accumulated_grad" in vars(sharded):  # torch 2.15 has the other one only
                    sharded.unsharded_accumulated_grad = None
                if hasattr(sharded, "_unsharded_param"):
                    sharded._unsharded_param.grad = None


def _param_groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch < 2.12


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
