"""What a training run can be told, in groups; `recipe.TrainConfig` has all of them.

The words are timm's wherever timm has one. What is said of images is in `data_options.py`.
"""

from dataclasses import dataclass
from typing import Any

from ..utils.validation import (
    check_above_zero,
    check_choice,
    check_count,
    check_from_zero,
    check_rate,
    require,
)
from .distillation import DISTILL_TYPES

_OF_TOKENS = {"at": 0.5, "learner": "v11", "fuse": False}  # of use where tokens are learned anew


@dataclass(frozen=True)
class ModelOptions:
    """What is trained.

    Args:
        model: A name that `create_model` knows, or with insert a file or folder of a trained model.
        model_kwargs: Arguments for a named model, such as {"depth": 8}.
        num_tokens: Learned tokens of a model built new; 0 leaves it as its name says.
        init_from: Weights to start a model built new from, of the same or another resolution, of
            images for a model of video; a file, as model.safetensors in what train wrote.
        keep_head: Copy the classifier too; otherwise it starts new.
        head_bias: What every bias of a new classifier is, as -10 for the sigmoid loss.
        drop_path: Rate at which images skip the last block of a model built new; earlier blocks
            less often.
        insert: Learned tokens to insert into the trained model; they are calibrated first.
        at: Block in front of which tokens are learned, or a share of the depth.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
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
    calibrate: int = 512

    def check_model(self) -> None:
        """Refuses numbers out of range and options that exclude each other."""
        for name in ("num_tokens", "insert", "calibrate"):
            check_count(name, getattr(self, name), least=0)
        check_rate(self.drop_path, "drop_path")
        require(self.calibrate != 1, "calibrate is 1, expected 2 images or more, or 0 for none")
        built_new = ("num_tokens", "model_kwargs", "init_from", "head_bias", "drop_path")
        given = [name for name in built_new if getattr(self, name) not in (None, 0)]
        require(
            not (self.insert and given),
            f"insert is for a trained model, {' and '.join(given)} for one built new; pass either",
        )
        changed = [name for name, usual in _OF_TOKENS.items() if getattr(self, name) != usual]
        require(
            bool(self.insert or self.num_tokens or not changed),
            f"{' and '.join(changed)} go with num_tokens or insert; pass one of them too",
        )
        require(
            not self.keep_head or (self.init_from is not None and self.head_bias is None),
            "keep_head is for the classifier in init_from, which has biases of its own; pass "
            "init_from, and no head_bias",
        )


@dataclass(frozen=True)
class DistillOptions:
    """What a teacher teaches.

    Args:
        teacher: host, for the trained model as it is before inserting, or another trained model.
        kd_distill_type: What the teacher teaches: logit, feature or logit+feature.
        kd_temperature: Divides the logits that are taught.
        distill_loss_weight: Of what the teacher teaches.
        task_loss_weight: Of the labels; None is 1 without a teacher, and 0 with one.
    """

    teacher: str | None = None
    kd_distill_type: str = "logit+feature"
    kd_temperature: float = 1.0
    distill_loss_weight: float = 1.0
    task_loss_weight: float | None = None

    def check_teaching(self) -> None:
        """Refuses numbers out of range, and a run in which nothing would be taught."""
        check_choice("kd_distill_type", self.kd_distill_type, DISTILL_TYPES)
        check_above_zero("kd_temperature", self.kd_temperature)
        check_from_zero(self, "distill_loss_weight", "task_loss_weight")
        require(
            bool(self.label_weight or (self.teacher and self.distill_loss_weight)),
            "nothing would be taught: labels count for 0, and there is no teacher or it counts "
            "for 0; raise task_loss_weight, or pass a teacher and a distill_loss_weight above 0",
        )

    @property
    def label_weight(self) -> float:
        """How much the labels count."""
        if self.task_loss_weight is None:
            return 0.0 if self.teacher else 1.0
        return self.task_loss_weight


@dataclass(frozen=True)
class OptimOptions:
    """How weights change.

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step, over all processes; what is left of an epoch makes no step.
        grad_accum_steps: Parts in which each process takes its share of a step.
        opt: A name of timm's optimizers, such as adamw, lamb or sgd.
        betas: Decay of Adam's means, as [0.9, 0.999]; None is the optimizer's own.
        lr: Highest learning rate.
        weight_decay: Not for biases, norms and position embeddings.
        layer_decay: Factor of the learning rate from each block to the one before it.
        sched: cosine or linear, what the learning rate falls along, or constant.
        min_lr: What it falls to.
        warmup_epochs: Epochs over which it rises from 0.
        warmup_steps: Steps over which it rises, in place of warmup_epochs.
        clip_grad: Largest norm of the gradient; 0 is any.
        loss: softmax, or sigmoid for a sum over classes that each are right or wrong.
        ema_decay: Of the moving average of the weights, which is then judged and saved; 0 is none.
    """

    epochs: int = 6
    batch_size: int = 64
    grad_accum_steps: int = 1
    opt: str = "adamw"
    betas: list[float] | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str = "cosine"
    min_lr: float = 0.0
    warmup_epochs: float = 1.0
    warmup_steps: int | None = None
    clip_grad: float = 1.0
    loss: str = "softmax"
    ema_decay: float = 0.0

    def check_optim(self) -> None:
        """Refuses numbers out of range."""
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            check_count(name, getattr(self, name))
        check_above_zero("lr", self.lr)
        check_choice("loss", self.loss, ("softmax", "sigmoid"))
        check_choice("sched", self.sched, ("cosine", "linear", "constant"))
        check_rate(self.ema_decay, "ema_decay")
        check_from_zero(self, "weight_decay", "warmup_epochs", "min_lr", "clip_grad")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"layer_decay is {self.layer_decay!r}, expected a factor above 0, up to 1",
        )
        if self.warmup_steps is not None:
            check_count("warmup_steps", self.warmup_steps, least=0)
        require(
            self.min_lr < self.lr,
            f"min_lr is {self.min_lr}, expected less than lr, which is {self.lr}",
        )
        require(
            self.sched != "constant" or not self.min_lr,
            f"min_lr is {self.min_lr}, but a constant learning rate does not fall; leave it out",
        )
        require(
            self.warmup_steps is not None or self.warmup_epochs < self.epochs,
            f"warmup_epochs is {self.warmup_epochs}, expected fewer than {self.epochs} epochs",
        )
        require(
            self.betas is None or (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)),
            f"betas are {self.betas!r}, expected two shares from 0 to below 1, as [0.9, 0.999]",
        )


@dataclass(frozen=True)
class RunOptions:
    """Where and how it runs, and what it leaves.

    Args:
        out: New folder for the model, the checkpoint, train.json and metrics.jsonl.
        resume: auto goes on where the run in out was cut off, or starts it; None only starts.
        save_every: Steps from one checkpoint to the next; 0 is one after every epoch.
        nan: stop ends the run when the loss is not finite; skip leaves the step out, and counts.
        trackers: Also report to tensorboard, wandb or another of Accelerate's trackers.
        seed: Of the weights and of the images' order.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        mixed_precision: no, bf16 or fp16.
        fsdp: Share weights, gradients and optimizer out among processes (FSDP2); otherwise
            several processes hold all of them each (DDP).
        compile: Compile the model.
        onednn: Have oneDNN compute linear layers, which many CPUs do faster; of float32.
    """

    out: str = "runs/train"
    resume: str | None = None
    save_every: int = 0
    nan: str = "stop"
    trackers: list[str] | None = None
    seed: int = 0
    device: str = "auto"
    mixed_precision: str = "no"
    fsdp: bool = False
    compile: bool = False
    onednn: bool = False

    def check_run(self) -> None:
        """Refuses what is no choice."""
        for name in ("seed", "save_every"):
            check_count(name, getattr(self, name), least=0)
        check_choice("nan", self.nan, ("stop", "skip"))
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        require(
            self.resume in (None, "auto"), f"resume is {self.resume!r}, expected 'auto' or None"
        )
        require(
            not self.onednn or (self.mixed_precision == "no" and not self.compile),
            "onednn is for float32 that is not compiled; leave it out, or mixed_precision and "
            "compile",
        )
