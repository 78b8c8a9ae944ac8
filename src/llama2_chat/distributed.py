"""Several processes at one training run: which of them this is, where they meet, who holds which weights.

`accelerate launch` and `torchrun` start them and tell each by environment variables who it is. All of them
compute; the first alone writes. Weights are held whole by each (DDP) or in parts (FSDP2), as the launcher says.
"""

from __future__ import annotations

import os
from typing import Any

from llama2_chat.errors import UserInputError

_COUNT, _NUMBER, _LOCAL_NUMBER = "WORLD_SIZE", "RANK", "LOCAL_RANK"
_SHARDED = "ACCELERATE_USE_FSDP"


def process_count() -> int:
    """How many processes take part; 1 where nothing launched several."""
    return int(os.environ.get(_COUNT, "1"))


def process_number() -> int:
    """This process's number, from 0."""
    return int(os.environ.get(_NUMBER, "0"))


def local_number() -> int:
    """This process's number on its machine, from 0: the GPU that it uses."""
    return int(os.environ.get(_LOCAL_NUMBER, "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return process_number() == 0


def connect(device: str) -> None:
    """Meet the other processes, on the device type that the run computes on; nothing where there is one.

    They talk over gloo on the CPU and over NCCL on GPUs.

    Raises:
        UserInputError: the launcher asks for a way to share weights that is not known here.
    """
    if process_count() == 1:
        return
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UserInputError(
            "DeepSpeed: not known here; launch with --use_fsdp --fsdp_version 2 to share the weights"
        )
    if _is_set(_SHARDED) and os.environ.get("FSDP_VERSION") != "2":
        raise UserInputError(
            "FSDP: only version 2 is known here; launch with --fsdp_version 2, or set FSDP_VERSION=2 with torchrun"
        )
    from accelerate import PartialState

    PartialState(cpu=device == "cpu")


def wait_for_everyone() -> None:
    """Return when all processes have come here; at once where there is one."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must call it, and get the same answer."""
    if process_count() == 1:
        return flag
    return bool(total([float(flag)])[0])


def total(values: list[float]) -> list[float]:
    """Sums over all processes, in float64; all of them must call it with as many values."""
    if process_count() == 1:
        return values
    import torch
    from accelerate import PartialState

    sums = torch.tensor(values, dtype=torch.float64, device=PartialState().device)
    torch.distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def shard_on_cpu(accelerator: Any) -> bool:
    """Let accelerate shard the weights on the CPU too where the launcher asks for FSDP; say whether it does.

    Left alone, accelerate takes such a request on the CPU for DDP without a word. All it lacks is the entry in its
    state; what it then does is what it does on GPUs.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if not _is_set(_SHARDED) or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def is_sharded(model: Any) -> bool:
    """Whether every weight of the model is held in parts."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_weights(model: Any) -> None:
    """Put the whole weights of a sharded model into the first process's model, in main memory.

    There it is an ordinary model afterwards; in the others it stays in parts. All processes must call it. Nothing
    happens to a model that is not sharded.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    gathered: dict[DTensor, torch.nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in gathered:
                whole = parameter.full_tensor().detach().cpu()
                gathered[parameter] = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)
            if is_main_process():
                module._parameters[name] = gathered[parameter]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
