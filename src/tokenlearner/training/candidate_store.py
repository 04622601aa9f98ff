"""What is known of the candidates of `reduce`, and what a later call goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..evaluation.latency import Timing
from ..utils.files import read_json
from ..utils.io import atomic_write, write_json
from ..utils.validation import require
from .candidates import Candidate

STATE, TARGETS = "candidates/state.json", "candidates/host.safetensors"


@dataclass(frozen=True)
class CandidateRow:
    """What is known of a candidate.

    Args:
        candidate: The candidate; None is the host.
        gmacs: Multiply-adds of one image, counted as 1, in 1e9.
        macs_share: The same as a share of the host's.
        errors: After each round, the share of the variance of the host's output on held-out images
            that it leaves open.
        agreement: Share of held-out images that it puts in the host's class; None without classes.
        steps: Updates so far.
        seconds: Time of all its rounds.
        latency_ms: Time of a batch, by its images.
        speedup: Times as fast as the host, by the batch's images.
    """

    candidate: Candidate | None
    gmacs: float
    macs_share: float
    errors: Sequence[float] = ()
    agreement: float | None = None
    steps: int = 0
    seconds: float = 0.0
    latency_ms: Mapping[int, Timing] = field(default_factory=dict)
    speedup: Mapping[int, Timing] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The candidate's name, or the host."""
        return self.candidate.name if self.candidate else "host"


class CandidateStore:
    """What is done, in memory or in a folder, from which a later call goes on.

    Args:
        folder: None is memory.
        digest: Of all that has to be the same.

    Raises:
        ValueError: The folder has what another call left.
    """

    def __init__(self, folder: str | Path | None, digest: str):
        self.folder = None if folder is None else Path(folder).expanduser()
        self._digest, self._weights = digest, dict[int, dict[str, Tensor]]()
        self.rows: list[CandidateRow] = []
        self.seconds, self.host_seconds, self.views = 0.0, 0.0, 0
        self.rounds = dict[str, tuple[float, float]]()  # seconds of each candidate, and the end
        if self.folder is not None and (self.folder / STATE).exists():
            state = read_json(self.folder / STATE)
            require(
                isinstance(state, dict) and state.get("digest") == digest,
                f"{self.folder / STATE} is of another model, other images or other options; take "
                "another folder, or delete it",
            )
            self.rows = [_row(row) for row in state["fitted"]]
            self.seconds, self.rounds = state["seconds"], state["rounds"]
            self.host_seconds, self.views = state["host_seconds"], state["views"]

    def keep(
        self,
        i: int,
        model: nn.Module,
        fitted: Sequence[nn.Parameter],
        rows: Sequence[CandidateRow],
        elapsed: float,
    ) -> None:
        """Keeps the fitted weights of a candidate, and then all rows."""
        self.rows, known = [*rows], {id(p) for p in fitted}
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) in known}
        if self.folder is None:
            self._weights[i] = weights
            return
        _save(self._file(i, len(rows[i].errors)), weights)
        self._write_state(self.folder, rows, elapsed)
        self._file(i, len(rows[i].errors) - 1).unlink(missing_ok=True)

    def keep_targets(
        self, targets: Mapping[str, Tensor], rows: Sequence[CandidateRow], elapsed: float
    ) -> None:
        """Keeps what the host made of images in a folder, and how long that took."""
        self.host_seconds = elapsed
        if self.folder is not None:
            _save(self.folder / TARGETS, targets)
            self._write_state(self.folder, rows, elapsed)

    def load_targets(self, device: torch.device) -> dict[str, Tensor] | None:
        """Returns what the host made of images, if an earlier call kept it."""
        if self.folder is None or not self.host_seconds:
            return None
        return load_file(self.folder / TARGETS, device=str(device))

    def _write_state(self, folder: Path, rows: Sequence[CandidateRow], elapsed: float) -> None:
        state = {"digest": self._digest, "seconds": self.seconds + elapsed}
        state |= {"host_seconds": self.host_seconds, "rounds": self.rounds}
        state |= {"views": self.views}
        write_json(folder / STATE, {**state, "fitted": [asdict(row) for row in rows]})

    def load(self, i: int, model: nn.Module) -> nn.Module:
        """Gives a model the weights that were kept of a candidate."""
        weights = self._weights.get(i, {})
        if self.folder is not None and self.rows and self.rows[i].errors:
            weights = load_file(self._file(i, len(self.rows[i].errors)))
        if weights:
            model.load_state_dict(weights, strict=False)
        return model

    def _file(self, i: int, rounds: int) -> Path:
        return Path(self.folder or "") / "candidates" / f"{i}-{rounds}.safetensors"


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_write(file) as path:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)


def _row(values: dict[str, Any]) -> CandidateRow:
    """Reads a row as it was written."""
    candidate: dict[str, Any] = values["candidate"]
    size = candidate["img_size"]
    candidate |= {"img_size": size and tuple(size)}
    values["candidate"] = Candidate(**candidate)
    return CandidateRow(**values)
