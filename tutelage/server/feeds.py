"""Feeds of stages, made when somebody looks and let go of when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tutelage.base.errors import UserError
from tutelage.server.feed import Feed

EVERY = 0.25  # seconds between two looks at a running stage
SELDOM = 1.0  # at one that does not run
KEEP = 60.0  # seconds that a feed is kept after the last look at it
MOST = 32  # stages that are followed at once
T = TypeVar("T")


class Feeds:
    """One feed a stage's folder, shared by all who look. Lives in one event loop; reading is done by threads."""

    def __init__(self, runs: Path, *, every: float = EVERY, keep: float = KEEP) -> None:
        self.runs, self.every, self.keep = runs, every, keep
        self.stopping = asyncio.Event()
        self._feeds: dict[Path, Feed] = {}
        self._news: dict[Path, asyncio.Event] = {}
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="feed")
        self._lookers = ThreadPoolExecutor(4, thread_name_prefix="look")

    def get(self, folder: Path) -> Feed:
        """The feed of a stage's folder. UserError where too many stages are looked at."""
        folder = folder.absolute()
        feed = self._feeds.get(folder)
        if feed is None:
            if len(self._feeds) >= MOST:
                self._drop_oldest()
            feed = Feed(folder, index=self.runs.absolute() / ".index" / Path(*folder.parts[-3:]))
            self._feeds[folder], self._news[folder] = feed, asyncio.Event()
            self._tasks[folder] = asyncio.create_task(self._follow(feed))
        feed.used = time.monotonic()
        return feed

    async def ready(self, folder: Path, *, seconds: float = 20.0) -> Feed:
        """The feed once it has read what there is, or after so long."""
        feed, until = self.get(folder), time.monotonic() + seconds
        while feed.loading is not None and time.monotonic() < until and not self.stopping.is_set():
            await self.news(feed, seconds=0.1)
        return feed

    @contextlib.asynccontextmanager
    async def watched(self, folder: Path) -> AsyncIterator[Feed]:
        """A feed that is kept as long as the block lasts."""
        feed = self.get(folder)
        feed.viewers += 1
        try:
            yield feed
        finally:
            feed.viewers -= 1
            feed.used = time.monotonic()

    async def news(self, feed: Feed, *, seconds: float) -> None:
        """Wait until the feed has news, or so long, or until the server stops."""
        event = self._news.get(feed.folder)
        if event is None or self.stopping.is_set():
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)

    async def look(self, what: Callable[[], T]) -> T:
        """Do something that reads or computes, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._lookers, what)

    async def stop(self) -> None:
        """Let go of everything; threads that read end at their next piece."""
        self.stopping.set()
        for feed in self._feeds.values():
            feed.stop()
        for event in self._news.values():
            event.set()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for pool in (self._readers, self._lookers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, feed: Feed) -> None:
        loop: Any = asyncio.get_running_loop()
        try:
            while not self.stopping.is_set():
                version = feed.version
                await loop.run_in_executor(self._readers, feed.poll)
                if feed.version != version:
                    self._tell(feed)
                if not feed.viewers and time.monotonic() - feed.used > self.keep:
                    return
                running = feed.controls.get("live", False)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), self.every if running else max(self.every, SELDOM))
        finally:
            self._forget(feed)

    def _tell(self, feed: Feed) -> None:
        event, self._news[feed.folder] = self._news[feed.folder], asyncio.Event()
        event.set()

    def _forget(self, feed: Feed) -> None:
        feed.stop()
        if self._feeds.get(feed.folder) is feed:  # and not a newer one of the same folder
            del self._feeds[feed.folder], self._tasks[feed.folder]
            self._news.pop(feed.folder).set()

    def _drop_oldest(self) -> None:
        free = [feed for feed in self._feeds.values() if not feed.viewers]
        if not free:
            raise UserError(f"{MOST} stages are being looked at already; close one of those pages")
        oldest = min(free, key=lambda feed: feed.used)
        self._tasks[oldest.folder].cancel()
        self._forget(oldest)
