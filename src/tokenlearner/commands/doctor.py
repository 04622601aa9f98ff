"""`tokenlearner doctor`: versions, devices and extras, and what is wrong with them.

This is to read, or to send with a report of a bug. It needs no extra, and goes on where a package
is broken.
"""

from __future__ import annotations

import os
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from ..utils.processors import usable_processors
from ..utils.text import plain_text

_EXTRAS = tuple(  # of users
    extra
    for extra in metadata("tokenlearner").get_all("Provides-Extra") or ()
    if extra not in ("dev", "docs")
)
_IMPORTED = ("torch", "torchvision", "timm", "numpy", "safetensors", "huggingface_hub", "einops")
_NVIDIA = Path("/dev/nvidia0")


@dataclass
class Diagnosis:
    """What `diagnose` finds.

    Args:
        facts: Texts by name.
        extras: For each extra, the requirements that are missing or of another version.
        problems: Sentences on what is wrong, each with the way out.
    """

    facts: dict[str, str] = field(default_factory=dict)
    extras: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Looks at this installation and this machine."""
    found = Diagnosis()
    found.facts["tokenlearner"] = f"{version('tokenlearner')} in {Path(__file__).parents[1]}"
    found.facts["python"] = f"{platform.python_version()} in {sys.prefix}"
    found.facts["system"] = platform.platform()
    for unmet in _unmet(""):
        found.problems.append(f"{unmet}; run pip install '.' in the folder of the repository")
    found.extras = {extra: list(_unmet(extra)) for extra in _EXTRAS}
    for name in _IMPORTED:
        try:
            module = import_module(name)
        except Exception as error:  # a package may fail in any way
            reason = plain_text(str(error)).splitlines() or [type(error).__name__]
            found.problems.append(f"{name} cannot be imported ({reason[0]}); install it again")
        else:
            found.facts[name] = str(getattr(module, "__version__", None) or version(name))
    if "torch" in found.facts:
        _look_at_processors(found)
    return found


def _look_at_processors(found: Diagnosis) -> None:
    """Notes processors and accelerators, and what keeps torch from using them."""
    import torch

    from ..evaluation.hardware import describe_machine

    cpu, usable = describe_machine(torch.device("cpu")), usable_processors()
    threads = torch.get_num_threads()
    found.facts["processor"] = f"{cpu['cpu']}, {usable} usable, torch computes with {threads}"
    found.facts["kernels"] = torch.backends.cpu.get_cpu_capability()
    if threads > usable:
        found.problems.append(
            f"torch computes with {threads} threads on {usable} processors, which makes them wait "
            f"for each other; set OMP_NUM_THREADS={usable}"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    if torch.backends.mps.is_available():
        names.append("mps")
    found.facts["accelerators"] = ", ".join(names) or "none"
    if not names and _NVIDIA.exists():
        built = torch.version.cuda or "no CUDA"
        found.problems.append(
            f"there is an NVIDIA GPU, and torch {torch.__version__} (built for {built}) does not "
            "see it; see nvidia-smi for the driver, and pytorch.org for the torch that fits it"
        )
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TIMM_FUSED_ATTN", "HF_HUB_OFFLINE"):
        if name in os.environ:
            found.facts[name] = os.environ[name]


def _unmet(extra: str) -> Iterator[str]:
    """Yields the requirements of an extra, or of none, that this environment does not meet."""
    try:
        from packaging.requirements import Requirement  # huggingface_hub brings it
    except ImportError:
        yield "packaging is missing"
        return
    for text in requires("tokenlearner") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not marker.evaluate({"extra": extra}):
            continue
        if not marker and extra:
            continue  # asked for without extras
        if requirement.name == "tokenlearner":
            for inner in sorted(requirement.extras):
                yield from _unmet(inner)
            continue
        try:
            got = version(requirement.name)
        except PackageNotFoundError:
            yield f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(got, prereleases=True):
            yield f"{requirement.name} is {got}, expected {requirement.specifier}"


def report(found: Diagnosis) -> list[str]:
    """Returns what was found as lines of text."""
    width = max(map(len, [*found.facts, *found.extras]))
    lines = [f"{name:<{width}}  {plain_text(fact)}" for name, fact in found.facts.items()]
    lines += ["", "extras, which some commands want (pip install '.[NAME]', in the repository):"]
    lines += [f"{name:<{width}}  {', '.join(un) or 'ok'}" for name, un in found.extras.items()]
    lines += ["", *(f"wrong: {problem}" for problem in found.problems)]
    return lines if found.problems else [*lines, "nothing is wrong"]


def doctor_command(arguments: Sequence[str]) -> None:
    """Prints what `diagnose` finds.

    Raises:
        SystemExit: Something is wrong, with 1; or there are arguments.
    """
    ArgumentParser(prog="tokenlearner doctor", description=__doc__).parse_args(arguments)
    found = diagnose()
    print("\n".join(report(found)))
    if found.problems:
        raise SystemExit(1)
