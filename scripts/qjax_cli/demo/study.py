# SPDX-License-Identifier: Apache-2.0
"""One model in many schemes, by several methods: size and quality of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Int32

import qjax
from qjax.evaluation import logits_of
from qjax.formats import device_bytes
from qjax.nnx_layers import quantizable_layers, weight_of
from qjax.post_training import copied
from qjax.rescaling import simulated
from qjax_models import Decoder, blockwise
from qjax_models.generate import Generator


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one scheme costs and gives.

    Attributes:
      scheme: its name; the dtype's name for the model as it is.
      method: how weights were quantized; None for the model as it is.
      quantizes_activations: whether products take activations in few bits too.
      bits_per_weight: stored bits a weight of the quantized layers, scales included.
      mebibytes: of the whole model, embeddings and norms included.
      perplexity: on the evaluation windows.
      perplexity_change: from the model as it is, percent.
      kl: divergence from the model as it is, nats a token.
    """

    scheme: str
    method: str | None
    quantizes_activations: bool
    bits_per_weight: float
    mebibytes: float
    perplexity: float
    perplexity_change: float
    kl: float

    @property
    def name(self) -> str:
        """Of the scheme, and of the method unless that is rounding to nearest."""
        return self.scheme if self.method in (None, "rtn") else f"{self.scheme} {self.method}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A model, the text it is measured on, and what it says in each scheme.

    Attributes:
      model: as it was loaded.
      calibration: tokens for the methods that look at some.
      windows: evaluation tokens.
    """

    model: Decoder
    calibration: Int32[np.ndarray, "m length"]
    windows: Int32[np.ndarray, "n length"]

    @property
    def dtype(self) -> str:
        """What the model's weights are as it was loaded."""
        return str(self.model.model.embed_tokens.embedding[...].dtype)

    def measured(self, wanted: Sequence[tuple[str, str]]) -> Iterator[tuple[Row, Decoder]]:
        """Measures the model as it is, then in each scheme by the method beside it.

        Yields:
          The row, and the model.
        """
        plain = qjax.evaluate(self.model, self.windows)
        # Once, and not again for every scheme: a fourth of the time.
        baseline = logits_of(self.model, self.windows)
        _, report = qjax.quantize_model(self.model, wanted[0][0])
        layers = {layer.path for layer in report.quantized}
        yield self._row(self.dtype, None, self.model, plain, plain, layers), self.model
        for scheme, method in wanted:
            model = self._quantized(scheme, method)
            # Where weights alone are quantized, by their values: one compiled program serves all schemes.
            judged = qjax.evaluate(
                simulated(copied(self.model), model), self.windows, baseline=baseline
            )
            yield self._row(scheme, method, model, judged, plain, layers), model

    def continued(
        self, model: Decoder, prompts: Sequence[list[int]], count: int
    ) -> list[list[int]]:
        """Greedy continuations of prompts."""
        generator = Generator(model, capacity=max(map(len, prompts)) + count)
        return generator.generate(prompts, count).tokens

    def _quantized(self, scheme: str, method: str) -> Decoder:
        if method == "rtn":
            return qjax.quantize_model(self.model, scheme)[0]
        return qjax.quantize_sequentially(
            self.model, blockwise, self.calibration, scheme, method=method
        )[0]

    def _row(
        self,
        scheme: str,
        method: str | None,
        model: Decoder,
        judged: qjax.Evaluation,
        plain: qjax.Evaluation,
        layers: set[str],
    ) -> Row:
        weights = [weight_of(layer) for path, layer in quantizable_layers(model) if path in layers]
        return Row(
            scheme=scheme,
            method=method,
            quantizes_activations=any(
                isinstance(w, qjax.QTensor) and w.activations is not None for w in weights
            ),
            bits_per_weight=8 * sum(w.nbytes for w in weights) / sum(w.size for w in weights),
            mebibytes=device_bytes(nnx.state(model)) / 2**20,
            perplexity=judged.perplexity,
            perplexity_change=100 * (judged.perplexity / plain.perplexity - 1),
            kl=judged.kl or 0.0,
        )
