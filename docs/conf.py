"""Settings of the documentation site: ``make docs``."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_extensions"), str(DOCS.parent), str(DOCS.parent / "adapters")]
os.environ.setdefault("KERAS_BACKEND", "torch")  # the API pages import st3_keras
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import st3core  # noqa: E402

project = "st3core"
author = "The st3core authors"
copyright = author
version = release = st3core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names; the build looks nothing up on the network.
    ("py:.*", r"(collections|dataclasses|jax|keras|ml_dtypes|np|numpy|nn|optax|os|pathlib|tempfile|torch|typing)\b.*"),
    # Annotations of ours that have no page, and Python's own.
    ("py:.*", r"(Any|Callable|Literal|Path|PathLike|SupportsIndex|FloatArray|NDArray|Rule|Axes|Figure|matplotlib\..*)"),
    ("py:.*", r"(bool|bytes|dict|float|int|list|object|str|tuple|type|None|[A-Z]\w+Error|optional)"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"st3core {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"footer_icons": []}

logging.getLogger("tensorflow").setLevel(logging.ERROR)


def short_arrays(signature: str | None) -> str | None:
    """Annotations as the source has them: autodoc spells ``NDArray`` out."""
    return signature and re.sub(
        r"ndarray\[tuple\[\S*Any, \.\.\.\], \S*dtype\[(.*?)\]\]", r"typing.NDArray[\1]", signature
    )


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect(
        "autodoc-process-signature",
        lambda app, what, name, obj, options, signature, returned: (short_arrays(signature), short_arrays(returned)),
    )
