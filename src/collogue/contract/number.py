"""Which arguments are numbers (a bool is none), and which tensors are one rank's own."""

from __future__ import annotations

from typing import TypeGuard

import torch

from collogue.errors import ArgumentError


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number, or stands for one in a graph that is traced."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a number, whole or not, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


#: Numbers from here on are infinite once they are rounded to float32.
FLOAT32_END = 2.0**128 * (1.0 - 2.0**-25)


def is_finite(value: float) -> bool:
    """Whether ``value``, rounded to float32, is finite."""
    return -FLOAT32_END < value < FLOAT32_END


def is_scale(value: float, most: int = 128) -> bool:
    """Whether ``value``, rounded to float32, lies between ``2**-128`` and ``2**most``, both left out.

    Then neither it nor its inverse in float32 is 0 or infinite: the inverse of ``2**-128`` is infinite.
    """
    return 2.0**-128 + 2.0**-150 < value < 2.0**most * (1.0 - 2.0**-25)


def check_local(name: str, tensor: object) -> None:
    """Raise :class:`ArgumentError` for a DTensor: what it holds here may be a part, or a term of a sum that is still to be made."""
    if hasattr(tensor, "to_local"):
        raise ArgumentError(f"{name} is a {type(tensor).__name__}, which is spread over ranks", hint="pass the local tensor: x.to_local()")


def check_seconds(name: str, value: float, most: float) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a time: positive, at most ``most``."""
    if not is_number(value) or not 0 < value <= most:
        raise ArgumentError(f"{name} is {value!r}", hint=f"give a positive number of seconds, at most {most:,.0f}")
