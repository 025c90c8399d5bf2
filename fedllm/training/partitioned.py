"""DeepSpeed's engine over the factors that a client trains; no other file imports DeepSpeed.

The engine is given the factors alone, not the base: it broadcasts and flattens what it is given,
and one engine is made for every client.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import Optimizer

from fedllm.config.deepspeed_keys import for_base, for_engine
from fedllm.config.models import TrainingSection
from fedllm.model.memory import give_back_large_blocks
from fedllm.packing.slots import AdapterSlots

# weights that are gathered and let go of are mostly larger
_LARGE_BLOCK_BYTES = 1 << 20

Kept = Mapping[int, Mapping[str, Tensor]]
"""What an optimizer keeps, by the number of the parameter and the name of the part."""


class PartitionedTraining:
    """Factors whose gradients and optimizer state are divided among the processes.

    Args:
        parameters: the factors, whole in every process.
        optimizer: of them; what it keeps already is divided too.
        training: how clients train.
        device: where the factors are.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        training: TrainingSection,
        device: torch.device,
    ) -> None:
        deepspeed = _deepspeed(device)
        kept = optimizer.state_dict()["state"]
        optimizer.state.clear()
        self._parameters, self._optimizer = parameters, optimizer
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=nn.ParameterList(parameters),
            optimizer=optimizer,
            config=_settings(training, sum(parameter.numel() for parameter in parameters)),
        )
        flattened = self._zero.round_robin_bit16_groups
        assert len(flattened) == 1 and list(map(id, flattened[0])) == list(map(id, parameters))
        self._install(kept)

    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> float:
        """Update the factors by the sum of all processes' gradients, which is clipped.

        Args:
            gradients: of this process's part of the loss, by the factor.
            learning_rate: of this step.

        Returns:
            The norm of the gradient before it was clipped; infinite: not finite, and no update.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # the engine takes gradients from a backward pass, all of a step from one
        pairs = zip(self._parameters, gradients, strict=True)
        self._engine.backward(torch.stack([(p * g).sum() for p, g in pairs]).sum())
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def kept(self) -> dict[int, dict[str, Tensor]]:
        """Return what the optimizer keeps of every factor; all processes call this together."""
        own = self._own
        found: dict[int, dict[str, Tensor]] = {n: {} for n in range(len(self._parameters))}
        for part, value in self._optimizer.state.get(own, {}).items():
            # SGD without momentum keeps none
            if value is None:
                continue
            values = self._gathered(value) if value.shape == own.shape else [value] * len(found)
            for number, each in enumerate(values):
                found[number][part] = each
        return found

    def close(self) -> None:
        """Take the engine's hooks off the factors, which stay as they were trained."""
        self._engine.destroy()
        # its destructor, which the garbage collector may call much later, would otherwise take off
        # what the next client's engine has put on the same factors
        self._engine.optimizer = None

    @property
    def _own(self) -> Tensor:
        """The part of the flattened factors that this process updates."""
        own: Tensor = self._zero.single_partition_of_fp32_groups[0]
        return own

    def _gathered(self, value: Tensor) -> list[Tensor]:
        """Return the parts of all processes, cut into the shapes of the factors."""
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value)
        sizes = [parameter.numel() for parameter in self._parameters]
        whole = torch.cat(parts)
        assert whole.numel() >= sum(sizes), "less than the factors were gathered"
        pieces = torch.split(whole[: sum(sizes)], sizes)
        return [
            piece.view(parameter.shape)
            for piece, parameter in zip(pieces, self._parameters, strict=True)
        ]

    def _install(self, kept: Kept) -> None:
        """Let this process's part of the optimizer go on from what a whole one kept."""
        own = self._own
        shapes = [parameter.shape for parameter in self._parameters]
        parts = kept[0] if kept else {}
        for part, first in parts.items():
            values = [kept[number][part] for number in range(len(shapes))]
            if [value.shape for value in values] == shapes:
                whole = torch.cat([value.reshape(-1) for value in values])
                begin = dist.get_rank() * own.numel()
                mine = torch.zeros_like(own)
                piece = whole[begin : begin + own.numel()]
                mine[: piece.numel()] = piece
                self._optimizer.state[own][part] = mine
            else:
                self._optimizer.state[own][part] = first.clone()


