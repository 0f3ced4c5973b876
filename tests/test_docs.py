"""The documents: every Python block runs and prints what stands below it, and what they name exists.

A block marked ``output`` directly below a Python block is what that block prints.
"""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
EQUATION_PARTS = [
    "Domain", "Dtypes", "Edge cases", "Worked example", "Complexity", "Reference code", "Subnormals flushed",
    "Tested by",
]  # fmt: skip
SPECIFICATION = {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs/spec").glob("*.md"))}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def is_executed(path: Path) -> bool:
    """Keras decides on a backend when it is imported; its pages are run where one was asked for."""
    text = path.read_text(encoding="utf-8")
    return "```python" in text and bool("\nfrom st3_keras" not in text or os.environ.get("KERAS_BACKEND"))


def name_of(path: Path) -> str:
    """Path from the root, without ``docs``."""
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


documents = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


def missing_from(found: set[str], known: set[str]) -> list[str]:
    """What is named and does not exist; naming nothing at all would be a fault of the pattern."""
    assert found
    return sorted(found - known)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if is_executed(path)], ids=name_of)
@pytest.mark.filterwarnings(
    "default" if os.environ.get("KERAS_BACKEND") else "error",
    "ignore:.*LeafSpec:FutureWarning",  # PyTorch of itself, when Lightning uses it
    "ignore:.*does not have many workers",  # advice of Lightning
)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may write files
    text, namespace = path.read_text(encoding="utf-8"), {"__name__": "document"}
    examples = list(EXAMPLE.finditer(text))
    assert len(examples) == text.count("```python")
    assert sum(example[2] is not None for example in examples) == text.count("```output")
    for example in examples:
        empty_lines = "\n" * text.count("\n", 0, example.start(1))  # so that a traceback tells the document's line
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(empty_lines + example[1], path, "exec"), namespace)
        if example[2] is not None:
            assert lines(printed.getvalue()) == lines(example[2])


def lines(text: str) -> list[str]:
    """The lines without the spaces at their ends, which editors take away."""
    return [line.rstrip() for line in text.strip("\n").split("\n")]


@documents
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_files_named_in_the_readme_exist():
    found = set(re.findall(r"\b(?:st3core|adapters|tests|docs|examples|benchmarks)/[\w./-]*", README))
    made_later = {path for path in found if "/_build/" in path}
    assert missing_from(found - made_later, {path for path in found if (ROOT / path).exists()}) == []


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert missing_from(set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)), targets) == []


def test_anchors_in_the_specification_exist():
    for name, text in SPECIFICATION.items():
        for page, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", text):
            headings = re.findall(r"^#+ (.*)", SPECIFICATION[page or name], re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_equations_have_all_their_parts():
    sections = [part for text in SPECIFICATION.values() for part in text.split("\n## ") if r"\tag" in part]
    assert len(sections) == 18
    for section in sections:
        found = re.findall(r"^\*\*([A-Z][^*]*)\.\*\*", section, re.MULTILINE)
        assert found == EQUATION_PARTS, section[:40]
        assert "```{literalinclude} " in section
        equation = re.search(r"tag{(.*?)}", section)[1]
        vectors = "Vectors: none" if equation == "2d" else f"Vectors: `{equation}`"  # no backend is asked for costs
        assert vectors in " ".join(section.split())


def test_code_quoted_by_the_specification_exists():
    pattern = r"```\{literalinclude\} (\S+)\n:language: python\n:pyobject: (\S+)\n```"
    quotes = [quote for text in SPECIFICATION.values() for quote in re.findall(pattern, text)]
    assert len(quotes) == sum(text.count("{literalinclude}") for text in SPECIFICATION.values()) > 0
    for path, name in quotes:
        source = (ROOT / "docs/spec" / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {name.rpartition('.')[2]}\(", source, re.MULTILINE), (path, name)


def test_functions_of_the_reference_are_quoted():
    source = (ROOT / "st3core/reference.py").read_text(encoding="utf-8")
    quoted = set(re.findall(r":pyobject: (\S+)", "".join(SPECIFICATION.values())))
    assert missing_from(set(re.findall(r"^def (\w+)", source, re.MULTILINE)), quoted) == []


def test_tests_named_in_the_specification_exist():
    named = set(re.findall(r"`(test_\w+)`", "".join(SPECIFICATION.values())))
    assert missing_from(named, set(re.findall(r"^def (test_\w+)", TESTS, re.MULTILINE))) == []


def test_equations_quoted_by_docstrings_have_their_numbers():
    tags = set(re.findall(r"\\tag\{(\w+)\}", "".join(SPECIFICATION.values())))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "st3core").rglob("*.py"))
    quoted = set(re.findall(r"equation (\d[a-z]?)", sources))
    assert missing_from(quoted, tags | {tag[0] for tag in tags}) == []
