"""Is a policy as good on 8 learned tokens of an image as on all of its positions?

By imitation: an expert that knows where things are brings the agent to the T (`pusht.py`), and
policies that see images alone learn what it does, from the same episodes, in the same steps, with
the same blocks. Behind the first block a frame is all of its positions, or tokens: learned, or the
means of regions. Then they act in episodes that are new. Every run leaves a file in `--out`; a
command that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from baselines import RegionMeans
from measured import add_device, closing, in_ms, machine, write_results
from printed import policy_table
from pusht import SIDE, Episodes, collect, roll_out
from torch import Tensor, nn

from tokenlearner import create_model
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Seconds, time_interleaved
from tokenlearner.models import ActionBins, TokenStream
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.preprocessing import set_preprocessing
from tokenlearner.utils.io import atomic_write, write_json
from tokenlearner.utils.preprocessing import Preprocessing

SIZE, PATCH, FRAMES = 64, 8, 2  # of an image, in pixels, and how many a policy sees
DEPTH, AT = 3, 1  # blocks, and those in front of the tokens
POSITIONS = (SIZE // PATCH) ** 2
NUM_BINS, PLACES = 64, 6  # of a number, and numbers: the action, and two places known
# The ground is white; as 0 it tells nothing, and things on it are found in a third of the steps.
WHITE_IS_0 = Preprocessing(mean=(1.0,) * 3, std=(0.1,) * 3, crop_pct=1.0)


class AllPositions(nn.Module):
    """In a learner's place: every position is a token."""

    def forward(self, x: Tensor, grid: object = None) -> Tensor:
        return x


@dataclass(frozen=True)
class Contender:
    """Tokens of a frame, and what makes them; None is what is learned."""

    num_tokens: int
    make: Callable[[], nn.Module] | None = None


