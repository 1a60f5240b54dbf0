"""Work outside the calling thread that can be given up: daemon threads, which never keep a process from exiting."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_ALIVE_S = 1.0  # how long a healthy event loop may take to answer, in seconds


def start_daemon(work: Callable[[], Any], name: str) -> None:
    """Run `work` in a daemon thread that uses the caller's CUDA device; which device is current differs by thread."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        work()

    threading.Thread(target=run, name=name, daemon=True).start()


def run_in_daemon(function: Callable[[], Result], name: str) -> Future[Result]:
    """Call `function` in a daemon thread of its own."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it, and its end is never a surprise

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to whoever asks for the result
            future.set_exception(error)

    start_daemon(run, name)
    return future


def is_done(future: Future[Any], timeout_s: float | None) -> bool:
    """Wait for `future`, at most `timeout_s` seconds. A function's own `TimeoutError` does not look like one here."""
    return bool(wait([future], timeout_s).done)


class BackgroundLoop:
    """An event loop in a daemon thread, started when it is first needed.

    It is kept from call to call, because clients that coroutines share (HTTP sessions, semaphores) belong to one loop.
    It works under a running loop too, such as a notebook's.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start `coroutine`; cancelling the future cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            loop = self._loop
            start_daemon(lambda: _run(loop), "alignkit-reward-loop")
            weakref.finalize(self, _stop, loop)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def abandon_if_stuck(self) -> None:
        """Let a loop go that no longer answers because a coroutine blocks it; the next call starts a new one."""
        if self._loop is not None and not is_done(self.submit(asyncio.sleep(0)), _ALIVE_S):
            self._loop = None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_wind_up())
    finally:
        loop.close()


async def _wind_up() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
