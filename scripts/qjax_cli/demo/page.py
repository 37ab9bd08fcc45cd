# SPDX-License-Identifier: Apache-2.0
"""The demo's report as one HTML file that needs nothing beside it."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)


def write(path: Path, values: Mapping[str, Any], picture: Path) -> None:
    """Renders the page.

    Args:
      path: of the HTML file to write.
      values: what `qjax demo --json` prints.
      picture: PNG that is put into the page.
    """
    embedded = base64.b64encode(picture.read_bytes()).decode("ascii")
    page = _TEMPLATES.get_template("page.html.jinja").render(**values, picture=embedded)
    path.write_text(page, encoding="utf-8")
