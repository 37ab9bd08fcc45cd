# SPDX-License-Identifier: Apache-2.0
"""Model directories, in and out: Hugging Face, compressed-tensors, and qjax's own."""

from qjax_checkpoints.adapter import load_adapter as load_adapter
from qjax_checkpoints.adapter import save_adapter as save_adapter
from qjax_checkpoints.atomic import check_writable as check_writable
from qjax_checkpoints.checkpoint import Checkpoint as Checkpoint
from qjax_checkpoints.load import load as load
from qjax_checkpoints.save import save as save
from qjax_checkpoints.tokenizer import TextTokenizer as TextTokenizer
from qjax_checkpoints.tokenizer import load_tokenizer as load_tokenizer
