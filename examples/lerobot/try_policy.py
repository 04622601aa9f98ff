"""Tries the policy beside this file against the LeRobot that is installed: `make lerobot`.

Through LeRobot's own factories: data in the format of LeRobotDataset, processors, training, acting,
saving, loading. Ends with an error if anything differs from what docs/robots.md says.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import lerobot_policy_framevit  # noqa: F401 (registers the policy)
import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import (
    get_policy_class,
    make_policy,
    make_policy_config,
    make_pre_post_processors,
)

CAMERAS, SIDE, NUMBERS = ("observation.images.front", "observation.images.hand"), 40, 3
TINY = {"model": "framevit_mini_patch8_f6_tl4at3_32", "image_size": 32, "patch_size": 8}
EPISODES, LENGTH = 4, 8


def record(root: Path) -> LeRobotDataset:
    """Four episodes in which the action is how bright the front camera's image is."""
    image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    numbers = {"dtype": "float32", "shape": (NUMBERS,), "names": list("xyz")}
    features = dict.fromkeys(CAMERAS, image) | {"observation.state": numbers, "action": numbers}
    data = LeRobotDataset.create("local/bright", fps=10, features=features, root=root)
    draw = np.random.default_rng(0)
    for _ in range(EPISODES):
        for _ in range(LENGTH):
            bright = draw.uniform(0, 1)
            frame = {name: np.zeros((SIDE, SIDE, 3), np.uint8) for name in CAMERAS}
            frame[CAMERAS[0]][:] = int(255 * bright)
            frame["observation.state"] = draw.normal(size=NUMBERS).astype(np.float32)
            frame["action"] = np.full(NUMBERS, 10 * bright, np.float32)
            data.add_frame({**frame, "task": "follow the light"})
        data.save_episode()
    if hasattr(data, "finalize"):
        data.finalize()
    return data


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = record(Path(folder) / "data")
        config = make_policy_config("framevit", device="cpu", n_obs_steps=3, num_bins=32, **TINY)
        policy = make_policy(config, ds_meta=data.meta)
        before, after = make_pre_post_processors(config, dataset_stats=data.meta.stats)
        deltas = {name: [i / 10 for i in config.observation_delta_indices] for name in CAMERAS}
        deltas |= {"observation.state": deltas[CAMERAS[0]], "action": deltas[CAMERAS[0]]}
        clips = LeRobotDataset("local/bright", root=data.root, delta_timestamps=deltas)
        loader = torch.utils.data.DataLoader(clips, batch_size=8, shuffle=True)
        optimizer = config.get_optimizer_preset()
        optimizer.lr = 3e-3
        steps = optimizer.build(policy.get_optim_params())
        losses = []
        policy.train()
        for _ in range(20):
            for batch in loader:
                prepared = before(batch)
                assert f"{CAMERAS[0]}_is_pad" in prepared  # or padding would be trained on
                loss, said = policy.forward(prepared)
                steps.zero_grad()
                loss.backward()
                steps.step()
                losses.append(said["loss"])
        assert losses[-1] < 0.75 * losses[0], losses
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} updates")

        policy.save_pretrained(Path(folder) / "policy")
        again = get_policy_class("framevit").from_pretrained(Path(folder) / "policy")
        assert PreTrainedConfig.from_pretrained(Path(folder) / "policy") == again.config
        policy.reset()
        seen, errors = {}, []
        for i in range(4):
            frame = data[i]
            seen = before({k: v for k, v in frame.items() if k.startswith("observation.")})
            action = policy.select_action(seen)
            assert torch.equal(action, again.select_action(seen))
            assert list(after(action).shape) == [1, NUMBERS]
            errors.append((after(action) - frame["action"]).abs().mean().item())
        print(f"actions of 0 to 10 differ from the data by {np.mean(errors):.2f}")
        policy.reset()
        again.reset()
        assert torch.equal(policy.select_action(seen), again.predict_action_chunk(seen)[:, 0])
    print(f"lerobot {version('lerobot')}, torch {torch.__version__}: the policy works")


if __name__ == "__main__":
    main()
