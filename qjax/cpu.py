# SPDX-License-Identifier: Apache-2.0
"""What the CPU of this machine can do, where a program runs on one."""

import functools
from pathlib import Path

# Names of Linux: AVX512-BF16 and AMX of x86. Others multiply bfloat16 as float32.
_BFLOAT16_PRODUCTS = frozenset({"avx512_bf16", "amx_bf16"})


@functools.cache
def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether there are instructions for products of bfloat16 numbers; False where nothing says so.

    Args:
      cpuinfo: what the kernel tells of the processors.

    Example:
      >>> cpuinfo = getfixture("tmp_path") / "cpuinfo"
      >>> _ = cpuinfo.write_text("processor : 0" + chr(10) + "flags : fpu avx512f amx_bf16")
      >>> multiplies_bfloat16(cpuinfo), multiplies_bfloat16(cpuinfo.with_name("none"))
      (True, False)
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not _BFLOAT16_PRODUCTS.isdisjoint(flags)
