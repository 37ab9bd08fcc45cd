# SPDX-License-Identifier: Apache-2.0
"""JSON files beside the weights: read with one-line errors, written for people to read."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`.

    Raises:
        ValueError: the file is missing, unreadable, not JSON, or holds something else than an
            object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path`, indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
