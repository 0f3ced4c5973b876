r"""Formulas as MathML, which browsers draw by themselves: no script and nothing to download.

Docutils converts them. What its converter does not know is spelled in what it does know, and an equation's
``\tag`` becomes the number beside it and its address: ``#equation-2b``.
"""

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_SPELLINGS = {
    r"\big": r"\bigl",
    r"\Big": r"\Bigl",
    r"\dots": r"\ldots",
    r"\iff": r"\;\Longleftrightarrow\;",
    r"\log": r"\,\log\,",
}
_UNKNOWN = re.compile("|".join(re.escape(name) + "(?![a-zA-Z])" for name in _SPELLINGS))
_NO_OPERATOR = re.compile(r"<mo([^>]*)>([|‖]|min|max)</mo>")
_TAG = re.compile(r"\\tag\{(\w+)\}")


def mathml(node: nodes.Element, latex: str, as_block: bool) -> str:
    """The formula's markup; a warning, and its source, where the converter does not understand it."""
    try:
        markup: str = tex2mathml(_UNKNOWN.sub(lambda found: _SPELLINGS[found[0]], latex), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in the formula %r", error, latex, location=node)
        return f"<code>{escape(latex)}</code>"
    return _NO_OPERATOR.sub(r'<mo\1 lspace="0" rspace="0">\2</mo>', markup)  # stands around or before, not between


def visit_math(translator: Any, node: nodes.math) -> None:
    """A formula within a line."""
    translator.body.append(mathml(node, node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own, its number to the right."""
    latex = node.astext()
    tags = _TAG.findall(latex)
    body = mathml(node, _TAG.sub("", latex).strip(), as_block=True)
    number = "".join(f'<a class="number" id="equation-{t}" href="#equation-{t}">({t})</a>' for t in tags)
    translator.body.append(f"{translator.starttag(node, 'div', CLASS='formula')}{body}{number}</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
