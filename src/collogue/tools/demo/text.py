"""What the demo reads: text that every Python has, one for the measurement and another one for calibration."""

from __future__ import annotations

import argparse
import collections
import difflib
import inspect
import optparse
from pydoc_data.topics import topics

PROMPT = "Python is a programming language that"


def evaluation_text() -> str:
    """The language reference behind Python's ``help()``, in order of its topics."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_text() -> str:
    """Docstrings of a few standard modules: text of another kind, none of which is evaluated."""
    sources = (argparse, difflib.SequenceMatcher, collections.Counter, optparse, difflib)
    return "\n\n".join(inspect.getdoc(source) or "" for source in sources)
