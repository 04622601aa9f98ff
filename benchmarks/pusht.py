"""A reaching task of `policy.py`: dock at the back of the T of gym_pusht, seen as an image.

The environment is gym_pusht's `PushT-v0` as it is: a T lies somewhere, a green outline of it is
where others push it to and does not matter here, and an action is the place that the agent, a disc,
is pulled to for a tenth of a second. The task is to bring the agent next to the middle of the T's
back without pushing it away. Episodes begin with the T upright, by the environment's own option:
turned in any way it takes far longer to learn. All lengths are the environment's, of a square of
512; an image of 64 pixels shows 8 of them as one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDE = 512.0
STEPS = 40  # of an episode at most; the expert takes 25
REACHED = 12.0  # from the agent's middle to its place; 1.5 pixels of an image of 64
GAP = 30.0  # from the T's back to that place; the agent's radius is 15
HELD_OUT = 1_000_000  # the first seed of episodes that no policy was trained on
Info = dict[str, Any]


def make_robot(size: int) -> Any:
    """The environment, without a window, with images of `size` pixels."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    import gym_pusht  # noqa: F401 (makes the environment known to gymnasium)
    import gymnasium

    shape = {"observation_width": size, "observation_height": size}
    return gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels", max_episode_steps=STEPS, **shape)


def place_at_t(info: Info) -> np.ndarray:
    """Where the agent should be, from the T's pose: `x y`."""
    return info["block_pose"][:2] + _axes(info) @ (0.0, -GAP)


def known(info: Info) -> np.ndarray:
    """Where the agent and the middle of the T's back are: `x y x y`."""
    return np.concatenate([info["pos_agent"], info["block_pose"][:2]]).astype(np.float32)


def begin(robot: Any, seed: int) -> tuple[np.ndarray, Info]:
    """Resets to an upright T and an agent in places of a seed; the image, and what is known."""
    draw = np.random.default_rng(seed)
    start = [*draw.uniform(50, 450, 2), *draw.uniform(100, 400, 2), 0.0]
    frame, info = robot.reset(seed=seed, options={"reset_to_state": start})
    return frame, info


def is_reached(info: Info) -> bool:
    """Whether the agent is there."""
    return bool(np.linalg.norm(info["pos_agent"] - place_at_t(info)) < REACHED)


def expert(info: Info) -> np.ndarray:
    """The next place on a way around the T that keeps a distance to it: `x y`."""
    axes = _axes(info)
    x, y = axes.T @ (info["pos_agent"] - info["block_pose"][:2])
    side = 1.0 if x >= 0 else -1.0
    if y < -18:  # nothing is between them
        place = (0.0, -GAP)
    elif abs(x) < 85:  # beside the stem, or on the T: out to the side first
        place = (side * 110, 60.0)
    else:
        place = (side * 95, -60.0)
    return (info["block_pose"][:2] + axes @ place).clip(0, SIDE).astype(np.float32)


def _axes(info: Info) -> np.ndarray:
    """The T's own axes: along its back, and from its back to its foot."""
    c, s = math.cos(info["block_pose"][2]), math.sin(info["block_pose"][2])
    return np.array([[c, -s], [s, c]])


@dataclass(frozen=True)
class Episodes:
    """What the expert did: frames uint8 `n h w 3`, `x y` of three places, each frame's first one.

    The first place is the expert's action. The others are `known`; a policy that learns to tell
    them too finds out sooner what there is to see.
    """

    frames: Tensor
    places: Tensor
    first: Tensor

    def clips(
        self, last: Tensor, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames up to those: `b -> b t h w 3`, places `b t 6`, whether there is one, `b t`.

        Slots in front of an episode are empty, as in a stream that was reset. Half of the clips,
        drawn at random, are mirrored.
        """
        index = last[:, None] + torch.arange(1 - length, 1)
        present = index >= self.first[last][:, None]
        index = index.clamp(min=0)
        frames, places = self.frames[index], self.places[index].unflatten(-1, (3, 2))
        chosen = torch.rand(len(last), generator=generator) < 0.5
        x, y = places.unbind(-1)
        mirrored = torch.stack([SIDE - x, y], dim=-1)
        frames = frames.flip(3).where(chosen[:, None, None, None, None], frames)
        places = mirrored.where(chosen[:, None, None, None], places)
        return frames, places.flatten(2), present


def collect(episodes: int, size: int, seed: int = 0, noise: float = 10.0) -> Episodes:
    """Lets the expert act; its hand trembles, so that it shows how to get back.

    Args:
        episodes: How many.
        size: Of images, in pixels.
        seed: Of the first; other seeds have other episodes.
        noise: Standard deviation of what is added to its actions, but not to those that are kept.
    """
    robot, draw = make_robot(size), np.random.default_rng(seed)
    frames, places, first = [], [], []
    for episode in range(episodes):
        frame, info = begin(robot, seed * 100_000 + episode)
        start = len(frames)
        for _ in range(STEPS):
            if is_reached(info):
                break
            action = expert(info)
            frames.append(torch.from_numpy(frame))
            places.append(torch.from_numpy(np.concatenate([action, known(info)])))
            first.append(start)
            disturbed = action + draw.normal(0, noise, 2).astype(np.float32)
            frame, *_, info = robot.step(disturbed.clip(0, SIDE))
    robot.close()
    return Episodes(torch.stack(frames), torch.stack(places), torch.tensor(first))


def roll_out(
    act: Callable[[Tensor, list[int]], Tensor], episodes: int, size: int, robots: int = 20
) -> Iterator[tuple[int, bool, int]]:
    """Plays held-out episodes on several robots at a time; one that is done begins the next.

    Args:
        act: From frames, uint8 `b h w 3`, and the numbers of robots that begin an episode with
            theirs, to actions, `b 2`.
        episodes: How many.
        size: Of images, in pixels.
        robots: How many at a time.

    Yields:
        The episode's number, whether the agent got there, and in how many steps.
    """
    robots = min(robots, episodes)
    envs = [make_robot(size) for _ in range(robots)]
    waiting = iter(range(episodes))
    current: list[int | None] = [None] * robots
    steps = [0] * robots
    frames = np.zeros((robots, size, size, 3), np.uint8)
    while True:
        new = []
        for i in range(robots):
            if current[i] is None and (episode := next(waiting, None)) is not None:
                frames[i], _ = begin(envs[i], HELD_OUT + episode)
                current[i], steps[i] = episode, 0
                new.append(i)
        if all(episode is None for episode in current):
            break
        actions = act(torch.from_numpy(frames), new).clamp(0, SIDE).numpy()
        for i, episode in enumerate(current):
            if episode is None:
                continue
            frames[i], *_, info = envs[i].step(actions[i])
            steps[i] += 1
            if (reached := is_reached(info)) or steps[i] == STEPS:
                yield episode, reached, steps[i]
                current[i] = None
    for env in envs:
        env.close()
