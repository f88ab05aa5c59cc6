"""What the ranks of a communicator called last, and what went wrong: for people, after a failure."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collogue.cache import cache_directory
from collogue.errors import ArgumentError
from collogue.gpu.header import Entry

FORMAT = "collogue journal 1"


@dataclass(frozen=True)
class Journal:
    """The last calls of every rank as rank ``rank`` could read them, oldest first.

    ``started``: calls that this rank's GPU has started. ``calls``: of the ranks that could be read. ``failure``: what the failure record
    says, or ``None``. A rank whose calls end before the others' is the late one. The stage of a call says how far it has come, as far as
    can be known: ``finished`` if its rank has started a later one; of a rank's last call what this rank's failure record, or the other
    rank's abort flag and what it had found, say, else ``started``.

    Examples:
        >>> journal = comm.journal()
        >>> (journal.rank, journal.world_size, journal.failure)
        (0, 1, None)
    """

    rank: int
    world_size: int
    started: int
    calls: dict[int, tuple[Entry, ...]]
    failure: dict[str, int] | None = None
    error: str = ""
    written: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read what :meth:`save` wrote."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            data["calls"] = {int(rank): tuple(Entry(**entry) for entry in entries) for rank, entries in data["calls"].items()}
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{path} is not a journal: {error}", hint="give a file that a failed call or Journal.save wrote") from error

    def made(self, rank: int, call: int) -> str | None:
        """What ``rank`` made call number ``call`` with; ``None`` where that is not known."""
        return next((entry.text for entry in self.calls.get(rank, ()) if entry.call == call), None)

    def text(self, last: int = 8) -> str:
        """The failure and each rank's ``last`` calls."""
        lines = [f"Journal of rank {self.rank} of {self.world_size}, written {self.written}; {self.started} calls started here."]
        lines += [self.error] if self.error else []
        for rank in range(self.world_size):
            entries = self.calls.get(rank, ())
            lines.append(f"rank {rank}:" + ("" if entries else " no calls" if rank in self.calls else " could not be read"))
            lines += [f"  call {entry.call}: {entry.text}" + f" [{entry.stage}]" * bool(entry.stage) for entry in entries[-last:]]
        return "\n".join(lines)


#: Of the journals that this process writes: two communicators may fail in the same second.
_NUMBERS = itertools.count()


def default_path(rank: int) -> Path:
    """Where the next failure of this process's ``rank`` is written: in ``$COLLOGUE_JOURNAL_DIR``, or beside the kernels' cache."""
    folder = os.environ.get("COLLOGUE_JOURNAL_DIR")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_NUMBERS)}-rank{rank}.json"
    return (Path(folder) if folder else cache_directory() / "journals") / name
