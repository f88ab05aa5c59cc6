"""Files that outlast a process: the directory of compiled kernels and tables, and writing a file in one step."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path

from collogue.errors import PlatformError


@functools.cache
def cache_directory() -> Path:
    """``$COLLOGUE_CACHE_DIR``, else the user's cache directory, else a directory of this user in the temporary directory."""
    candidates = []
    if "COLLOGUE_CACHE_DIR" in os.environ:
        candidates.append(Path(os.environ["COLLOGUE_CACHE_DIR"]))
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        candidates.append((Path(base) if base else Path.home() / ".cache") / "collogue")
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    candidates.append(Path(tempfile.gettempdir()) / f"collogue-{user}")
    for directory in candidates:
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=directory):
                return directory
    raise PlatformError("no directory for compiled kernels can be written", hint="set COLLOGUE_CACHE_DIR to a writable directory")


def write_whole(path: Path, content: bytes) -> None:
    """Put a file into its place at once: a reader finds the old one or the new one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
