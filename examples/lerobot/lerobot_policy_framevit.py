"""A policy of LeRobot on `FrameViT`: `lerobot-train --policy.type=framevit`.

One module is the whole plugin: LeRobot finds the config by its registered name, and by the names of
this module the policy and its processors. A frame of each camera becomes a few learned tokens; the
robot's state conditions them (FiLM); actions are bins between the least and the largest value of
the data. Training reads clips, acting one frame at a time, from a `TokenStream`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import (
    ACTION,
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from torch import Tensor

from tokenlearner import create_model
from tokenlearner.models import ActionBins, TokenStream


@PreTrainedConfig.register_subclass("framevit")
@dataclass
class FrameViTConfig(PreTrainedConfig):
    """How a policy is built.

    Args:
        n_obs_steps: Frames that it sees, the newest included.
        model: A named `FrameViT`, which says its width and heads.
        image_size: Side of the square that images of any size are resized to, in pixels.
        patch_size: In pixels; it divides `image_size`.
        num_tokens: Learned tokens of an image.
        num_bins: Bins of each number of an action.
        smoothing: As of `ActionBins`.
        optimizer_lr: Learning rate of AdamW.
        optimizer_weight_decay: Its weight decay.
    """

    n_obs_steps: int = 6
    model: str = "framevit_tiny_patch16_f6_tl8at6_224"
    image_size: int = 224
    patch_size: int = 16
    num_tokens: int = 8
    num_bins: int = 256
    smoothing: float = 0.75
    optimizer_lr: float = 1e-4
    optimizer_weight_decay: float = 0.05
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MIN_MAX,  # to [-1, 1], which the bins divide
        }
    )

    @property
    def observation_delta_indices(self) -> list[int]:
        """The frames of a clip, the newest last."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """An action for each of them."""
        return self.observation_delta_indices

    @property
    def reward_delta_indices(self) -> None:
        """None."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW."""
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay)

    def get_scheduler_preset(self) -> None:
        """A constant rate."""
        return None

    def validate_features(self) -> None:
        """Raises ValueError if there is no camera, no action, or an input with no place."""
        kinds = {name: feature.type for name, feature in (self.input_features or {}).items()}
        if not self.image_features or self.action_feature is None:
            raise ValueError(
                f"inputs are {kinds}, outputs {list(self.output_features or {})}; expected an "
                f"image or more, and '{ACTION}'"
            )
        taken = {FeatureType.VISUAL: self.image_features, FeatureType.STATE: [OBS_STATE]}
        if others := [name for name, kind in kinds.items() if name not in taken.get(kind, ())]:
            raise ValueError(
                f"inputs {others} have no place in a FrameViT, expected images and '{OBS_STATE}'; "
                "leave them out of input_features"
            )


class FrameViTPolicy(PreTrainedPolicy):
    """Actions from the learned tokens of the last frames.

    Args:
        config: With its features, as `make_policy` fills them in.
    """

    config_class = FrameViTConfig
    name = "framevit"

    def __init__(self, config: FrameViTConfig, **kwargs: Any):
        super().__init__(config)
        config.validate_features()
        numbers, state = config.action_feature.shape[0], config.robot_state_feature
        self.model = create_model(
            config.model,
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_frames=config.n_obs_steps,
            num_tokens=config.num_tokens,
            num_classes=numbers,
            num_bins=config.num_bins,
            num_cameras=len(config.image_features),
            condition_dim=state.shape[0] if state else 0,
            causal=True,
        )
        limits = [-1.0] * numbers, [1.0] * numbers
        self.bins = ActionBins(*limits, config.num_bins, config.smoothing)
        self.stream = TokenStream(self.model)

    def get_optim_params(self) -> Any:
        """All that is trained."""
        return [p for p in self.parameters() if p.requires_grad]

    def reset(self) -> None:
        """Forgets the frames of the episode before."""
        self.stream.reset()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss of clips, at every frame from it and those before.

        Args:
            batch: Images `b t c h w`, the state `b t d`, actions `b t a`, normalized; and whether
                frames are padding in front of an episode, `b t`, if the data set says so.
        """
        first = next(iter(self.config.image_features))
        padded = batch.get(f"{first}_is_pad")
        present = None if padded is None else ~padded
        logits = self.model.forward_frames(self._images(batch), batch.get(OBS_STATE), present)
        loss = self.bins.loss(logits, batch[ACTION], present)
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Adds the newest frame to the stream: images `b c h w`, the state `b d`, to `b 1 a`."""
        self.eval()
        logits = self.stream.push(self._images(batch), batch.get(OBS_STATE))
        return self.bins.to_actions(logits)[:, None]

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The action for the newest frame: `b a`, normalized. Call it once a frame."""
        return self.predict_action_chunk(batch)[:, 0]

    def _images(self, batch: dict[str, Tensor]) -> Tensor:
        """Clips `b c t h w` or frames `b c h w`, of the model's size; of cameras `b n ...`."""
        cameras = []
        for name in self.config.image_features:
            images, side = batch[name], self.config.image_size
            if images.shape[-2:] != (side, side):
                flat = images.flatten(0, -4)
                flat = F.interpolate(flat, (side, side), mode="bilinear", antialias=True)
                images = flat.unflatten(0, images.shape[:-3])
            cameras.append(images.transpose(1, 2) if images.ndim == 5 else images)
        return torch.stack(cameras, 1) if len(cameras) > 1 else cameras[0]


def make_framevit_pre_post_processors(
    config: FrameViTConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Normalizes what comes in by the data's statistics, and makes actions of what comes out."""
    features = {**config.input_features, **config.output_features}
    norm: dict[str, Any] = {"norm_map": config.normalization_mapping, "stats": dataset_stats}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, device=config.device, **norm),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features, **norm),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
