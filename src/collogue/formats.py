"""``collogue.formats``: the public name of :mod:`collogue.contract.formats`, the same module object."""

import sys
from typing import TYPE_CHECKING

from collogue.contract import formats

if TYPE_CHECKING:
    from collogue.contract.formats import *  # noqa: F403

sys.modules[__name__] = formats
