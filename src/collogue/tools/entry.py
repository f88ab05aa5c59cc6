"""The console script: Ctrl-C, a closed pipe, and packages that are missing, around the commands of :mod:`collogue.tools.cli`."""

from __future__ import annotations

import os
import signal

#: What the command line is made of, and the library does without: the extra ``cli``.
_PACKAGES = ("typer", "rich", "click", "shellingham", "markdown_it", "pygments")


def main() -> None:
    """Run the command that ``sys.argv`` names and end the process with its exit code."""
    # Until the module that does it properly has been imported.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    from collogue.tools import terminal

    interrupt = terminal.Interrupt()
    interrupt.install()
    code = terminal.OK
    try:
        code = _run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else terminal.FAILED if ended.code else terminal.OK
    except BrokenPipeError:
        if not terminal.is_closed(1):
            raise
        terminal.closed_pipe()
    except OSError as error:
        if error.errno not in terminal.UNWRITABLE:
            raise
        terminal.unwritable(error)
    except BaseException:
        if not interrupt.came:  # an interrupt may have been turned into another exception
            raise
    if interrupt.came:
        terminal.leave()
    terminal.finish(code)


def _run() -> int:
    from collogue.tools import terminal

    try:
        from collogue.tools.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        terminal.report_error(f"the command line needs {package}, which is not installed", "pip install typer rich")
        return terminal.IMPOSSIBLE
    from rich.console import Console

    Console.on_broken_pipe = _raise  # type: ignore[assignment, method-assign]  # rich's own ends with 1, which means that a check failed
    app()
    return terminal.OK


def _raise(console: object) -> None:
    raise  # noqa: PLE0704  (called where the error is being handled)
