"""One or several processes, one device each: Accelerate, and torch's FSDP2 where it is wanted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.modules import pick_device
from ..utils.random import derive_seed
from ..utils.validation import require
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from .objective import Objective


class Distributed:
    """The process that this is, among those that train together.

    Args:
        config: The recipe: device, precision, how processes share, trackers.

    Raises:
        ValueError: accelerate is missing, a device or a tracker is not to be had, a batch does
            not fall into equal parts or pairs, or there is one process and fsdp wants several.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        device = None if config.device == "auto" else pick_device(config.device)
        self.accelerator = _accelerator(config, on_cpu=device is not None and device.type == "cpu")
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if device is None or several else device
        require(
            config.mixed_precision != "fp16" or self.device.type != "cpu",
            "mixed_precision is 'fp16', which needs a GPU, and the device is a CPU; pass bf16",
        )
        require(
            not config.onednn or self.device.type == "cpu",
            f"onednn is for a CPU, and the device is {self.device}; leave it out, or pass device "
            "cpu",
        )
        parts = self.accelerator.num_processes * config.grad_accum_steps
        require(
            config.batch_size % parts == 0,
            f"batch_size is {config.batch_size}, which {self.accelerator.num_processes} processes "
            f"and {config.grad_accum_steps} grad_accum_steps do not divide; take a multiple of "
            f"{parts}",
        )
        share = config.batch_size // self.num_processes
        require(
            not (config.mixup or config.cutmix) or share % 2 == 0,
            f"mixup and cutmix mix pairs, and {share} images of a step in each process make no "
            f"pairs; take a batch_size that is a multiple of {2 * parts}",
        )
        require(
            not config.fsdp or torch.distributed.is_initialized(),
            "fsdp shares a model out among processes, and there is one; start several with "
            "torchrun --nproc-per-node N -m tokenlearner train ...",
        )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.accelerator.is_main_process

    @property
    def process(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        """How many train together."""
        return self.accelerator.num_processes

    def alike(self, model: nn.Module) -> None:
        """Gives every process the weights of the first."""
        if self.num_processes > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for value in model.state_dict().values():
                    value.copy_(broadcast(value.clone()))

    def part_ways(self) -> None:
        """Lets every process but the first draw numbers of its own, as for dropout."""
        if self.process:
            torch.manual_seed(derive_seed(self.config.seed, self.process))

    def share_out(self, objective: Objective) -> nn.Module:
        """Returns what runs in its place: itself, or what shares with the others."""
        if self.config.fsdp:
            _shard(objective.student)
            return objective
        if self.num_processes == 1:
            return objective
        return self.accelerator.prepare_model(objective, device_placement=False)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, "sum") if self.num_processes > 1 else values  # type: ignore[return-value]

    def agree(self, raised: bool) -> bool:
        """Whether any process has raised its hand."""
        if self.num_processes == 1:
            return raised
        if raised:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, in their order."""
        if self.num_processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """Opens what besides metrics.jsonl is reported to, in the folder `out`, and closes it."""
        if self.config.trackers:
            told = {k: v for k, v in vars(self.config).items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("tokenlearner", told)
        try:
            yield
        finally:
            opened: Iterable[GeneralTracker] = self.accelerator.trackers
            for tracker in opened:
                tracker.finish()

    def track(self, row: Mapping[str, Any]) -> None:
        """Reports the numbers of a row that has a `step`."""
        if self.config.trackers:
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            self.accelerator.log(numbers, step=row["step"])


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Weights and the optimizer's state, whole and by name, however they are shared out."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return copy.deepcopy(weights), copy.deepcopy(moments)


def set_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Any, moments: Any
) -> None:
    """The way back from `whole_state`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=options,
    )


def _shard(model: nn.Module) -> None:
    """Leaves every process a part of every block, and of what is around them."""
    from torch.distributed.fsdp import fully_shard

    for name, module in reversed(list(model.named_modules())):
        if name.rpartition(".")[2].isdigit() and any(True for _ in module.parameters()):
            fully_shard(module)  # every block of a list of blocks
    fully_shard(model)


def _accelerator(config: TrainConfig, on_cpu: bool) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        message = "training needs accelerate; run pip install 'tokenlearner[train]'"
        raise ValueError(message) from error
    # A run before this one may have had another precision, and by itself another device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    headless = config.kd_distill_type == "feature" and not config.label_weight
    ddp = DistributedDataParallelKwargs(find_unused_parameters=bool(config.teacher and headless))
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision=config.mixed_precision,
            log_with=config.trackers,  # type: ignore[arg-type]
            project_dir=config.out,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[ddp],
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"Accelerate refuses the options: {error}") from error
