"""``collogue.formats``: the public name of :mod:`collogue.contract.formats`, the same module object."""

import sys

from collogue.contract import formats

sys.modules[__name__] = formats
