"""The documents: every Python block runs and prints what stands below it, and what they name exists.

A block marked ``output`` directly below a Python block is what that block prints.
"""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def is_executed(path: Path) -> bool:
    """Keras decides on a backend when it is imported; its pages are run where one was asked for."""
    text = path.read_text(encoding="utf-8")
    return "```python" in text and bool("\nfrom st3_keras" not in text or os.environ.get("KERAS_BACKEND"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


documents = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


def missing_from(found: set[str], known: set[str]) -> list[str]:
    """What is named and does not exist; naming nothing at all would be a fault of the pattern."""
    assert found
    return sorted(found - known)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if is_executed(path)], ids=name_of)
@pytest.mark.filterwarnings("default" if os.environ.get("KERAS_BACKEND") else "error")
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
    assert missing_from(found, {path for path in found if (ROOT / path).exists()}) == []


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert missing_from(set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)), targets) == []


def test_accuracies_in_the_readme_are_those_measured():
    methods = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text(encoding="utf-8"))["methods"]
    for name, figures in methods.items():
        mean, deviation, lowest, zeros = (
            100 * figures[key] for key in ("mean", "standard_deviation", "lowest", "sparsity")
        )
        assert f"| `{name}` | {mean:.1f} ± {deviation:.1f} | {lowest:.1f} | {zeros:.2f} |" in README


def test_tests_named_in_the_specification_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/spec.md").read_text(encoding="utf-8")))
    assert missing_from(named, set(re.findall(r"^def (test_\w+)", TESTS, re.MULTILINE))) == []


def test_equations_quoted_by_docstrings_have_their_numbers():
    tags = set(re.findall(r"\\tag\{(\w+)\}", (ROOT / "docs/spec.md").read_text(encoding="utf-8")))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "st3core").rglob("*.py"))
    quoted = set(re.findall(r"equation (\d[a-z]?)", sources))
    assert missing_from(quoted, tags | {tag[0] for tag in tags}) == []
