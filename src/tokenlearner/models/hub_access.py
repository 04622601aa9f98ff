"""Asking the Hugging Face Hub: once, for some seconds; where it does not answer, its cache here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from threading import Thread
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

_CONNECT_SECONDS = 5


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Asks once whether the Hub can be reached; if not, it is not asked again within the block.

    What the cache on this computer has is taken then, as with HF_HUB_OFFLINE=1.
    """
    if constants.HF_HUB_OFFLINE or _is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _is_reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception:  # of httpx or requests, by version, and of proxies
        return False
    return True


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns what a call does; one that takes longer goes on alone, and ends with the process.

    Raises:
        TimeoutError: It takes longer.
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except FutureTimeout:
        if done.done():  # a timeout of the call itself
            raise
        raise TimeoutError(f"no answer within {seconds} seconds") from None
