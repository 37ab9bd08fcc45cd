# SPDX-License-Identifier: Apache-2.0
"""Argument types: what is wrong with a value is said by the parser, which exits with 2."""

import argparse
import math
import re
from collections.abc import Callable

import qjax
from qjax import kv_cache


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
    if exclusive:
        right = f"a number above {least}" + ("" if most == math.inf else f" and at most {most}")
    else:
        right = f"a number from {least} {'up' if most == math.inf else f'to {most}'}"

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


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}B": base**power
    for suffix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def size(text: str) -> int:
    """A number of bytes, with or without a unit: kB, MB, GB and TB, or KiB, MiB, GiB and TiB.

    >>> size("4GB"), size("1.5 MiB")
    (4000000000, 1572864)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB or 3.5GiB, not {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def scheme(name: str) -> qjax.Scheme:
    """A scheme by its name.

    >>> scheme("w4a16").name
    'w4a16-g128'
    """
    try:
        return qjax.Scheme.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def kv_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declares how a model that runs keeps keys and values, whatever its directory says."""
    parser.add_argument(
        "--kv-cache",
        choices=kv_cache.DYNAMIC,
        help="keep keys and values in 8 or 4 bits (default: as the directory says)",
    )
