"""How every command ends: exit codes, the look of an error, an interrupt, a closed pipe. Imports the standard library alone."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import sys
import textwrap
import threading
from types import FrameType
from typing import Any, NoReturn

OK, FAILED, USAGE, IMPOSSIBLE = 0, 1, 2, 3
#: As shells say it of a process that SIGINT or SIGPIPE ended.
INTERRUPTED, CLOSED_PIPE = 130, 141
EXIT_CODES = "Exit codes: 0 success; 1 a check failed; 2 wrong usage; 3 this machine cannot do it; 130 interrupted; 141 stdout was closed."
#: What the error of a file says that cannot be written.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ENOTDIR)
#: After an interrupt what is under way may clean up for so long.
SECONDS_TO_CLEAN_UP = 3.0


def report_error(message: str, hint: str = "") -> None:
    """``error:`` and ``hint:`` on stderr, wrapped between words."""
    text = f"error: {message}" + (f"\nhint: {hint}" if hint else "")
    width = shutil.get_terminal_size((80, 24)).columns if sys.stderr.isatty() else 80
    print("\n".join(wrapped(line, width) for line in text.splitlines()), file=sys.stderr)


def wrapped(line: str, width: int = 80) -> str:
    """``line`` on lines of at most ``width`` columns, those after the first set in; a word that is longer stays whole."""
    if len(line) <= width:
        return line
    if " && " in line:  # a command that may be copied
        return " &&\n  ".join(line.split(" && "))
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class Interrupt:
    """Ctrl-C: the first raises :class:`KeyboardInterrupt`, so that what is under way cleans up; the next ends the process.

    During an import the first ends it too: an exception there may be printed, swallowed or turned into another one. The process ends
    without the interpreter's own clean-up, in which a thread that waits in C++ would abort it.
    """

    def __init__(self) -> None:
        self.came = False

    def install(self) -> None:
        """Handle SIGINT from now on."""
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came or _importing(frame):
            leave()
        self.came = True
        # What is interrupted in a destructor or a callback is printed there, and lost.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        timer = threading.Timer(SECONDS_TO_CLEAN_UP, leave)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def leave() -> NoReturn:
    """End an interrupted process, and those it started, with one line and :data:`INTERRUPTED`."""
    with contextlib.suppress(Exception):
        if "multiprocessing.util" in sys.modules:
            import multiprocessing.util as processes

            processes._run_finalizers(0)  # type: ignore[attr-defined]  # gives semaphores back, whose tracker complains otherwise
        if "multiprocessing.process" in sys.modules:
            import multiprocessing.process

            for child in multiprocessing.process.active_children():
                child.kill()
    with contextlib.suppress(OSError):
        cursor = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        os.write(2, f"{cursor}interrupted\n".encode())
    os._exit(INTERRUPTED)


def finish(code: int) -> NoReturn:
    """Flush stdout and end with ``code``; with another one where stdout cannot be written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; the interpreter's end would let it kill the process
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        closed_pipe()
    except OSError as error:
        unwritable(error)
    raise SystemExit(code)


def unwritable(error: OSError) -> NoReturn:
    """End because stdout, or a file, could not be written: the disk is full, for one."""
    _discard_stdout()
    report_error(f"cannot write {error.filename or 'to stdout'}: {error.strerror}")
    raise SystemExit(USAGE)


def is_closed(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def closed_pipe() -> NoReturn:
    """End as SIGPIPE would: in silence."""
    _discard_stdout()
    raise SystemExit(CLOSED_PIPE)


def _discard_stdout() -> None:
    """What is still in the buffer must not be written when the interpreter ends."""
    nowhere: Any = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
