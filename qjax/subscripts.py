# SPDX-License-Identifier: Apache-2.0
"""The letters of an einsum of two operands, and the product that they mean."""

Axes = tuple[int, ...]


def letters(subscripts: str, x_ndim: int, w_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """The axes of both operands and the result, one name each; an ellipsis becomes digits.

    Args:
      subscripts: explicit, such as ``"btd,dhk->bthk"``; an ellipsis may stand in ``x`` and the result.
      x_ndim: axes of the first operand.
      w_ndim: axes of the second.

    Raises:
      ValueError: not two operands, a repeated letter, a letter that is summed in one operand alone, or
        operands of other numbers of axes.

    Example:
      >>> letters("...d,dk->...k", 3, 2)
      (['0', '1', 'd'], ['d', 'k'], ['0', '1', 'k'])
    """
    operands, arrow, result = subscripts.replace(" ", "").partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2:
        raise ValueError(f"einsum {subscripts!r}: need two operands and '->'")
    if "..." in parts[1]:
        raise ValueError(f"einsum {subscripts!r}: an ellipsis may stand in the first operand only")
    hidden = [str(i) for i in range(x_ndim - len(parts[0].replace("...", "")))]
    x, w, y = (
        [c for piece in part.replace("...", "|").replace("|", " | ").split(" ") if piece
         for c in (hidden if piece == "|" else piece)]
        for part in (*parts, result)
    )  # fmt: skip
    if len(x) != x_ndim or len(w) != w_ndim:
        raise ValueError(f"einsum {subscripts!r}: operands have {x_ndim} and {w_ndim} axes")
    if any(len(set(names)) != len(names) for names in (x, w, y)):
        raise ValueError(f"einsum {subscripts!r}: a letter stands twice in one operand")
    if {c for c in x + w if c not in y} - (set(x) & set(w)) or set(y) - set(x + w):
        raise ValueError(f"einsum {subscripts!r}: a summed letter must stand in both operands")
    return x, w, y


def as_dot_general(
    subscripts: str, x_ndim: int, w_ndim: int
) -> tuple[tuple[tuple[Axes, Axes], tuple[Axes, Axes]], list[int]]:
    """The einsum as one ``dot_general`` and the order of its result's axes.

    Summed axes are in the order of the second operand, whose groups run along the last of them.

    Args:
      subscripts: as in :func:`letters`.
      x_ndim: axes of the first operand.
      w_ndim: axes of the second.

    Returns:
      Dimension numbers as in ``jax.lax.dot_general``, and what to transpose its result by.

    Raises:
      ValueError: as :func:`letters` does.

    Example:
      >>> as_dot_general("bd,dk->kb", 2, 2)
      ((((1,), (0,)), ((), ())), [1, 0])
    """
    x, w, result = letters(subscripts, x_ndim, w_ndim)
    shared = [c for c in x if c in w]
    batch = [c for c in shared if c in result]
    summed = [c for c in w if c in shared and c not in result]
    given = batch + [c for c in x + w if c not in shared]

    def axes(names: list[str]) -> tuple[Axes, Axes]:
        return tuple(map(x.index, names)), tuple(map(w.index, names))

    return (axes(summed), axes(batch)), [given.index(c) for c in result]
