"""`plan`: which pairs meet a budget, what they cost, and that the host never notices."""

from __future__ import annotations

import copy
import io
import re
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import snapshot
from torch import Tensor, nn

from tokenlearner import create_model, insert, plan, save_model
from tokenlearner.commands.main import main
from tokenlearner.commands.plan import COLUMNS
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Seconds, Timing, time_interleaved
from tokenlearner.evaluation.planning import Option
from tokenlearner.utils.modules import clone_structure

DEPTH, C, N = 4, 24, 16  # blocks, width, positions (a class token comes on top)
IMAGES = torch.zeros(2, 3, 32, 32)
MINI = "vit_mini_patch4_28"


def host(family: str = "vision_transformer.VisionTransformer", **kwargs: Any) -> Any:
    module, _, name = family.partition(".")
    cls = getattr(getattr(timm.models, module), name)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": C, "depth": DEPTH, "num_heads": 2}
    return cls(**shape, num_classes=5, **kwargs)


def block_macs(n: int) -> int:
    return 12 * n * C * C + 2 * n * n * C


def closed_form(at: int, k: int | None) -> int:
    """Multiply-adds of the host, and of V1.1 with 64 hidden channels in front of block `at`."""
    ends = 3 * 8 * 8 * N * C + 5 * C
    if k is None:
        return ends + DEPTH * block_macs(N + 1)
    learner = N * C * 64 + N * 64 * k + N * C * k
    return ends + at * block_macs(N + 1) + learner + (DEPTH - at) * block_macs(k + 1)


def pairs(options: list[Any]) -> list[tuple[Any, Any]]:
    return [(option.at, option.num_tokens) for option in options]


# --- a budget of multiply-adds ------------------------------------------------------------------


@pytest.fixture(scope="module")
def options() -> list[Any]:
    return plan(host(), IMAGES, 0.8, num_tokens=(8, 1, 1), rounds=2)


def deepest(budget: float, *sizes: int) -> list[tuple[int, int]]:
    """The pairs that meet a budget of multiply-adds, by trying every block."""
    most = budget * closed_form(0, None)
    fitting = {k: [at for at in range(DEPTH) if closed_form(at, k) <= most] for k in sizes}
    return [(max(blocks), k) for k, blocks in fitting.items() if blocks]


def test_multiply_adds_are_those_of_the_closed_form(options: list[Any]) -> None:
    counts = [round(option.gmacs * 1e9) for option in options]
    assert counts == [closed_form(option.at, option.num_tokens) for option in options]
    assert len(counts) == 3


def test_the_host_comes_first_then_the_deepest_block_within_the_budget(options: list[Any]) -> None:
    assert pairs(options[1:]) == deepest(0.8, 1, 8) == [(2, 1), (1, 8)]
    assert max(option.macs_share for option in options[1:]) <= 0.8
    first = options[0]
    assert (first.at, first.num_tokens, first.macs_share) == (None, None, 1)
    assert first.speedup == Timing(1, 1, 1)
    options = plan(host(), IMAGES, 0.45, num_tokens=(8, 1), rounds=2)  # no block suits 8
    assert pairs(options[1:]) == deepest(0.45, 1, 8) == [(0, 1)]


def test_a_pair_that_costs_exactly_the_budget_meets_it() -> None:
    budget = closed_form(2, 4) / closed_form(0, None)
    assert pairs(plan(host(), IMAGES, budget, num_tokens=[4], rounds=2)) == [(None, None), (2, 4)]


@pytest.mark.parametrize("kwargs", [{"learner": "v1"}, {"fuse": True}, {"overlap": 1}], ids=str)
def test_learner_and_fuse_are_those_of_insert(kwargs: dict[str, Any]) -> None:
    option = plan(host(), IMAGES, 0.9, num_tokens=[2], rounds=2, **kwargs)[1]
    assert option.gmacs == count_macs(insert(host(), 2, option.at, **kwargs), IMAGES[:1]) / 1e9


def test_nothing_within_the_budget_names_the_smallest_share() -> None:
    share = int(1000 * closed_form(0, 2) / closed_form(0, None)) + 1
    message = rf"budget of 0\.01 .*multiply-adds.* 0\.{share}, with num_tokens=2 at block 0"
    with pytest.raises(ValueError, match=message):
        plan(host(), IMAGES, 0.01, num_tokens=(2, 8))


