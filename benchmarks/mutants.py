"""Mutants: every small change that Cosmic Ray knows how to make to the core, and a sample that is drawn once.

The sample belongs to the code: a mutant is in it if the hash of what it changes is small. So a change of one function
leaves the mutants of the others where they are, and anybody draws the same sample.
"""

import ast
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

OPERATORS = sorted(
    name for name in plugins.operator_names() if name != "core/NoOp" and not plugins.get_operator(name).arguments()
)

Position = tuple[int, int]


class Mutant(NamedTuple):
    """One change of one module, by Cosmic Ray's operator at its ``occurrence``."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """The module's text with the change."""
        return mutated(source, self.operator, self.occurrence)


@dataclass(frozen=True)
class Candidate:
    """Where a change could be made; what it would be is not known before it is made."""

    module: str
    operator: str
    occurrence: int
    start: Position
    end: Position
    text: str
    """The line, and how many equal ones of the module precede it: what tells it apart in later versions too."""

    @cached_property
    def rank(self) -> str:
        """Place in the order in which mutants are drawn."""
        same_line = f"{self.module}|{self.text}|{self.operator}|{self.start[1]}|{self.occurrence_there}"
        return hashlib.sha256(same_line.encode()).hexdigest()

    occurrence_there: int = 0
    """Which of the operator's changes to the same place."""


def candidates(module: str, source: str) -> list[Candidate]:
    """All places of a module and all that can be changed there, but what :func:`_untested` names."""
    tree, skipped, texts = get_ast(source), list(_untested(module, ast.parse(source))), _told_apart(source)
    found = []
    for name in OPERATORS:
        operator, there = plugins.get_operator(name)(), dict[Position, int]()
        positions = (position for node in ast_nodes(tree) for position in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            there[start] = there.get(start, -1) + 1
            if not any(first <= start and end <= last for first, last in skipped):
                text = texts[start[0] - 1]
                found.append(Candidate(module, name, occurrence, start, end, text, there[start]))
    return found


def places(found: Iterable[Candidate]) -> list[Candidate]:
    """One change of each place, the one drawn first, in the order in which they are drawn."""
    first: dict[tuple[Position, Position], Candidate] = {}
    for candidate in sorted(found, key=lambda c: c.rank):
        first.setdefault((candidate.start, candidate.end), candidate)
    return list(first.values())


def draw(module: str, source: str, drawn: Iterable[Candidate], count: int) -> list[Mutant]:
    """The first ``count`` of these that compile to another program, in the order of their lines."""
    made = (mutant for candidate in drawn if (mutant := _made(candidate, source)) is not None)
    return sorted(islice(made, count), key=lambda m: (m.line, m.operator, m.occurrence))


def mutated(source: str, operator: str, occurrence: int) -> str:
    """The text with this change."""
    text: str | None = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    if text is None:
        raise ValueError(f"mutated: {operator} must have an occurrence {occurrence}, got none")
    return text


def _made(candidate: Candidate, source: str) -> Mutant | None:
    text = mutated(source, candidate.operator, candidate.occurrence)
    try:
        same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    before, after = _difference(source, text)
    name, occurrence, line = candidate.operator, candidate.occurrence, candidate.start[0]
    return None if same else Mutant(candidate.module, name, occurrence, line, before, after)


def _difference(old: str, new: str) -> tuple[str, str]:
    """The lines that differ."""
    lines = list(difflib.ndiff(old.splitlines(), new.splitlines()))
    removed, added = (" ".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))
    return removed, added


def _told_apart(source: str) -> list[str]:
    seen, texts = dict[str, int](), []
    for line in map(str.strip, source.splitlines()):
        seen[line] = seen.get(line, -1) + 1
        texts.append(f"{line}|{seen[line]}")
    return texts


def _untested(module: str, tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    """What no test of uncompiled code can see: annotations, and what only Numba's compiler reads of the kernels."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield _span(node.annotation)
        if isinstance(node, ast.FunctionDef):
            if node.returns is not None:
                yield _span(node.returns)
            if module == "kernels":
                yield from (((d.lineno, d.col_offset - 1), _span(d)[1]) for d in node.decorator_list)
        if module == "kernels" and isinstance(node, ast.If) and "DISABLE_JIT" in ast.dump(node.test):
            yield from map(_span, node.orelse)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "'njit'" in ast.dump(node.value.func):
            yield _span(node)


def _span(node: ast.stmt | ast.expr) -> tuple[Position, Position]:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or 0)


def sample(modules: dict[str, Path], size: int, least: int) -> tuple[list[Mutant], dict[str, int]]:
    """About ``size`` mutants of all modules in proportion to their places, ``least`` of each; and these numbers."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules.items()}
    drawn = {name: places(candidates(name, source)) for name, source in sources.items()}
    numbers = {name: len(found) for name, found in drawn.items()}
    total = sum(numbers.values())
    shares = {name: max(round(size * number / total), least) for name, number in numbers.items()}
    mutants = [m for name, source in sources.items() for m in draw(name, source, drawn[name], shares[name])]
    return mutants, numbers
