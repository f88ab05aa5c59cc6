"""``collogue.reference``: the public name of :mod:`collogue.contract.reference`, the same module object."""

import sys
from typing import TYPE_CHECKING

from collogue.contract import reference

if TYPE_CHECKING:
    from collogue.contract.reference import *  # noqa: F403

sys.modules[__name__] = reference