# --- the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [None, 0, 2])
def test_the_host_is_left_as_it_was_by_an_error_too(
    calls: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, modes, counted = host("beit.Beit", use_rel_pos_bias=True), set(), [0]
    model.blocks[1].eval()
    model.blocks[2].requires_grad_(False)
    model.norm.register_forward_hook(lambda m, _, out: modes.add((m.training, out.requires_grad)))

    def counting(*arguments: Any) -> int:
        counted[0] += 1
        if calls is not None and counted[0] > calls:
            raise RuntimeError("no memory left")
        return count_macs(*arguments)

    monkeypatch.setitem(plan.__globals__, "count_macs", counting)
    before = snapshot(model)
    fails = pytest.raises(RuntimeError, match="no memory left")
    with fails if calls is not None else nullcontext():
        assert len(plan(model, IMAGES, 0.8, num_tokens=[2], rounds=2)) == 2
    assert snapshot(model) == before
    assert modes <= {(False, False)}  # in evaluation mode and without gradients


def test_a_twin_on_meta_has_no_weights_and_leaves_those_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    before = copy.deepcopy(model.state_dict())
    other = clone_structure(model, "meta").state_dict()
    assert {key: value.shape for key, value in other.items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(value.is_meta for value in other.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- time ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `perf_counter` returns; a test lets them pass."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Ticking(nn.Linear):
    """A block that takes so many seconds for each of its tokens."""

    def __init__(self, clock: list[float], seconds: float):
        super().__init__(C, C)
        self.pass_time = lambda n: clock.__setitem__(0, clock[0] + seconds * n)

    def forward(self, x: Tensor) -> Tensor:
        self.pass_time(x.shape[1])
        return super().forward(x)


def timed(clock: list[float], seconds: tuple[float, ...] = (1, 1, 1, 1)) -> Any:
    """A host of such blocks."""
    model = host()
    model.blocks = nn.Sequential(*(Ticking(clock, each) for each in seconds))
    return model


def test_latency_and_speed_are_those_of_the_whole_batch(clock: list[float]) -> None:
    model = timed(clock)
    first, option = plan(model, IMAGES, 0.7, measure="latency", num_tokens=[4], rounds=3)
    assert option.at == 2
    assert first.latency_ms == Timing(68_000, 68_000, 68_000)
    assert option.latency_ms.median == 44_000  # 2 x 17 + 2 x 5 tokens, a second each
    assert option.images_per_second.median == 2 / 44
    assert option.speedup.median == 68 / 44
    assert option.latency_share == pytest.approx(44 / 68)
    assert option.realized_speedup == 68 / 44 * option.macs_share


EVEN = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("seconds", "sizes", "budget", "expected"),
    [
        (EVEN, (4, 8), 0.5, [(1, 4)]),  # of 68: 32, one block deeper 44; 8 tokens take 36 at least
        (EVEN, (4, 8), 0.6, [(1, 4), (0, 8)]),
        (EVEN, (4, 8), 1, [(3, 4), (3, 8)]),
        ((1,), (4, 8), 0.5, [(0, 4)]),
        # A first estimate that is off is put right.
        ((10, 1, 1, 1), (4,), 0.6, [(0, 4)]),  # 2 on a straight line, where 197 of 221 are taken
        ((1, 1, 10, 1), (4,), 0.5, [(1, 4)]),  # 0 on a straight line
    ],
)
def test_a_budget_of_latency_gives_the_deepest_that_keep_it(
    clock: list[float],
    seconds: tuple[float, ...],
    sizes: tuple[int, ...],
    budget: float,
    expected: list[tuple[int, int]],
) -> None:
    model = timed(clock, seconds)
    options = plan(model, IMAGES, budget, measure="latency", num_tokens=sizes, rounds=2)
    assert pairs(options[1:]) == expected
    assert all(option.latency_share <= budget for option in options[1:])


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (1, r"latency; .* 0\.295, with num_tokens=4 at block 0"),
        (0, r" 1\.0, "),
        (-0.1, "tokens save nothing"),  # the fewer tokens, the slower
    ],
)
def test_a_latency_that_nothing_keeps_is_an_error(
    clock: list[float], seconds: float, message: str
) -> None:
    model = timed(clock, (seconds,) * 4)
    if seconds <= 0:  # the time goes elsewhere
        model.patch_embed.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 10))
    with pytest.raises(ValueError, match=message):
        plan(model, IMAGES, 0.2, measure="latency", num_tokens=(8, 4), rounds=2)