def divide_base(
    slots: AdapterSlots, device: torch.device, given: Mapping[str, Any] | None = None
) -> None:
    """Leave each process a part of every weight of a base, on `device`, unless that was done.

    A process reads weight after weight from the base's files and keeps its part. A layer's weights
    are gathered before its forward and its backward pass and let go of after it, so that all
    processes have to compute the same layers in the same order, pass by pass. What is later added
    to the model, as adapters are, stays whole.

    Args:
        slots: the base, whose weights are unread; all processes read equal files.
        device: where this process computes.
        given: `training.deepspeed`.
    """
    if slots.is_divided:
        return
    base = slots.base
    assert base.unread is not None, "the weights were read"
    _deepspeed(device)
    from deepspeed import comm
    from deepspeed.runtime.zero import Init, parameter_offload
    from deepspeed.utils.timer import NoopTimer

    comm.init_distributed()
    if device.type == "cpu":
        give_back_large_blocks(_LARGE_BLOCK_BYTES)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    # weights and modules are numbered on and on in a process, which may have divided a base before,
    # and compared with the numbers of processes that have not; modules by an argument's default
    Init.param_id = 0
    offload = parameter_offload.DeepSpeedZeRoOffload
    (module_numbers,) = offload._register_deepspeed_module.__defaults__
    module_numbers[0] = 0
    divided = Init(config_dict_or_path=config, dtype=torch.float32)
    for weight in base.unread.take(base.model, device):
        # by `Init(module=...)` the first process would send all that the others have read
        divided._convert_to_deepspeed_param(weight)
        weight.partition()  # type: ignore[attr-defined]
    layer = _layer_numel(base.model)
    offload(
        base.model,
        timers=NoopTimer(),
        ds_config=config,
        param_persistence_threshold=0,
        **{
            # by default it would keep and fetch ahead all weights of a base of 10^9 parameters
            "max_reuse_distance": 0,
            "prefetch_bucket_size": layer,
            "max_live_parameters": 2 * layer,
            **for_base(given or {}),
        },
    )
    for weight in base.model.parameters():
        # vectors are small: once gathered they stay
        weight.ds_persist = weight.ds_shape.numel() == max(weight.ds_shape)  # type: ignore[attr-defined]
    # it would keep the model for ever
    parameter_offload.FWD_MODULE_STACK.clear()
    for buffer in base.model.buffers():
        buffer.data = buffer.data.to(device)
    slots.is_divided = True


def _layer_numel(model: nn.Module) -> int:
    """Return the number of weights of a layer of a divided model, roughly."""
    causal: Any = model
    total: int = sum(weight.ds_numel for weight in causal.parameters())
    return total // int(causal.config.get_text_config().num_hidden_layers)


@contextmanager
def process_group() -> Iterator[None]:
    """Provide a process group for the block: of this process alone where there is none."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _settings(training: TrainingSection, num_values: int) -> dict[str, Any]:
    given = for_engine(training.deepspeed)
    zero = given.pop("zero_optimization", {})
    # by default buffers have 5 * 10^8 values each, whatever there is; and it wants even numbers
    bucket_size = num_values + num_values % 2
    offload = zero.pop("offload_optimizer", {})
    if training.zero.offload == "cpu":
        zero["offload_optimizer"] = {**offload, "device": "cpu"}
    return {
        **given,
        "train_micro_batch_size_per_gpu": 1,  # losses are sums, whatever the number of rows
        "gradient_allreduce_op": "sum",
        "gradient_clipping": training.clip_norm or 0.0,
        "steps_per_print": 1 << 62,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own is compiled at its first use
        "zero_force_ds_cpu_optimizer": False,
        # the base is divided by itself: the engine has the factors alone
        "zero_optimization": {
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            **zero,
            "stage": min(2, training.zero.stage),
        },
    }


class _Adopted:
    """The process group that DeepSpeed computes in; it remembers one for ever by itself."""

    group: object = None


def _deepspeed(device: torch.device) -> Any:
    """Return the package, at home in the present process group."""
    os.environ["DS_ACCELERATOR"] = device.type
    # of several processes that each see all GPUs of a node, and of those that see one
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed
    from deepspeed import comm
    from deepspeed.utils import groups, logger

    if _Adopted.group is not dist.group.WORLD:
        _Adopted.group = dist.group.WORLD
        logger.setLevel(logging.ERROR)  # it warns of optimizers that are not its own
        warnings.filterwarnings(
            "ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning
        )
        # else it would compile its own all-reduce for CPUs, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        comm.comm.cdb = None
        groups._release_process_group_references()
    return deepspeed
