"""The part of the page on accuracy that the study writes: tables, pictures, and what follows from them."""

import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.study import plot
from benchmarks.study.plan import METHODS, SPARSITIES, every_run
from benchmarks.study.results import (
    CONFIDENCE,
    PARTS,
    PATH,
    Found,
    Summary,
    ablation_grid,
    by_kind,
    differences,
    groups_grid,
    methods_grid,
    read,
    verdict,
)
from benchmarks.study.tasks import TASKS

IMAGES = Path(__file__).parent.parent.parent / "docs/images"
SHOWN_AT = 0.98
SEEDS = 5

_TEXT = """## The study

{count} networks, {seeds} of each kind: methods against sparsities on {tasks}. Every method has the recipe of its task,
and nothing of it was tuned for any of them; zeros spread from 5 % to 50 % of the steps. The number behind ± is half of
the {confidence:g} % confidence interval of the mean, from Student's distribution. "Better" and "worse" are said of
the differences from ST-3, seed by seed, whose interval leaves zero out; each is looked at by itself, so that of many,
one in twenty says so by chance. All trainings are short, so that anyone can repeat them: they rank the methods, and say
little of how good a network can become. Which data, networks and recipes: `benchmarks/study/tasks.py`;
the figures as JSON: `benchmarks/results/study_summary.json`.

Trained with {origins}; {versions}.

{sections}"""

_TASK = """### {title}

![{score} against zeros and multiply-adds](images/study-{task}.png)

{score}:

{methods}

{findings}

Groups of N:M weights along the input dimension; a layer with fewer inputs than a group keeps more of them:

{groups}

![Zeros of each layer, threshold and crossings](images/study-{task}-way.png)
"""

_ABLATION = """
Parts of ST-3: what replacing one does to the {score}, seed by seed against ST-3 itself:

{ablation}

What makes the score worse in the place of a part speaks for the paper's choice of that part; what makes it better
speaks against it:

{verdicts}

Without shortcuts around it, a network with an empty layer can only guess. {empty}
"""


def finished() -> Found:
    """What the study has written of the tasks that it has done with."""
    found = read(PATH)
    known = {run for run, _ in found}
    tasks = [task for task in TASKS if known.issuperset(every_run(SEEDS, (task,)))]
    return [(run, own) for run, own in found if run.task in tasks and run.length == 1 and run.seed < SEEDS]


def section() -> str:
    """The text, from the lines that the study has written; nothing before a task is done with."""
    found = finished()
    if not found:
        return ""
    settings = [own["setting"] for _, own in found]
    tasks = [task for task in TASKS if any(run.task == task for run, _ in found)]
    counts = sorted({own.seeds for own in by_kind(found).values()})
    return _TEXT.format(
        count=len(found),
        seeds=" to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))),
        tasks="one task" if len(tasks) == 1 else f"{len(tasks)} tasks",
        confidence=100 * CONFIDENCE,
        origins="; ".join(dict.fromkeys(map(machine.measured, settings))),
        versions=machine.versions(settings[0]),
        sections="\n".join(_task(found, task) for task in tasks),
    )


def summary() -> dict[str, Any]:
    """Mean, deviation and confidence interval of every kind of network, for other programs."""
    found = finished()
    figures = {name: by_kind(found, name) for name in ("score", "zeros")}
    return {
        "command": "python -m benchmarks.accuracy_page",
        "confidence": CONFIDENCE,
        "settings": [json.loads(text) for text in dict.fromkeys(json.dumps(own["setting"]) for _, own in found)],
        "kinds": [
            {"task": kind[0], "method": kind[1], "sparsity": kind[2], "measured": TASKS[kind[0]].score}
            | {name: _with_interval(summaries[kind]) for name, summaries in figures.items()}
            for kind in figures["score"]
        ],
    }


def _with_interval(own: Summary) -> dict[str, Any]:
    return {**own._asdict(), "interval": [own.mean - own.half, own.mean + own.half]}


def draw() -> None:
    """All pictures."""
    found = finished()
    for task in TASKS:
        if any(run.task == task for run, _ in found):
            plot.draw_task(found, task, IMAGES / f"study-{task}.png")
            plot.draw_way(found, task, SHOWN_AT, IMAGES / f"study-{task}-way.png")


def _task(found: Found, task: str) -> str:
    kind, scores, zeros = TASKS[task], by_kind(found), by_kind(found, "zeros")
    ablation = ablation_grid(found, task)
    text = _TASK.format(
        title=kind.title,
        task=task,
        score=kind.score.capitalize(),
        methods=methods_grid(scores, task).markdown(),
        findings="\n".join(_findings(found, task)),
        groups=groups_grid(scores, zeros, task).markdown(),
    )
    if not ablation.rows:
        return text
    verdicts = "\n".join(_on_the_paper(found, task))
    names = {"score": kind.score, "ablation": ablation.markdown(), "empty": _empty(found, task)}
    return text + _ABLATION.format(verdicts=verdicts, **names)


def _empty(found: Found, task: str) -> str:
    """How many networks have lost a whole layer, of those kinds of which some have."""
    kinds: dict[str, list[bool]] = {}
    for run, own in found:
        if run.task == task and "layers" in own:
            name = f"{PARTS.get(run.method, run.method)} at {100 * run.sparsity:g} %"
            kinds.setdefault(name, []).append(1.0 in own["layers"].values())
    places = [f"{name}, {sum(lost)} of {len(lost)}" for name, lost in kinds.items() if any(lost)]
    return f"Networks with an empty layer: {'; '.join(places)}." if places else "No network has one here."


def _on_the_paper(found: Found, task: str) -> list[str]:
    """Which of the paper's choices this task speaks for, and which against."""
    says = {"worse": "for the paper's choice", "better": "against it", "undecided": "undecided"}
    lines: dict[str, list[str]] = {sentence: [] for sentence in says.values()}
    for method, name in PARTS.items():
        changes = [(sparsity, differences(found, task, method, "st3", sparsity)) for sparsity in SPARSITIES]
        higher = TASKS[task].higher_is_better
        for seen, sentence in says.items():
            at = [f"{100 * s:g} %" for s, change in changes if change is not None and verdict(change, higher) == seen]
            if at:
                lines[sentence].append(f"{name} at {', '.join(at)}")
    return [f"- {sentence}: {'; '.join(places) or 'none'}." for sentence, places in lines.items()]


def _findings(found: Found, task: str) -> list[str]:
    """A line for each neighbour: where it is better or worse than ST-3, each interval by itself."""
    lines = []
    for method in METHODS[1:]:
        places: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for sparsity in SPARSITIES:
            change = differences(found, task, method, "st3", sparsity)
            if change is not None:
                places[verdict(change, TASKS[task].higher_is_better)].append(f"{100 * sparsity:g} %")
        known = [f"{name} at {', '.join(at)}" for name, at in places.items() if at]
        lines.append(f"- `{method}` beside `st3`: {'; '.join(known)}.")
    return lines
