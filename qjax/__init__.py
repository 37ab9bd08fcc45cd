# SPDX-License-Identifier: Apache-2.0
"""qjax: quantize JAX/Flax models well, run them fast, take them to and from the Hugging Face world."""

from qjax import low_precision as low_precision
from qjax.algorithms.round_nearest import quantize as quantize
from qjax.budget import Choice as Choice
from qjax.budget import choose_schemes as choose_schemes
from qjax.calibration import calibrate as calibrate
from qjax.evaluation import Evaluation as Evaluation
from qjax.evaluation import evaluate as evaluate
from qjax.kernel_products import prepare as prepare
from qjax.lora import add_lora as add_lora
from qjax.lora import merge_lora as merge_lora
from qjax.lora import requantize_lora as requantize_lora
from qjax.method import Method as Method
from qjax.nnx_layers import QuantizedParam as QuantizedParam
from qjax.ops import dot_general as dot_general
from qjax.ops import einsum as einsum
from qjax.ops import matmul as matmul
from qjax.ops import take as take
from qjax.post_training import quantize_model as quantize_model
from qjax.qat.fake_quant import fake_quant as fake_quant
from qjax.qat.fake_quant import learned_grids as learned_grids
from qjax.qat.fake_quant import quantized_params as quantized_params
from qjax.qat.fake_quantizer import quantized as quantized
from qjax.qat.fake_quantizer import trainable as trainable
from qjax.qat.linen import fake_quant_activations as fake_quant_activations
from qjax.qat.linen import fake_quant_apply as fake_quant_apply
from qjax.qat.masters import masters as masters
from qjax.qat.masters import on_grid as on_grid
from qjax.qat.masters import straight_through as straight_through
from qjax.qtensor import QTensor as QTensor
from qjax.qtensor import dequantize as dequantize
from qjax.ranges import RangeSearch as RangeSearch
from qjax.report import QuantizationReport as QuantizationReport
from qjax.scheme import Recipe as Recipe
from qjax.scheme import Rule as Rule
from qjax.scheme import Scheme as Scheme
from qjax.sequential import quantize_sequentially as quantize_sequentially
from qjax.stacked_layers import scan_layers as scan_layers

__version__ = "0.1.0"
