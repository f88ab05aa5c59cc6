"""The communicators that serve an engine's groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from collogue.communicator import Communicator
from collogue.errors import CollogueError
from collogue.flashinfer.workspace import WATCH_INTERVAL, failed, peer_on, timeout
from collogue.gpu.watch import Watch


class Pool:
    """One communicator for each group, dtype and width, made once and watched for failures; the engine's log says that it is there.

    Args:
        logger: the engine's.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._made: dict[tuple[str, torch.dtype, int], Communicator | None] = {}
        self._watches: list[Watch] = []

    def get(self, name: str, dtype: torch.dtype, width: int) -> Communicator | None:
        """The communicator of the group ``name`` for rows like these, if there is one."""
        return self._made.get((name, dtype, width))

    def make(
        self, name: str, group: Callable[[], Any], *, dtype: torch.dtype, width: int, most: int, device: torch.device | str
    ) -> Communicator | None:
        """:meth:`get`, or a new communicator of ``group()`` for up to ``most`` rows. ``None``, and a line why, where there can be none.

        Synchronization:
            Collective where it is not there yet.
        """
        key = (name, dtype, width)
        if key not in self._made:
            self._made[key] = None
            try:
                shape: dict[str, Any] = {"max_tokens": most, "hidden_size": width, "dtype": dtype, "device": device, "timeout": timeout()}
                made = Communicator(group(), **shape, transport=peer_on(torch.device(device)))
            except CollogueError as error:
                reason = str(error).splitlines()[0]
                self._logger.warning("not served by Collogue, all-reduce and norm stay apart: %s", reason)
            else:
                self._logger.info("served by Collogue: all-reduce + residual + RMSNorm in one call, %r", made)
                self._made[key] = made
                if made.device.type == "cuda":
                    self._watches.append(made.watch(failed, WATCH_INTERVAL))
        return self._made[key]

    def close(self) -> None:
        """Free the memory, without meeting the other ranks."""
        for watch in self._watches:
            watch.stop()
        for made in self._made.values():
            if made is not None:
                made.close(collective=False)
        self._watches.clear()
        self._made.clear()
