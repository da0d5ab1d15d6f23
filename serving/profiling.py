"""Profiles of the process, written by jax; one at a time."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from loongjax.errors import RequestError
from serving.errors import UnsupportedError


class Profiler:
    """Starts and stops a profile. Where it is written the server decides, never a client."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._target: Path | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> Path:
        """Begins; gives the folder where it will lie.

        Raises:
          UnsupportedError: The server was started without a folder for profiles.
          RequestError: One is being recorded.
        """
        if self._folder is None:
            raise UnsupportedError("the server records no profiles; start it with --profile-dir")
        import jax

        async with self._lock:
            if self._target is not None:
                raise RequestError(f"a profile is being recorded to {self._target}; stop it first")
            target = self._folder / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
            await asyncio.to_thread(jax.profiler.start_trace, target)
            self._target = target
            return target

    async def stop(self) -> Path:
        """Ends and writes it; gives its folder.

        Raises:
          RequestError: None is being recorded.
        """
        import jax

        async with self._lock:
            if self._target is None:
                raise RequestError("no profile is being recorded; start one first")
            target, self._target = self._target, None
            await asyncio.to_thread(jax.profiler.stop_trace)
            return target
