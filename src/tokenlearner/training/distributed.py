"""One or several processes, one device each: Accelerate, and torch's FSDP2 with `fsdp`."""

from __future__ import annotations

import atexit
import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils.imports import require_package
from ..utils.io import without_folders
from ..utils.modules import pick_device
from ..utils.random import derive_seed
from ..utils.validation import require
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .losses import Objective

logger = logging.getLogger(__name__)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Distributed:
    """This process, among those that train together.

    Args:
        config: Device, precision, sharding and trackers.

    Raises:
        ValueError: accelerate is missing, a device or a tracker is not available, a batch does
            not fall into equal parts or pairs, or there is one process and fsdp needs several.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        device = None if config.device == "auto" else pick_device(config.device)
        self.accelerator = _accelerator(config, on_cpu=device is not None and device.type == "cpu")
        several = self.accelerator.num_processes > 1
        if several:  # a process that ends with threads of the group may abort
            atexit.register(_leave_group)
        self.device = self.accelerator.device if device is None or several else device
        _check_config(config, self.device, self.accelerator.num_processes)

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Gives every process the weights of the first."""
        from accelerate.utils import broadcast

        broadcast(dict(model.state_dict()))  # in place

    def set_rank_seed(self) -> None:
        """Seeds every process but the first with a number of its own, as for dropout."""
        if process := self.accelerator.process_index:
            torch.manual_seed(derive_seed(self.config.seed, process))

    def prepare(self, objective: Objective) -> nn.Module:
        """Returns the objective, sharded with `fsdp` or wrapped in DDP for several processes."""
        if self.config.fsdp:
            _shard(objective.student)
            return objective
        if self.accelerator.num_processes == 1:
            return objective
        return self.accelerator.prepare_model(objective, device_placement=False)

    def any_rank(self, flag: bool) -> bool:
        """Returns whether a flag is set in any process; all of them have to call this."""
        if self.accelerator.num_processes == 1:  # which need not wait for its device
            return flag
        if flag:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def gather(self, value: Any) -> list[Any]:
        """Returns a value of every process, in their order; all of them have to call this."""
        from accelerate.utils import gather_object

        return gather_object([value])

    @contextmanager
    def trackers(self) -> Iterator[None]:
        """Opens the trackers of the config in the folder `out`, and closes them."""
        if self.config.trackers:
            plain = {k: v for k, v in vars(self.config).items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("tokenlearner", without_folders(plain))
        try:
            yield
        finally:
            with self._without_trackers_if_they_fail():
                for tracker in self.accelerator.trackers:
                    tracker.finish()  # `end_training` would end the process group too

    def track(self, row: Mapping[str, Any]) -> None:
        """Reports the numbers of a row that has a `step`."""
        if self.config.trackers:
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            with self._without_trackers_if_they_fail():
                self.accelerator.log(numbers, step=row["step"])

    @contextmanager
    def _without_trackers_if_they_fail(self) -> Iterator[None]:
        """Lets the run go on where a tracker cannot write, as on a full disk."""
        try:
            yield
        except OSError as error:
            names = ", ".join(self.config.trackers or ())
            logger.warning("%s cannot write (%s); the run goes on without", names, error)
            self.accelerator.trackers = []


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Returns copies of weights and optimizer state, whole and by name, of a sharded model too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return copy.deepcopy(get_state_dict(model, optimizer, options=options))


def set_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Any, moments: Any
) -> None:
    """Loads what `full_state` returned."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )


def _shard(model: nn.Module) -> None:
    """Shards every block, and then the rest of the model."""
    from torch.distributed.fsdp import fully_shard

    for name, module in reversed(list(model.named_modules())):
        if name.rpartition(".")[2].isdigit() and any(True for _ in module.parameters()):
            fully_shard(module)  # every block of a list of blocks
    fully_shard(model)


def _accelerator(config: TrainConfig, on_cpu: bool) -> Accelerator:
    require_package("accelerate", "train", "training")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # A run before this one may have had another precision, and another device.
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


def _check_config(config: TrainConfig, device: torch.device, num_processes: int) -> None:
    """Refuses options that do not fit the device or the number of processes."""
    require(
        config.mixed_precision != "fp16" or device.type != "cpu",
        "mixed_precision is 'fp16', which needs a GPU, and the device is a CPU; pass bf16",
    )
    require(
        not config.onednn or device.type == "cpu",
        f"onednn is for a CPU, and the device is {device}; leave it out, or pass device cpu",
    )
    parts = num_processes * config.grad_accum_steps
    require(
        config.batch_size % parts == 0,
        f"batch_size is {config.batch_size}, expected a multiple of {parts} for {num_processes} "
        f"processes and grad_accum_steps {config.grad_accum_steps}",
    )
    share = config.batch_size // num_processes
    require(
        not (config.mixup or config.cutmix) or share % 2 == 0,
        f"mixup and cutmix mix pairs, and a process has {share} images of a step; take a "
        f"batch_size that is a multiple of {2 * parts}",
    )
    require(
        not config.fsdp or torch.distributed.is_initialized(),
        "fsdp shards a model among several processes, and there is one; start them with "
        "torchrun --nproc-per-node N -m tokenlearner train ...",
    )
