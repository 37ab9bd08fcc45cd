# SPDX-License-Identifier: Apache-2.0
"""Asks the C library to keep large arrays in huge pages.

On a CPU XLA takes the arrays of each program anew from malloc, which has the larger ones from the
system, page by page. In GPTQ of a Llama of 14 million weights with 128 x 1024 tokens these are 5.8
million pages of 4 KiB, with huge ones half a million in all; it takes 38 seconds instead of 41 (2 cores
of a Xeon with AMX, jax 0.11.2, 2026-11-29). The GNU C library reads in its environment, when a process
begins, what it should ask for.

References:
  The GNU C Library Reference Manual, "Memory Allocation Tunables", ``glibc.malloc.hugetlb``.
"""

import os
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def ask() -> None:
    """Begins this process again with huge pages, unless its environment says whether it wants them.

    To be called before anything else: what the process has done until then is done twice. Nothing happens
    elsewhere than on Linux; with another C library the second process is as the first.
    """
    given = os.environ.get(_VARIABLE, "")
    if sys.platform != "linux" or _TUNABLE in given:
        return
    os.environ[_VARIABLE] = ":".join(filter(None, (given, f"{_TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
