# SPDX-License-Identifier: Apache-2.0
"""Products of many tokens: warpgroup products whose weights are unpacked in registers.

From about 32 tokens on the arithmetic counts, and Hopper has it in ``wgmma`` alone: one instruction
multiplies 64 outputs x 32 bytes of inputs, in registers, with up to 256 tokens, in shared memory. What is
to be computed, and the layout of the weights, are those of few tokens (:mod:`pallas_kernels.few_tokens`).

- A warpgroup owns 64 or 128 outputs and all tokens of a tile. Products follow one another without a
  gap: one is under way while the codes of the next are unpacked.
- Codes and tokens come to shared memory by copies of the hardware's own, ``stages`` steps of a ring
  ahead; a step is ``span`` times 128 bytes of each token. Nobody waits at a barrier. Where a tile is
  large, a warpgroup of its own begins the copies: :mod:`~pallas_kernels.many_tokens.stream`.
- ``ldmatrix`` brings a warp its codes from there, so distributed among its lanes that the tokens can
  stay in the order of memory; 8-bit codes that meet their like are multiplied from where they lie:
  :mod:`pallas_kernels.row_blocks`, :mod:`~pallas_kernels.many_tokens.fragments`.
- Scales of groups are multiplied into 16-bit weights, as if they had been dequantized (one rounding).
  8-bit tokens meet codes as they are, int4 as e4m3 or int8: the sum of a group or block of 128 inputs is
  scaled by itself, in float32. All other scales are applied to sums: exact.
- Results leave while the next tile is multiplied: :mod:`~pallas_kernels.many_tokens.tile_output`.
"""

from pallas_kernels.many_tokens.program import check as check
from pallas_kernels.many_tokens.program import default_config as default_config
from pallas_kernels.many_tokens.program import grid as grid
from pallas_kernels.many_tokens.program import kernel as kernel
from pallas_kernels.many_tokens.program import shared_words as shared_words
from pallas_kernels.many_tokens.program import token_scales as token_scales
from pallas_kernels.many_tokens.tiling import Config as Config
