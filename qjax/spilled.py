# SPDX-License-Identifier: Apache-2.0
"""Arrays in a file instead of in memory, for activations between two blocks of a large model."""

import math
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class _Place:
    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SpilledArrays:
    """A list of arrays that lie in a file and are read one by one.

    The file has no name: it goes with the list, and with the process, however that ends.

    Args:
      folder: a directory on the disk that is to hold them.

    Raises:
      ValueError: ``folder`` is no writable directory; later, the disk is full.

    Example:
      >>> arrays = SpilledArrays(Path(tempfile.gettempdir()))
      >>> arrays.append(jnp.arange(3))
      >>> arrays[0] = arrays[0] + 1
      >>> [x.tolist() for x in arrays]
      [[1, 2, 3]]
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._places: list[_Place] = []
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".qjax-activations-")
        except OSError as error:
            raise ValueError(f"{folder}: cannot hold activations: {error.strerror}") from error
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self._places)

    def __iter__(self) -> Iterator[Shaped[Array, "..."]]:
        """The arrays, each read when it is asked for."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Shaped[Array, "..."]:
        """Reads an array."""
        place = self._places[index]
        self._file.seek(place.begin)
        raw = self._file.read(place.nbytes)
        return jnp.asarray(np.frombuffer(raw, place.dtype).reshape(place.shape))

    def __setitem__(self, index: int, x: Shaped[Array, "..."]) -> None:
        """Writes an array over another of its shape and dtype."""
        place = self._places[index]
        if (x.shape, x.dtype) != (place.shape, place.dtype):
            raise ValueError(
                f"a block makes {x.dtype} {x.shape} of {place.dtype} {place.shape}; spilled "
                "activations keep their shape and dtype"
            )
        self._write(place, x)

    def beside(self) -> "SpilledArrays":
        """An empty list on the same disk."""
        return SpilledArrays(self._folder)

    def append(self, x: Shaped[Array, "..."]) -> None:
        """Writes one array more."""
        begin = self._places[-1].begin + self._places[-1].nbytes if self._places else 0
        place = _Place(begin, x.shape, np.dtype(x.dtype))
        self._write(place, x)
        self._places.append(place)

    def _write(self, place: _Place, x: Shaped[Array, "..."]) -> None:
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        try:
            self._file.seek(place.begin)
            self._file.write(raw.data)
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self._folder}: cannot hold activations: {error.strerror}"
            ) from error
