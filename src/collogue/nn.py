"""``collogue.nn``: the public name of :mod:`collogue.pytorch.nn`, the same module object."""

import sys
from typing import TYPE_CHECKING

from collogue.pytorch import nn

if TYPE_CHECKING:
    from collogue.pytorch.nn import *  # noqa: F403

sys.modules[__name__] = nn
