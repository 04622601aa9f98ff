"""`TrainConfig`: the options of `tokenlearner train`, in timm's words wherever timm has one."""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from ..data.config import AugmentConfig, DataConfig
from ..models.compilation import CompileMode, known_mode
from ..utils.io import is_model_path
from ..utils.validation import (
    check_above_zero,
    check_count,
    check_from_zero,
    check_literals,
    check_rate,
    require,
)
from .distillation import DistillType

EVALUATIONS = 20  # within all steps, where these are counted and not epochs
_LEARNER_DEFAULTS = {"at": 0.5, "learner": "v11", "fuse": False, "overlap": 0}


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained.

    Args:
        model: A name that `create_model` knows, or a file or folder of a trained model, which goes
            on; for other classes than it has with a new classifier.
        model_kwargs: Arguments for a named model, such as {"depth": 8}.
        num_tokens: Learned tokens of a model built new; 0 leaves it as its name says.
        init_from: Weights to start a model built new from, of the same or another resolution, of
            images for a model of video; a file, as model.safetensors in what train wrote.
        keep_head: Copy the classifier too; otherwise it starts new.
        head_bias: Value of every bias of a new classifier, as -10 for the sigmoid loss.
        drop_path: Rate at which images skip the last block of a model built new; earlier blocks
            less often.
        insert: Learned tokens to insert into the trained model; they are calibrated first.
        at: Block in front of which tokens are learned, or a share of the depth.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
        overlap: Blocks in front of `at` that run on tokens and positions; not with fuse.
        calibrate: Training images, without labels, for calibrating; 0 leaves it out.
    """

    model: str = "vit_mini_patch4_28"
    model_kwargs: dict[str, Any] | None = None
    num_tokens: int = 0
    init_from: str | None = None
    keep_head: bool = False
    head_bias: float | None = None
    drop_path: float = 0.0
    insert: int = 0
    at: int | float = 0.5
    learner: str = "v11"
    fuse: bool = False
    overlap: int = 0
    calibrate: int = 512

    def check_model(self) -> None:
        """Refuses numbers out of range and options that exclude each other."""
        for name in ("num_tokens", "insert", "overlap", "calibrate"):
            check_count(name, getattr(self, name), least=0)
        check_rate(self.drop_path, "drop_path")
        require(self.calibrate != 1, "calibrate is 1, expected 2 images or more, or 0 for none")
        built_new = ("num_tokens", "model_kwargs", "init_from", "head_bias", "drop_path")
        given = [name for name in built_new if getattr(self, name) not in (None, 0)]
        require(
            not (self.is_trained and given),
            f"{'insert is for' if self.insert else f'{self.model} is'} a trained model, "
            f"{' and '.join(given)} for a new one; pass either",
        )
        changed = [
            name for name, value in _LEARNER_DEFAULTS.items() if getattr(self, name) != value
        ]
        require(
            bool(self.insert or self.num_tokens or not changed),
            f"{' and '.join(changed)} go with num_tokens or insert; pass one of them too",
        )
        require(
            not self.keep_head or (self.init_from is not None and self.head_bias is None),
            "keep_head keeps the classifier of init_from and its biases; pass init_from, and no "
            "head_bias",
        )

    @property
    def is_trained(self) -> bool:
        """Whether the run starts from a trained model, which is loaded."""
        return bool(self.insert) or is_model_path(self.model)


@dataclass(frozen=True)
class DistillConfig:
    """The teacher, and how much it counts beside the labels.

    Args:
        teacher: host, for the trained model as it is before inserting, or another trained model.
        kd_distill_type: Compare logits with the teacher's, features behind blocks, or both.
        kd_temperature: Divides the logits of student and teacher.
        distill_loss_weight: Weight of the distillation loss.
        task_loss_weight: Weight of the labels' loss; None is 1 without a teacher, and 0 with one.
    """

    teacher: str | None = None
    kd_distill_type: DistillType = "logit+feature"
    kd_temperature: float = 1.0
    distill_loss_weight: float = 1.0
    task_loss_weight: float | None = None

    def check_distill(self) -> None:
        """Refuses numbers out of range, and a run without a loss."""
        check_above_zero("kd_temperature", self.kd_temperature)
        check_from_zero(self, "distill_loss_weight", "task_loss_weight")
        require(
            bool(self.label_weight or (self.teacher and self.distill_loss_weight)),
            "there is nothing to learn: task_loss_weight is 0, and there is no teacher or "
            "distill_loss_weight is 0; raise one of the weights",
        )

    @property
    def label_weight(self) -> float:
        """Weight of the labels' loss."""
        if self.task_loss_weight is None:
            return 0.0 if self.teacher else 1.0
        return self.task_loss_weight


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimizer and learning rate.

    Args:
        epochs: Passes over the training images, with an evaluation after each; None is 6, or what
            steps make.
        steps: Steps of the whole run in place of epochs, with 20 evaluations within them.
        batch_size: Images a step, over all processes; what is left of an epoch makes no step.
        grad_accum_steps: Parts in which each process takes its share of a step.
        opt: A name of timm's optimizers, such as adamw, lamb or sgd.
        betas: Decay of Adam's means, as [0.9, 0.999]; None is the optimizer's default.
        lr: Highest learning rate.
        weight_decay: Not for biases, norms and position embeddings.
        layer_decay: Factor of the learning rate from each block to the one before it.
        sched: What the learning rate falls along; constant does not fall.
        min_lr: What it falls to.
        warmup_epochs: Epochs over which it rises from 0; None is 1, half of a single epoch, or a
            tenth of steps.
        warmup_steps: Steps over which it rises, in place of warmup_epochs.
        clip_grad: Largest norm of the gradient; 0 is any.
        loss: softmax, or sigmoid for a sum over classes that each are right or wrong.
        ema_decay: Of the moving average of the weights, which is evaluated and saved; 0 is none.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    grad_accum_steps: int = 1
    opt: str = "adamw"
    betas: list[float] | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr: float = 0.0
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    clip_grad: float = 1.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    ema_decay: float = 0.0

    def check_optim(self) -> None:
        """Refuses numbers out of range."""
        self._check_length()
        for name in ("batch_size", "grad_accum_steps"):
            check_count(name, getattr(self, name))
        check_above_zero("lr", self.lr)
        check_rate(self.ema_decay, "ema_decay")
        check_from_zero(self, "weight_decay", "warmup_epochs", "min_lr", "clip_grad")
        decay, betas = self.layer_decay, self.betas
        require(decay is None or 0 < decay <= 1, f"layer_decay is {decay!r}, expected 0 < it <= 1")
        check_count("warmup_steps", self.warmup_steps or 0, least=0)
        require(self.min_lr < self.lr, f"min_lr is {self.min_lr}, expected less than lr {self.lr}")
        require(
            self.sched != "constant" or not self.min_lr,
            f"min_lr is {self.min_lr}, but a constant learning rate does not fall; leave it out",
        )
        require(
            betas is None or (len(betas) == 2 and all(0 <= b < 1 for b in betas)),
            f"betas are {betas!r}, expected two shares from 0 to below 1, as [0.9, 0.999]",
        )

    def _check_length(self) -> None:
        """Checks steps, or epochs and those of warming up, which get their defaults."""
        if self.steps is not None:
            check_count("steps", self.steps)
            require(
                self.epochs is None,
                f"steps is {self.steps} and epochs is {self.epochs}, but both say how long the run "
                "is; pass either, and None for the other",
            )
            return
        epochs = 6 if self.epochs is None else check_count("epochs", self.epochs)
        warmup = 1.0 if self.warmup_epochs is None else self.warmup_epochs
        if epochs == 1 and warmup == 1:  # the default, and a first try
            warmup = 0.5
        object.__setattr__(self, "epochs", epochs)
        object.__setattr__(self, "warmup_epochs", warmup)
        require(
            self.warmup_steps is not None or warmup < epochs,
            f"warmup_epochs is {warmup}, expected fewer than {epochs} epochs",
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the steps of the whole run."""
        return self.steps or (self.epochs or 0) * steps_per_epoch

    def eval_interval(self, steps_per_epoch: int) -> int:
        """Returns the steps from one evaluation to the next."""
        return math.ceil(self.steps / EVALUATIONS) if self.steps else steps_per_epoch


@dataclass(frozen=True)
class RunConfig:
    """Options of the run: its folder, its processes, its precision, what it reports.

    Args:
        out: New folder for the model, the checkpoint, train.json and metrics.jsonl.
        held_out: Share of the training images to evaluate on in place of the validation split,
            which is not read then.
        keep: The model of the last evaluation, or of the best one, which its numbers then flatter:
            by top-1, or where labels do not count by the loss against the teacher. None is best
            where labels do not count and with patience.
        patience: Evaluations in a row without a better one that end the run; 0 lets it run.
        license: Of the model, for its card, such as apache-2.0; None is that of the weights it
            started from, if they say.
        resume: auto goes on where the run in out was cut off, or starts it; None only starts.
        save_every: Steps from one checkpoint to the next; 0 is one after every epoch.
        log_interval: Steps from one report of the loss to the next, which waits for the device;
            several processes also agree only then that one of them got a signal to stop.
        nan: stop ends the run when a loss is not finite; skip leaves the step out, and counts. To
            skip, a run waits for the device in every step.
        trackers: Also report to tensorboard, wandb or another of Accelerate's trackers.
        seed: Of the weights and of the images' order.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        mixed_precision: no, bf16 or fp16.
        fsdp: Share weights, gradients and optimizer out among processes (FSDP2); otherwise
            several processes hold all of them each (DDP).
        compile: Compile blocks, each once for all that are alike (default), or the whole model as a
            CUDA graph (reduce-overhead, max-autotune); see `compile_model`.
        onednn: Have oneDNN compute linear layers, which many CPUs do faster; of float32.
    """

    out: str = "runs/train"
    held_out: float = 0.0
    keep: Literal["last", "best"] | None = None
    patience: int = 0
    license: str | None = None
    resume: Literal["auto"] | None = None
    save_every: int = 0
    log_interval: int = 10
    nan: Literal["stop", "skip"] = "stop"
    trackers: list[str] | None = None
    seed: int = 0
    device: str = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    fsdp: bool = False
    compile: CompileMode = "no"
    onednn: bool = False

    def check_run(self) -> None:
        """Refuses numbers out of range."""
        check_rate(self.held_out, "held_out")
        for name in ("seed", "save_every", "patience"):
            check_count(name, getattr(self, name), least=0)
        check_count("log_interval", self.log_interval)
        require(
            not self.onednn or self.mixed_precision == self.compile == "no",
            "onednn is for float32 that is not compiled; leave out onednn, or mixed_precision and "
            "compile",
        )


@dataclass(frozen=True)
class TrainConfig(AugmentConfig, DistillConfig, OptimConfig, DataConfig, ModelConfig, RunConfig):
    """Options of a whole training: `TrainConfig(model=..., data=..., epochs=90)`.

    Its options, all of them optional, are those of the configs above and of the data's configs.

    Raises:
        ValueError: A number is out of range, or options exclude each other.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", os.path.expanduser(self.out))
        object.__setattr__(self, "compile", known_mode(self.compile))
        check_literals(self)
        self.check_run()
        self.check_model()
        self.check_data()
        self.check_optim()
        self.check_augment()
        self.check_distill()
        if self.keep is None:
            best = self.patience or not self.label_weight
            object.__setattr__(self, "keep", "best" if best else "last")
        require(
            self.teacher != "host" or bool(self.insert),
            "teacher is 'host', the model before inserting, but insert is 0; pass insert too",
        )
        mixed = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        require(
            not mixed or bool(self.label_weight),
            f"{' and '.join(mixed)} change labels, and labels count for 0; pass task_loss_weight",
        )
        require(
            self.ratio is None or self.scale is not None,
            "ratio is the shape of what scale cuts out at random; pass scale too",
        )
        require(
            self.compile == "no" or not self.teacher or "feature" not in self.kd_distill_type,
            "features are read by hooks, which a compiled model does not call; pass "
            "kd_distill_type='logit', or compile='no'",
        )
        require(
            not (self.fsdp and self.ema_decay),
            "ema_decay is not supported with fsdp, which shards the weights; pass either",
        )
