# SPDX-License-Identifier: Apache-2.0
"""Decoder language models in Flax NNX, and generation."""

from qjax_models.chain import blockwise as blockwise
from qjax_models.config import DecoderConfig as DecoderConfig
from qjax_models.decoder import Decoder as Decoder
from qjax_models.families import config_from_hf as config_from_hf
from qjax_models.generate import Generator as Generator
from qjax_models.joined import join_projections as join_projections
from qjax_models.next_token_loss import next_token_loss as next_token_loss
from qjax_models.rotatable_form import rotatable as rotatable
from qjax_models.rotatable_form import why_not_rotatable as why_not_rotatable
from qjax_models.sampling import Sampling as Sampling
from qjax_models.stacked_experts import stack_experts as stack_experts
