# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model did, layer by layer, as a value and as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
      path: slash-joined path of the layer.
      scheme: name of its scheme; None when it was left as it is.
      method: algorithm that quantized it; None when none did.
      shape: of the weight.
      relative_output_error: ``|x w - x w'| / |x w|`` over the calibration rows ``x``; without them in
        expectation over white inputs, which is ``|w - w'| / |w|``; None when the layer was left as it
        is, shares another's weight, or was trained with all others for the model's output.
      bytes_before: of the weight as it was; 0 when it is counted with another layer.
      bytes_after: of what stands in its place.
      seconds: spent on it.
      reason: why it was left as it is, or whose weight it shares; empty otherwise.
      saturated: infinite weights, which took the ends of their tiles' ranges.
      damping: share of the mean that was added to the Hessian's diagonal; None without a Hessian.
      damping_raised: how often that was doubled until the Hessian could be factorized.
      calibration_rows: tokens that the layer saw in calibration, of experts those that were routed to it;
        None without any.
      fallback: what was done because they were too few; empty otherwise.
      outliers: inputs that are kept as they are, in 16 bits; None: the method keeps none.
      crowded_out: inputs as large as those, for which there was no room.
      input_scale: the static scale of what the layer multiplies; None: its inputs are quantized by
        their own values, or not at all.
    """

    path: str
    scheme: str | None
    method: str | None
    shape: tuple[int, ...]
    relative_output_error: float | None
    bytes_before: int
    bytes_after: int
    seconds: float
    reason: str = ""
    saturated: int = 0
    damping: float | None = None
    damping_raised: int = 0
    calibration_rows: int | None = None
    outliers: int | None = None
    crowded_out: int = 0
    fallback: str = ""
    input_scale: float | None = None

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "LayerReport":
        """Reads an entry of :meth:`QuantizationReport.as_json`."""
        fields: dict[str, Any] = entry | {"shape": tuple(entry["shape"])}
        return LayerReport(**fields)


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What quantizing a model did.

    Attributes:
      layers: one entry for each layer that could hold a QTensor.
      unmatched_rules: patterns that decided for no layer.
    """

    layers: tuple[LayerReport, ...]
    unmatched_rules: tuple[str, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that hold a QTensor now."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def unquantized(self) -> tuple[LayerReport, ...]:
        """The layers that were left as they are."""
        return tuple(layer for layer in self.layers if layer.scheme is None)

    def warnings(self) -> list[str]:
        """A line for each rule or layer without effect, of few tokens, of values cut or rounded."""
        rules = [f"rule {pattern!r} decided for no layer" for pattern in self.unmatched_rules]
        saturated = [
            f"{layer.path}: infinite weights saturated, {layer.saturated} in all"
            for layer in self.layers
            if layer.saturated
        ]
        fallbacks = [f"{layer.path}: {layer.fallback}" for layer in self.layers if layer.fallback]
        alone = [f"{layer.path} stays as it is: {layer.reason}" for layer in self.unquantized]
        return rules + saturated + self._damped() + self._crowded_out() + fallbacks + alone

    def _damped(self) -> list[str]:
        """At most one line: few tokens concern every layer of a width."""
        raised = [layer for layer in self.layers if layer.damping_raised]
        if not raised:
            return []
        worst = max(raised, key=lambda layer: layer.damping_raised)
        return [
            f"{len(raised)} layers needed more damping than asked for: in {worst.path} "
            f"{worst.damping:.3g} of the mean of the Hessian's diagonal; the more, the nearer to "
            "rounding to nearest"
        ]

    def _crowded_out(self) -> list[str]:
        """At most one line: in a model of today every layer of one kind may be concerned."""
        crowded = [layer for layer in self.layers if layer.crowded_out]
        if not crowded:
            return []
        worst = max(crowded, key=lambda layer: layer.crowded_out)
        return [
            f"{len(crowded)} layers have more inputs with outliers than there is room for in 16 bits: in "
            f"{worst.path} {worst.outliers} are kept, {worst.crowded_out} are quantized with the rest"
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON types, totals included."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "unmatched_rules": list(self.unmatched_rules),
            "totals": {
                "layers": len(self.layers),
                "quantized": len(self.quantized),
                "bytes_before": sum(layer.bytes_before for layer in self.layers),
                "bytes_after": sum(layer.bytes_after for layer in self.layers),
                "seconds": sum(layer.seconds for layer in self.layers),
            },
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "QuantizationReport":
        """Reads what :meth:`as_json` gives."""
        return QuantizationReport(
            layers=tuple(map(LayerReport.from_json, value["layers"])),
            unmatched_rules=tuple(value["unmatched_rules"]),
        )

    def dumps(self) -> str:
        """The report as indented JSON text."""
        return json.dumps(self.as_json(), indent=2)
