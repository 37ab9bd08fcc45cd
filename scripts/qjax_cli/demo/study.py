# SPDX-License-Identifier: Apache-2.0
"""One model in many schemes: size, quality and speed of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Int32

import qjax
from qjax.evaluation import logits_of
from qjax.formats import device_bytes
from qjax.nnx_layers import quantizable_layers, weight_of
from qjax_models import Decoder
from qjax_models.generate import Generator


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one scheme costs and gives.

    Attributes:
      scheme: its name; the dtype's name for the model as it is.
      quantizes_activations: whether products take activations in few bits too.
      bits_per_weight: stored bits a weight of the quantized layers, scales included.
      mebibytes: of the whole model, embeddings and norms included.
      perplexity: on the evaluation windows.
      perplexity_change: from the model as it is, percent.
      kl: divergence from the model as it is, nats a token.
      decode_tokens_per_second: of all prompts together, compilation left out.
    """

    scheme: str
    quantizes_activations: bool
    bits_per_weight: float
    mebibytes: float
    perplexity: float
    perplexity_change: float
    kl: float
    decode_tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """A model, the text it is measured on, and what it says in each scheme.

    Attributes:
      model: as it was loaded.
      windows: evaluation tokens.
      prompts: token ids of each prompt to continue.
      new_tokens: length of a continuation.
    """

    model: Decoder
    windows: Int32[np.ndarray, "n length"]
    prompts: Sequence[list[int]]
    new_tokens: int

    @property
    def dtype(self) -> str:
        """What the model's weights are as it was loaded."""
        return str(self.model.model.embed_tokens.embedding[...].dtype)

    def rows(self, schemes: Sequence[str]) -> Iterator[tuple[Row, list[list[int]]]]:
        """Measures the model as it is, then in each scheme.

        Yields:
          The row, and the greedy continuation of each prompt.
        """
        plain = qjax.evaluate(self.model, self.windows)
        # Once, and not again for every scheme: a fourth of the time.
        baseline = logits_of(self.model, self.windows)
        _, report = qjax.quantize_model(self.model, schemes[0])
        layers = {layer.path for layer in report.quantized}
        yield self._row(self.dtype, self.model, plain.perplexity, plain.perplexity, 0.0, layers)
        for scheme in schemes:
            model, _ = qjax.quantize_model(self.model, scheme)
            judged = qjax.evaluate(model, self.windows, baseline=baseline)
            assert judged.kl is not None
            yield self._row(scheme, model, judged.perplexity, plain.perplexity, judged.kl, layers)

    def _row(
        self,
        name: str,
        model: Decoder,
        perplexity: float,
        reference: float,
        kl: float,
        layers: set[str],
    ) -> tuple[Row, list[list[int]]]:
        weights = [weight_of(layer) for path, layer in quantizable_layers(model) if path in layers]
        capacity = max(map(len, self.prompts)) + self.new_tokens
        spoken = Generator(model, capacity=capacity).generate(self.prompts, self.new_tokens)
        row = Row(
            scheme=name,
            quantizes_activations=any(
                isinstance(w, qjax.QTensor) and w.activations is not None for w in weights
            ),
            bits_per_weight=8 * sum(w.nbytes for w in weights) / sum(w.size for w in weights),
            mebibytes=device_bytes(nnx.state(model)) / 2**20,
            perplexity=perplexity,
            perplexity_change=100 * (perplexity / reference - 1),
            kl=kl,
            decode_tokens_per_second=spoken.timing.decode_tokens_per_second,
        )
        return row, spoken.tokens
