"""``collogue.nn``: the public name of :mod:`collogue.pytorch.nn`, the same module object."""

import sys

from collogue.pytorch import nn

sys.modules[__name__] = nn
