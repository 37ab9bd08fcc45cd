# SPDX-License-Identifier: Apache-2.0
"""The model that ships with qjax, and the text that judges it.

The model is a small Llama trained on Python sources (`scripts/train_shipped_model.py` made it).
It has never seen the Python standard library, and every installation of Python carries that
library: so every user has, without a download, a text on which the model and its quantized forms
can be measured.
"""

import sysconfig
from pathlib import Path

# Modules that Python 3.11, 3.12 and 3.13 all have as one source file. The order is part of the
# definition: it decides where the windows of an evaluation fall.
HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse",
    "ast",
    "asyncio.base_events",
    "asyncio.streams",
    "base64",
    "calendar",
    "codecs",
    "collections.__init__",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "email.message",
    "enum",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "heapq",
    "html.parser",
    "http.client",
    "http.cookiejar",
    "inspect",
    "ipaddress",
    "json.decoder",
    "json.encoder",
    "logging.__init__",
    "mailbox",
    "mimetypes",
    "multiprocessing.pool",
    "optparse",
    "os",
    "pickle",
    "platform",
    "pprint",
    "queue",
    "random",
    "selectors",
    "shlex",
    "shutil",
    "smtplib",
    "socketserver",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "traceback",
    "typing",
    "unittest.mock",
    "urllib.parse",
    "weakref",
)


def model_path() -> Path:
    """Return the directory of the model that ships with qjax.

    Returns:
        A Hugging Face directory: `config.json`, `model.safetensors`, the tokenizer's files and
        `training_summary.json`, the record of how it was trained.

    Raises:
        ValueError: the installation lacks the directory or its weights.
    """
    path = Path(__file__).parent / "shipped"
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"{path}: no model.safetensors, so qjax is not installed completely")
    return path


def evaluation_text(stdlib: Path | None = None) -> str:
    r"""Return the sources of `HELD_OUT_MODULES`, in order, each followed by one newline.

    The text differs a little between versions of Python, as the library does; compare numbers
    that were taken on the same one.

    Args:
        stdlib: the folder of a standard library; None means that of the running Python.

    Returns:
        About two million characters.

    Raises:
        ValueError: the library is not there as source files.

    Example:
        >>> evaluation_text().startswith("# Author: Steven J. Bethard")
        True
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    return "".join(f"{_source(root, module)}\n" for module in HELD_OUT_MODULES)


def _source(root: Path, module: str) -> str:
    """Return the text of one module; `package.__init__` names a package's own file."""
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{file}: not readable; the evaluation text is Python's standard library as sources"
        ) from error
