# SPDX-License-Identifier: Apache-2.0
"""Writes the model that ships with qjax with outliers in the activations, as those of large models have.

    python scripts/benchmarks/outlier_channels.py OUT

Six channels of each norm become 48 times as large and the weights behind them as much smaller, so that
the function stays what it was. OUT is a Hugging Face directory in float32.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax import folding
from qjax_checkpoints import shipped
from qjax_checkpoints.load import load
from qjax_checkpoints.save import save
from qjax_models import Decoder, blockwise

CHANNELS, FACTOR = 6, 48


def main() -> None:
    """Writes the directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    try:
        write(parser.parse_args().out)
    except ValueError as error:
        parser.error(str(error))


def write(out: Path) -> None:
    """The shipped model so, as a directory that must not exist."""
    checkpoint = load(shipped.model_path(), jnp.float32)
    save(with_outliers(checkpoint.model), checkpoint, out, "dense")


def with_outliers(model: Decoder) -> Decoder:
    """The model itself, changed in place; the same channels whenever it is called."""
    rng = np.random.default_rng(0)
    width = model.config.hidden_size
    for block in blockwise(model, 1).blocks:
        for fold in block.folds:
            if fold.producer.path.endswith("norm"):
                scale = np.ones(width, np.float32)
                scale[rng.choice(width, CHANNELS, replace=False)] = 1 / FACTOR
                folding.fold(block.module, fold, jnp.asarray(scale))
    return model


if __name__ == "__main__":
    main()
