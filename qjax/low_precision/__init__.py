# SPDX-License-Identifier: Apache-2.0
"""Training in 8 and 16 bits: products, optimizer states, gradients between devices, loss scaling."""

from qjax.low_precision.adam_8bit import ScaleByAdam8BitState as ScaleByAdam8BitState
from qjax.low_precision.adam_8bit import adamw_8bit as adamw_8bit
from qjax.low_precision.adam_8bit import scale_by_adam_8bit as scale_by_adam_8bit
from qjax.low_precision.all_reduce import all_reduce_mean as all_reduce_mean
from qjax.low_precision.fp8_dot_general import Histories as Histories
from qjax.low_precision.fp8_dot_general import dot_general as dot_general
from qjax.low_precision.fp8_dot_general import einsum as einsum
from qjax.low_precision.fp8_linen import DelayedDotGeneral as DelayedDotGeneral
from qjax.low_precision.fp8_nnx import AmaxHistory as AmaxHistory
from qjax.low_precision.fp8_nnx import DelayedProduct as DelayedProduct
from qjax.low_precision.fp8_nnx import end_fp8 as end_fp8
from qjax.low_precision.fp8_nnx import train_in_fp8 as train_in_fp8
from qjax.low_precision.fp8_nnx import value_and_grad as value_and_grad
from qjax.low_precision.loss_scaling import DynamicLossScale as DynamicLossScale
from qjax.low_precision.loss_scaling import dynamic_loss_scaling as dynamic_loss_scaling
from qjax.low_precision.loss_scaling import loss_scale as loss_scale
from qjax.low_precision.stochastic_rounding import (
    apply_updates_stochastically as apply_updates_stochastically,
)
