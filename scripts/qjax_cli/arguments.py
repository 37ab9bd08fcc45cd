# SPDX-License-Identifier: Apache-2.0
"""Argument types: what is wrong with a value is said by the parser, which exits with 2."""

import argparse
import math
from collections.abc import Callable


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in a range.

    >>> whole_number(1)("12")
    12
    """
    right = f"a whole number from {least} {'up' if most is None else f'to {most}'}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {right}, not {text!r}") from error
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {right}, not {text}")
        return value

    return parse


def number(
    least: float, most: float = math.inf, *, exclusive: bool = False
) -> Callable[[str], float]:
    """A finite number in a range; `exclusive` leaves the least itself out.

    >>> number(0)("0.7")
    0.7
    """
    start = f"above {least}" if exclusive else f"from {least}"
    right = f"a number {start} {'up' if most == math.inf else f'to {most}'}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {right}, not {text!r}") from error
        inside = least < value if exclusive else least <= value
        if not (inside and value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {right}, not {text}")
        return value

    return parse
