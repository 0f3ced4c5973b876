"""Specification and kit name each other; the page shows what `make conformance` has found."""

import json
import re
from pathlib import Path

from benchmarks import conformance
from st3core.conformance import PROPERTIES
from tests.conformance.broken import BROKEN

ROOT = Path(__file__).parent.parent.parent
FIGURES = json.loads(conformance.RESULTS.read_text(encoding="utf-8"))
NAME = re.compile(r"`((?:thresholds|forward|gradient|arguments)_\w+)`")


def pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/spec").glob("*.md")}


def test_every_property_stands_with_its_equation():
    texts = pages()
    for chosen in PROPERTIES:
        text = texts[chosen.page]
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        tag = f"\\tag{{{chosen.equation}}}"  # what all equations of a page share has no tag of its own
        wanted = [s for s in sections if tag in s] or [text]
        assert any(f"`{chosen.name}`" in section for section in wanted), chosen.name


def test_every_property_that_the_specification_names_exists():
    named = {name for text in pages().values() for name in NAME.findall(text)}
    assert named == {p.name for p in PROPERTIES}


def test_page_is_what_the_results_make():
    text = conformance.PAGE.read_text(encoding="utf-8")
    assert conformance.page(text, FIGURES) == text


def test_results_are_of_the_present_kit():
    for run in FIGURES["backends"]:
        assert [row["property"] for row in run["results"]] == [p.name for p in PROPERTIES]
        assert {row["outcome"] for row in run["results"]} <= {"passed", "not asked"}
    assert {run["backend"] for run in FIGURES["backends"]} >= {"numpy", "torch", "torch, device path"}
    assert sum(run["backend"].startswith("keras on") for run in FIGURES["backends"]) == 3
    assert {name: own["ought_to_violate"] for name, own in FIGURES["broken"].items()} == {
        kind.__name__: ought for kind, ought in BROKEN.items()
    }
    assert all(own["ought_to_violate"] in own["violated"] for own in FIGURES["broken"].values())
