"""What to train and how: `TrainConfig`, which is also the options of `tokenlearner train`."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.config import AugmentConfig, DataConfig
from ..utils.validation import require
from .options import DistillOptions, ModelOptions, OptimOptions, RunOptions


@dataclass(frozen=True)
class TrainConfig(
    AugmentConfig, DistillOptions, OptimOptions, DataConfig, ModelOptions, RunOptions
):
    """What to train, on what, and how.

    Its options are those of `tokenlearner.training.options` and `tokenlearner.data.config`, all
    of them optional: `TrainConfig(model=..., data=..., epochs=90)`.

    Raises:
        ValueError: A number is out of range, or options exclude each other.
    """

    def __post_init__(self) -> None:
        self.check_run()
        self.check_model()
        self.check_data()
        self.check_optim()
        self.check_augment()
        self.check_teaching()
        require(
            self.teacher != "host" or bool(self.insert),
            "teacher is 'host', but nothing is inserted in one; pass insert too",
        )
        mixed = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        require(
            not mixed or bool(self.label_weight),
            f"{' and '.join(mixed)} change labels, and labels count for 0; pass task_loss_weight",
        )
        require(
            self.ratio is None or self.scale is not None,
            "ratio is the shape of what is cut out at random, and nothing is; pass scale too",
        )
        require(
            not (self.compile and self.teacher and "feature" in self.kd_distill_type),
            "features are seen by hooks, which a compiled model does not call; pass "
            "kd_distill_type='logit', or compile=False",
        )
        require(
            not (self.fsdp and self.ema_decay),
            "a moving average of weights that are shared out (fsdp) is not supported; pass either",
        )