def test_runs_are_interleaved_and_every_other_round_goes_backwards(clock: list[float]) -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        clock[0] += len(order)

    seconds = time_interleaved({name: lambda name=name: run(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "cbaabccbaabc"
    assert seconds == {"a": [9, 10], "b": [8, 11], "c": [7, 12]}  # two rounds warm up
    speedup = Seconds([1.0, 10.0, 1.0]).speedup_over(Seconds([2.0, 30.0, 4.0]))
    assert speedup == Timing(3, 2.5, 3.5)  # of ratios in each round


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), True, "0.5"])
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"budget is {budget!r}")):
        plan(host(), IMAGES, budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "flops"}, "measure is 'flops'"),
        ({"num_tokens": ()}, "num_tokens is 0"),
        ({"overlap": -1}, "overlap is -1"),
        ({"overlap": 4}, "overlap is 4, but the model has 4 blocks"),
        ({"budget": 0.01, "overlap": 2}, "at block 2: "),
        ({"num_tokens": (4, 0)}, "num_tokens is 0"),
        ({"num_tokens": (4, 17)}, "num_tokens is 17"),
        ({"learner": "v2"}, "learner is 'v2'"),
        ({"rounds": 1}, "rounds is 1"),
        ({"images": IMAGES[:0]}, "images is 0"),
        ({"model": nn.Linear(2, 2)}, "Linear"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(**{"model": host(), "images": IMAGES} | arguments)


@pytest.mark.parametrize("measure", ["macs", "latency"])
def test_a_model_that_learns_tokens_already_is_refused(measure: str) -> None:
    with pytest.raises(ValueError, match="has learned tokens"):
        plan(insert(host(), 4), IMAGES, measure=measure)


# --- the command --------------------------------------------------------------------------------


def printed(*arguments: str) -> tuple[list[list[str]], str]:
    """The rows of the table that the command prints on a narrow terminal, and the text below."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("COLUMNS", "80")
        main(["plan", *arguments, "--rounds", "2"])
    head, rest = re.split(r"─+ *\n", out.getvalue().strip())
    body, note = re.split(r"\n *\n", rest)
    assert head.split()[:4] == ["at", "tokens", "GMACs", "share"]
    return [re.sub(r" \(.*?\)", "", line).split() for line in body.splitlines()], note


def test_the_command_prints_the_host_and_the_pair_and_how_it_was_measured() -> None:
    rows, note = printed(MINI, "--budget", "0.6", "--tokens", "8", "--batch_size", "4")
    assert " ".join(note.split()).startswith(f"{MINI}: 4 x 1 x 28 x 28 on cpu, ")
    models = create_model(MINI), create_model(MINI, num_tokens=8, at=3)
    whole, macs = (count_macs(model, torch.zeros(1, 1, 28, 28)) for model in models)
    assert [row[:4] for row in rows] == [
        ["–", "–", f"{whole / 1e9:.3f}", "1.00"],
        ["3", "8", f"{macs / 1e9:.3f}", f"{macs / whole:.2f}"],
    ]


def test_a_row_of_the_table_has_the_numbers_of_its_option() -> None:
    ms, rate, speedup = Timing(1234.56, 1200, 1300), Timing(3.24, 3.1, 3.3), Timing(1.5, 1.4, 1.6)
    option = Option(6, 8, 2.4304, 0.5285, ms, rate, speedup)
    row = {name: cell(option) for name, cell in COLUMNS.items()}
    assert row == {
        "at": "6",
        "tokens": "8",
        "GMACs": "2.430",
        "share": "0.53",
        "ms a batch": "1234.6 (1200.0–1300.0)",
        "speed-up": "1.50",
        "realized": "* 0.79",  # 1.5 times 0.5285
        "images/s": "3.2",
    }


def test_a_checkpoint_is_planned_for_at_another_size(
    tmp_path: Path,
) -> None:
    saved = save_model(create_model(MINI, depth=3, in_chans=2), tmp_path / "model.safetensors")
    rows, note = printed(str(saved), "--img_size", "40", "--tokens", "4")
    model = create_model(MINI, depth=3, in_chans=2, img_size=40)
    assert rows[0][2] == f"{count_macs(model, torch.zeros(1, 2, 40, 40)) / 1e9:.3f}"
    assert ": 1 x 2 x 40 x 40 on " in " ".join(note.split())


def test_of_the_default_numbers_of_tokens_those_are_tried_that_an_image_has() -> None:
    _, *options = plan(host(), IMAGES[:1], 1.0, rounds=2)
    assert [option.num_tokens for option in options] == [4, 8]  # 16 of 16 save nothing
