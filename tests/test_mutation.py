"""What `make mutation` has written agrees with its results, and every mutant that lives has a reason."""

import json

from benchmarks import mutation_page

FIGURES = json.loads(mutation_page.RESULTS.read_text(encoding="utf-8"))


def test_page_is_what_the_results_make():
    assert mutation_page.PAGE.read_text(encoding="utf-8") == mutation_page.page(FIGURES)


def test_the_sample_is_large_and_takes_every_module_that_was_there():
    rows = FIGURES["mutants"]
    assert len({(row["module"], row["operator"], row["occurrence"]) for row in rows}) == len(rows) >= 150
    assert {row["outcome"] for row in rows} <= {"killed", "timeout", "survived"}
    assert {row["module"] for row in rows} == FIGURES["setting"]["places"].keys() <= mutation_page.modules()


def test_at_least_nine_in_ten_are_killed():
    assert mutation_page.share_killed(FIGURES) >= 0.9


def test_every_survivor_has_a_reason_and_every_reason_a_survivor():
    assert mutation_page.unexplained(FIGURES) == []
    assert mutation_page.reasons().keys() == {mutation_page.change(row) for row in mutation_page.survivors(FIGURES)}