GRID = (SIZE // PATCH, SIZE // PATCH)
CONTENDERS = {
    "all positions": Contender(POSITIONS, AllPositions),
    "8 learned tokens": Contender(8),
    "4 learned tokens": Contender(4),
    "means of 2 x 4 regions": Contender(8, lambda: RegionMeans(8, GRID)),
}


def build(name: str, seed: int) -> FrameViT:
    """A contender before training; what they have in common starts alike."""
    contender = CONTENDERS[name]
    torch.manual_seed(seed)
    model: Any = create_model(
        "framevit_mini_patch8_f6_tl4at3_32",
        img_size=SIZE,
        patch_size=PATCH,
        num_frames=FRAMES,
        depth=DEPTH,
        at=AT,
        num_tokens=contender.num_tokens,
        num_classes=PLACES,
        num_bins=NUM_BINS,
        causal=True,
    )
    model.encoder.pos_embed.data.copy_(sines(model.embed_dim))
    if contender.make:
        model.encoder.blocks[-1].learner = contender.make()
    return model


def sines(channels: int) -> Tensor:
    """Sines and cosines of rows and columns, for positions to start with: `1 n c`."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    waves = pi * torch.logspace(0, -1.2, channels // 4)
    parts = [fn(v.flatten()[:, None] * waves) for v in (y, x) for fn in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None]


def episodes(options: Namespace, seed: int) -> Episodes:
    """What the expert shows to all contenders of a seed; kept in `--out`."""
    path = options.out / f"episodes-{options.episodes}-{seed}.pt"
    if not path.exists():
        found = collect(options.episodes, SIZE, seed)
        with atomic_write(path) as temporary:
            torch.save(vars(found), temporary)
    return Episodes(**torch.load(path))


def train(model: FrameViT, data: Episodes, options: Namespace, seed: int) -> None:
    """Learns the expert's actions, each from a frame and those before it in its episode."""
    bins = action_bins().to(options.device)
    set_preprocessing(model, WHITE_IS_0)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, options.steps, pct_start=0.1
    )
    model.train()
    losses = []
    for step in range(options.steps):
        last = torch.randint(len(data.frames), (options.batch_size,), generator=generator)
        frames, places, present = data.clips(last, FRAMES, generator)
        clips = ((frames / 255 - 1) / 0.1).movedim(-1, 1).to(options.device)  # b c t h w
        logits = model.forward_frames(clips, present=present.to(options.device))
        loss = bins.loss(logits, places.to(options.device), present.to(options.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: loss {mean(losses):.3f}", flush=True)
            losses.clear()
    model.eval()


def action_bins() -> ActionBins:
    """Bins over the square that the agent can be sent to."""
    return ActionBins([0.0] * PLACES, [SIDE] * PLACES, NUM_BINS, smoothing=1.0)


def run(name: str, seed: int, options: Namespace) -> dict[str, Any]:
    """Trains a contender and lets it act, unless it has."""
    path = options.out / f"run-{name.replace(' ', '-')}-{seed}.json"
    recipe = {key: getattr(options, key) for key in ("episodes", "steps", "batch_size", "lr")}
    recipe |= {"held_out": options.held_out}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["recipe"] != recipe:
            raise ValueError(
                f"{path} was made with {found['recipe']}, expected {recipe}; take the same options "
                "or another --out"
            )
        return found
    begun = time.perf_counter()
    model = build(name, seed).to(options.device)
    train(model, episodes(options, seed), options, seed)
    took = time.perf_counter() - begun
    played = sorted(roll_out(Actor(model), options.held_out, SIZE))
    reached = [bool(one[1]) for one in played]
    found = {
        "contender": name,
        "seed": seed,
        "recipe": recipe,
        "success_percent": 100 * mean(reached),
        "steps_where_reached": mean([n for _, ok, n in played if ok] or [0]),
        "training_seconds": took,
        "reached": reached,
    }
    write_json(path, found)
    print(f"{name}, seed {seed}: {found['success_percent']:.1f} % in {took:.0f} s", flush=True)
    return found


class Actor:
    """A trained policy, one frame of several robots at a time: uint8 `b h w 3 -> b 2`."""

    def __init__(self, model: FrameViT):
        self.stream, self.bins = TokenStream(model), action_bins()

    def __call__(self, frames: Tensor, new: list[int]) -> Tensor:
        if new:
            self.stream.reset(new)
        return self.bins.to_actions(self.stream.push(frames).cpu())[:, :2]


def costs(options: Namespace) -> dict[str, dict[str, Any]]:
    """What a step of one robot costs: multiply-adds, and time, interleaved."""
    frame = torch.randint(0, 256, (1, SIZE, SIZE, 3), dtype=torch.uint8)
    models = {name: build(name, 0).to(options.device).eval() for name in CONTENDERS}
    actors = {}
    for name, model in models.items():
        set_preprocessing(model, WHITE_IS_0)
        actors[name] = Actor(model)
    runs = {name: lambda actor=actor: actor(frame, []) for name, actor in actors.items()}
    seconds = time_interleaved(runs, options.rounds)
    reference: Seconds = seconds["all positions"]
    return {
        name: {
            "macs": _macs(model),
            "latency_ms": in_ms(seconds[name]),
            "speedup": vars(seconds[name].speedup_over(reference)),
        }
        for name, model in models.items()
    }


def _macs(model: FrameViT) -> int:
    """Multiply-adds of a step: a frame is encoded, the rest runs on the tokens of all."""
    clip = torch.zeros(1, 3, FRAMES, SIZE, SIZE, device=model.time_embed.device)
    return count_macs(model, clip) - (FRAMES - 1) * count_macs(model.encoder, clip[:, :, :1])


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [run(name, seed, options) for seed in options.seeds for name in options.contenders]
    found = costs(options)
    print(policy_table(runs, found))
    print(closing("policy.py", device=options.device, rounds=options.rounds))
    results = {"machine": machine(options.device), "costs": found, "runs": runs}
    write_results(options.out / "results.json", "policy.py", results)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/policy"), help="folder of the runs")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=600, help="that the expert shows")
    parser.add_argument("--steps", type=int, default=1500, help="updates")
    parser.add_argument("--batch_size", type=int, default=16, help="clips an update")
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest rate")
    parser.add_argument("--held_out", type=int, default=200, help="episodes to act in")
    parser.add_argument("--rounds", type=int, default=200, help="timed steps")
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
