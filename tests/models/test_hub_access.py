"""The Hub is asked once whether it answers; where it does not, what is kept here is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tokenlearner import create_model
from tokenlearner.models import hub_access
from tokenlearner.models.hub_access import hub_or_cache, within


class Session:
    """Stands for that of huggingface_hub."""

    def __init__(self, answers: bool):
        self.answers, self.asked = answers, list[str]()

    def head(self, url: str, timeout: float) -> None:
        assert timeout <= 10
        self.asked.append(url)
        if not self.answers:
            raise ConnectionError("no route")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("answers", [False, True])
def test_the_hub_is_asked_once_and_not_at_all_where_that_is_ruled_out(
    answers: bool, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(answers)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub_access, "get_session", lambda: session)
    with hub_or_cache():
        during = constants.HF_HUB_OFFLINE
    assert (during, constants.HF_HUB_OFFLINE) == (offline or not answers, offline)
    assert len(session.asked) == (not offline)


def test_only_pretrained_weights_without_a_file_ask_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(answers=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_access, "get_session", lambda: session)
    create_model("vit_tiny_patch16_224", depth=1, pretrained=False)
    overlay: Any = {"file": "/nowhere.pth"}
    for options in ({"pretrained_cfg_overlay": overlay}, {}):
        with pytest.raises(OSError):  # noqa: PT011, an empty message for the file
            create_model("vit_tiny_patch16_224", pretrained=True, **options)
        assert len(session.asked) == (not options)


def test_a_call_that_fails_in_time_raises_its_own_error() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within(10, fail)
    assert within(10, lambda: 3) == 3
