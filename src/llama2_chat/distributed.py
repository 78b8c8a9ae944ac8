"""Several processes at one training run: which of them this is, where they meet, who holds which weights.

`accelerate launch` and `torchrun` start them and tell each by environment variables who it is. All of them
compute; the first alone writes. Weights are held whole by each (DDP) or in parts (FSDP2), as the launcher says.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from llama2_chat.errors import UserInputError

T = TypeVar("T")

_COUNT, _NUMBER, _LOCAL_NUMBER = "WORLD_SIZE", "RANK", "LOCAL_RANK"
_SHARDED = "ACCELERATE_USE_FSDP"
_LONGEST_WAIT = datetime.timedelta(days=2)
"""While the first process reads a corpus or writes a model the others wait; launchers end them if it dies."""


def process_count() -> int:
    """How many processes take part; 1 where nothing launched several.

    A cluster may set the other variables in a container that no launcher has run in.
    """
    return int(os.environ.get(_COUNT, "1")) if _LOCAL_NUMBER in os.environ else 1


def process_number() -> int:
    """This process's number, from 0."""
    return int(os.environ.get(_NUMBER, "0")) if process_count() > 1 else 0


def local_number() -> int:
    """This process's number on its machine, from 0: the GPU that it uses."""
    return int(os.environ.get(_LOCAL_NUMBER, "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return process_number() == 0


def launch() -> str:
    """How many processes were launched and how they hold the weights, in words; a checkpoint is of one such kind."""
    count = process_count()
    if count == 1:
        return "1 process"
    return f"{count} processes with {'shared' if _is_set(_SHARDED) else 'whole'} weights"


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

    PartialState(cpu=device == "cpu", timeout=_LONGEST_WAIT)


def disconnect() -> None:
    """Take leave of the other processes."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


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


def shares_weights() -> bool:
    """Whether the launcher asks for weights in parts (FSDP), and there are several processes to hold them."""
    return _is_set(_SHARDED) and process_count() > 1


def gather_objects(own: T) -> list[T]:
    """What each process gives, by its number, in every process; all of them must call it. For what is small."""
    if process_count() == 1:
        return [own]
    import torch.distributed

    gathered: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(gathered, own)
    return gathered


def add_up(*tensors: Any) -> None:
    """Put the sum of each tensor over all processes in its place; all of them must call it with equal shapes."""
    if process_count() > 1:
        import torch.distributed

        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def shard(accelerator: Any) -> bool:
    """Have accelerate share the weights where the launcher asks for FSDP, on the CPU too; say whether it does.

    Left alone, accelerate takes such a request on the CPU for DDP without a word: all it lacks is the entry in its
    state. And in bfloat16 it would round the summed loss, and add up gradients, in bfloat16: here both stay float32.
    """
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not _is_set(_SHARDED) or process_count() == 1:
        return False
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.mixed_precision == "bf16":
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    return True


def share_weights(model: Any, precision: Any = None) -> None:
    """Let each process hold a part of every weight where the launcher asks for FSDP; elsewhere nothing happens.

    Layers are gathered one at a time when they compute (FSDP2), embeddings and head together. To be called before
    an optimiser is made; the model is to be called as `run_as_forward` does.

    Args:
        precision: Of the gathered weights, a torch.dtype; default: their own. Gradients are summed in float32.
    """
    if not shares_weights() or is_sharded(model):
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (process_count(),))
    policy = MixedPrecisionPolicy()
    if precision is not None:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    kept_whole = set(model._no_split_modules or ())  # transformers' names of a model's layers
    for layer in [module for module in model.modules() if type(module).__name__ in kept_whole]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def run_as_forward(model: Any, function: Callable[..., T], *arguments: Any) -> T:
    """`function(model, *arguments)`, with a sharded model's weights at hand as in its own forward pass.

    FSDP gathers weights where a module is called: a function that uses parts of the model (the decoder, then the head
    at some positions) would find others' parts missing.
    """
    if not is_sharded(model):
        return function(model, *arguments)
    import torch

    def forward(self: Any, *inputs: Any) -> Any:
        made = function(self, *inputs)
        # FSDP marks the result to gather weights again in the backward pass; a view would lose the mark.
        return made.clone() if isinstance(made, torch.Tensor) else made

    own = model.__dict__.get("forward")
    model.forward = MethodType(forward, model)
    try:
        found: T = model(*arguments)
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    return found


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Every process holds all weights of a sharded model within the block; all must enter it, none waits inside.

    Sampling asks for the weights at each token. Gathered for each of them, they would go over the network as many
    times, and the processes would have to draw equally many tokens. The weights are not to be changed inside.

    Source: §3.2.3, the weights are consolidated once before generation and freed after it.
    """
    from torch.distributed.fsdp import FSDPModule

    if not is_sharded(model):
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    run_as_forward(model, lambda _: None)  # the first forward pass decides which module is the outermost
    model.unshard()
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        # Also forgets the order of the passes inside, which differs between processes: FSDP gathers ahead by it.
        model.reset_iter_state()


def sum_gradients(model: Any) -> None:
    """Add up the gradients of all processes; those of a sharded model FSDP has averaged (`gradient_factor`)."""
    if process_count() > 1 and not is_sharded(model):
        add_up(*(parameter.grad for parameter in model.parameters() if parameter.grad is not None))


def gradient_factor(model: Any) -> int:
    """What a loss is to be multiplied by so that gradients are summed over processes: FSDP takes their mean."""
    return process_count() if is_sharded(model) else 1


def is_sharded(model: Any) -> bool:
    """Whether the processes share the model's weights."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def release(model: Any) -> None:
    """Let each process hold its own part of the weights alone again, after a pass without gradients gathered more."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Any) -> Any:
    """All of a tensor that the processes share, in each of them; any other tensor itself. All must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_first(tensor: Any) -> Any:
    """All of a tensor that the processes share, in the first one's main memory, None in the others; or itself."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    complete = tensor.full_tensor()
    return complete.cpu() if is_main_process() else None


def own_part(tensor: Any, like: Any) -> Any:
    """A whole tensor, known to every process, shared as `like` is; itself where that one is not shared."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_weights(model: Any) -> None:
    """Put the whole weights of a sharded model into the first process's model, in main memory.

    There it is an ordinary model afterwards; in the others it stays in parts. All processes must call it. Nothing
    happens to a model that is not sharded.
    """
    import torch
    from torch.distributed.tensor import DTensor

    release(model)
    gathered: dict[DTensor, torch.nn.Parameter | None] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in gathered:
                whole = parameter.full_tensor().detach()
                gathered[parameter] = (
                    torch.nn.Parameter(whole.cpu(), requires_grad=parameter.requires_grad)
                    if is_main_process()
                    else None
                )
            if is_main_process():
                module._parameters[name] = gathered[parameter]


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
