"""A block server in a thread of its own, within this process: for audits and tests."""

import asyncio
import threading
from typing import Any, Self

from fedsea.checkpoints import Checkpoint
from fedsea.server.service import BlockServer
from fedsea.server.state import ServerOptions

START_SECONDS, STOP_SECONDS = 600.0, 30.0


class BackgroundServer:
    """A block server that serves at `address` until it is closed; a context manager.

    Parameters
    ----------
    checkpoint, options, tap
        As `BlockServer` takes them.

    Raises
    ------
    FedSEAError
        If the server cannot start.
    """

    def __init__(self, checkpoint: Checkpoint, options: ServerOptions, tap: Any = None) -> None:
        self.server: BlockServer
        self.address = ""
        self.thread = threading.Thread(target=self._main, args=(checkpoint, options, tap), daemon=True)
        self._started, self._loop = threading.Event(), asyncio.new_event_loop()
        self._failure: BaseException | None = None
        self.thread.start()
        self._started.wait(START_SECONDS)
        if self._failure is not None:
            raise self._failure

    def _main(self, checkpoint: Checkpoint, options: ServerOptions, tap: Any) -> None:
        async def live() -> None:
            try:
                self.server = BlockServer(checkpoint, options, tap)
                self.address = await self.server.start()
            except BaseException as error:
                self._failure = error
            finally:
                self._started.set()
            if self._failure is None:
                await self.server.wait()

        self._loop.run_until_complete(live())

    def close(self) -> None:
        """Stop the server. Safe to call twice."""
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(STOP_SECONDS)
            self.thread.join(STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_what: object) -> None:
        self.close()
