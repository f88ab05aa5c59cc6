"""``collogue.reference``: the public name of :mod:`collogue.contract.reference`, the same module object."""

import sys

from collogue.contract import reference

sys.modules[__name__] = reference
