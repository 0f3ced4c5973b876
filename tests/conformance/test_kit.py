"""The kit against backends that are right, and against backends that are wrong in one place each."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from st3core import get_method
from st3core.conformance import (
    PROPERTIES,
    NumpyBackend,
    check,
    check_backend,
    find_backend,
    from_bits,
    laid_out,
    list_backends,
)
from st3core.conformance.run import select
from tests.conformance.broken import BROKEN, GradientMasked, OutputReused, StaleGradientMask
from tests.conformance.textbook import Textbook

ROOT = Path(__file__).parent.parent.parent
REMEMBERING = {OutputReused, StaleGradientMask}  # what went wrong is an earlier answer, or depends on addresses
DRAWN = [p.name for p in PROPERTIES if p.name != "thresholds_count_many_weights"]


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_backend_violates_its_property(kind, capsys):
    """And the code in the message repeats what it says."""
    message = message_of(kind)
    assert message.startswith(f"{kind.name} violates {BROKEN[kind]}: ")
    got = re.search(r"^  got:      (.*)$", message, re.MULTILINE)[1]
    printed = what_prints(code_of(message), capsys)
    first = re.match(r"\[+([^,\]]*)", got)  # number of an array, unless the message says it in words
    assert first is None or first[1] in printed or kind in REMEMBERING
    assert "Error: " not in printed or printed in got


def what_prints(code, capsys):
    try:
        with np.errstate(all="ignore"):
            exec(compile(code, "snippet", "exec"), {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return capsys.readouterr().out


def test_every_property_is_violated_by_a_broken_backend():
    assert {p.name for p in PROPERTIES} == set(BROKEN.values())
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("kind", [NumpyBackend, Textbook], ids=lambda kind: kind.name)
def test_a_correct_backend_is_accepted(kind):
    assert [r.failure for r in check(kind(), max_examples=30) if r.failure] == []


@pytest.mark.parametrize("kind", [NumpyBackend, Textbook], ids=lambda kind: kind.name)
def test_a_correct_backend_is_accepted_with_fifty_seeds(kind):
    for seed in range(50):
        check_backend(kind(), max_examples=2, properties=DRAWN, seed=seed)


def message_of(kind):
    with pytest.raises(AssertionError) as caught:
        check_backend(kind(), properties=[BROKEN[kind]])
    return str(caught.value)


def code_of(message):
    return "\n".join(line[4:] for line in message.partition("to repeat it:\n")[2].splitlines())


def test_a_failure_says_what_where_and_how_to_repeat_it():
    message = message_of(GradientMasked)
    assert message.startswith("GradientMasked violates gradient_passes_straight_through: The gradient of")
    assert "\n  equation 6: docs/spec/gradient.md\n" in message
    assert "smallest counterexample: Operation(weight=<[0.0], float32, contiguous>" in message
    assert "\n  got:      [0.0], float32\n" in message
    assert "\n  expected: [-2.0], float32\n" in message


def test_the_same_seed_gives_the_same_cases():
    def drawn(seed):
        seen = []

        class Watched(NumpyBackend):
            def sparsify(self, weight, threshold, method, channel_axis):
                seen.append((weight.tobytes(), threshold, channel_axis))
                return super().sparsify(weight, threshold, method, channel_axis)

        check_backend(Watched(), max_examples=20, properties=["forward_equals_the_reference"], seed=seed)
        return seen

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) == drawn(None)


def test_what_a_backend_raises_is_a_failure():
    class Raises(NumpyBackend):
        def vjp(self, weight, threshold, method, channel_axis, cotangent):
            raise NotImplementedError("no gradient yet")

    with pytest.raises(AssertionError, match=r"got:      NotImplementedError: no gradient yet\n  expected: an answer"):
        check_backend(Raises(), properties=["gradient_is_masked"])


def test_an_answer_that_changes_is_a_failure():
    class Unsteady(NumpyBackend):
        name = "unsteady"
        calls = 0

        def sparsify(self, weight, threshold, method, channel_axis):
            self.calls += 1
            return super().sparsify(weight, threshold, method, channel_axis) + (self.calls == 30)

    with pytest.raises(AssertionError, match="unsteady violates"):
        check_backend(Unsteady(), properties=["forward_equals_the_reference"])


def test_what_a_backend_declares_is_not_asked():
    class Flushing(NumpyBackend):
        flushes_subnormals = True
        checks_weights = False

    outcomes = {r.chosen.name: r.outcome for r in check(Flushing(), max_examples=1)}
    assert [name for name, outcome in outcomes.items() if outcome == "not asked"] == [
        "thresholds_keep_subnormals",
        "forward_keeps_subnormals",
        "forward_rejects_what_is_not_finite",
    ]


def test_a_backend_is_not_asked_about_what_it_lacks():
    seen = set()

    class Some(NumpyBackend):
        lacks = frozenset({"power", "n:m", "decay"})

        def sparsify(self, weight, threshold, method, channel_axis):
            seen.update(dataclasses.astuple(get_method(method))[2:6])
            return super().sparsify(weight, threshold, method, channel_axis)

    results = check(Some(), max_examples=30)
    assert [r.failure for r in results if r.failure] == []
    assert {r.chosen.name: r.excuse for r in results if r.outcome == "not asked"} == {
        "thresholds_of_groups_are_their_largest": "that it lacks n:m",
        "forward_is_the_power_formula": "that it lacks power",
        "forward_keeps_the_largest_of_each_group": "that it lacks n:m",
        "gradient_decays": "that it lacks decay",
    }
    assert not seen & Some.lacks
    assert {"soft", "hard", "least_squares", "scaled", "layer"} <= seen


def test_a_backend_that_flushes_is_asked_about_normal_numbers():
    tiny = 2.0**-126

    class Flushing(Textbook):
        flushes_subnormals = True

        def from_numpy(self, array):
            return np.where(array == 0, array, np.where(np.abs(array) < tiny, array.dtype.type(0), array))

        def finished(self, result, weight):
            return super().finished(np.where(np.abs(result) < tiny, result.dtype.type(0), result), weight)

    assert [r.failure for r in check(Flushing(), max_examples=40) if r.failure] == []


@pytest.mark.parametrize("dtypes", [("float32",), ("float64",), ("float16", "bfloat16")], ids=str)
def test_a_backend_is_asked_about_its_dtypes_alone(dtypes):
    seen = set()

    class Some(NumpyBackend):
        def from_numpy(self, array):
            seen.add(array.dtype.name)
            return array

    backend = Some()
    backend.dtypes = dtypes
    check_backend(backend, max_examples=15)
    assert seen == set(dtypes)


def test_properties_are_named_after_what_they_say():
    names = [p.name for p in PROPERTIES]
    assert len(set(names)) == len(names)
    assert all(p.statement.endswith(".") for p in PROPERTIES)
    assert [p.name for p in select(names[::-1])] == names


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": NumpyBackend}, TypeError, "backend must be a Backend, got .*; make an instance of it"),
        ({"backend": object()}, TypeError, "it lacks name, dtypes, from_numpy"),
        ({"max_examples": 0}, ValueError, "max_examples must be an integer of 1 or more, got 0"),
        ({"properties": ["forward_is_fast"]}, ValueError, r"must be some of .*, got \['forward_is_fast'\]"),
        ({"properties": []}, ValueError, "got none"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {"backend": NumpyBackend(), **arguments}
    with pytest.raises(error, match=message):
        check_backend(given.pop("backend"), **given)


def test_unknown_dtypes():
    backend = NumpyBackend()
    backend.dtypes = ("float32", "int8")
    with pytest.raises(ValueError, match=r"backend.dtypes must be some of float16, .*, got \('float32', 'int8'\)"):
        check_backend(backend)


def test_registered_backends():
    assert list_backends()["torch"] == "st3_torch.conformance:Backend"
    assert find_backend("numpy").name == "numpy"
    assert find_backend("tests.conformance.textbook:Textbook").name == "textbook"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("numpy:", ValueError, "must be package.module:Class, got 'numpy:'"),
        ("jsx", ValueError, "must be package.module:Class or one of .*numpy.*, got 'jsx'"),
        ("st3core.nothing:Backend", ValueError, "No module named 'st3core.nothing'"),
        ("st3core.conformance:Nothing", ValueError, "Nothing"),
        ("st3core:Method", TypeError, "missing 1 required positional argument"),
        ("builtins:dict", TypeError, "it lacks name"),
    ],
)
def test_backends_that_cannot_be_found(name, error, message):
    with pytest.raises(error, match=message):
        find_backend(name)


def test_arrays_of_the_snippets():
    array = from_bits("bfloat16", (2, 2), [0x3F80, 0x8000, 0, 0x4000])
    assert array.tolist() == [[1.0, -0.0], [0.0, 2.0]]
    for layout, strides in (("contiguous", (4, 2)), ("transposed", (2, 4)), ("strided", (8, 4))):
        made = laid_out(array, layout)
        assert (made.tobytes(), made.strides) == (array.tobytes(), strides)


def command(*arguments, cwd=ROOT):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return subprocess.run(
        [sys.executable, "-m", "st3core.conformance", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_the_command_line_accepts(tmp_path):
    some = (
        "--properties",
        "forward_has_positive_zeros,gradient_passes_straight_through",
        "--max-examples",
        "20",
        "--seed",
        "3",
    )
    run = command("st3core.conformance:NumpyBackend", *some, "--json", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"^passed    forward_has_positive_zeros +equation 3  +20 examples, .* s$", run.stdout, re.MULTILINE
    )
    assert re.search(r"^numpy: 2 passed, 0 failed, 0 not asked; 40 examples in \d+ s$", run.stdout, re.MULTILINE)
    assert '"outcome": "passed"' in (tmp_path / "out.json").read_text()


def test_the_command_line_rejects():
    run = command("tests.conformance.broken:GradientMasked", "--properties", "gradient_passes_straight_through")
    assert run.returncode == 1
    assert "GradientMasked violates gradient_passes_straight_through" in run.stdout
    assert "0 passed, 1 failed, 0 not asked" in run.stdout


def test_the_command_line_finds_a_file_of_the_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from st3core.conformance import NumpyBackend as Mine\n")
    assert command("mine:Mine", "--max-examples", "1", cwd=tmp_path).returncode == 0


def test_the_command_line_says_what_is_wrong():
    run = command("nowhere")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("ValueError: conformance: backend must be package.module:Class or one of")


def test_a_backend_that_cannot_be_made_is_no_backend_that_fails(tmp_path):
    (tmp_path / "broken.py").write_text(
        "class NoDevice:\n    def __init__(self):\n        raise RuntimeError('no device')\n"
    )
    run = command("broken:NoDevice", cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "RuntimeError: no device\n")


def test_results_need_a_folder(tmp_path):
    run = command("numpy", "--json", str(tmp_path / "nowhere" / "out.json"))
    assert run.returncode == 2
    assert "argument --json: there is no folder" in run.stderr


def test_the_command_line_lists():
    run = command("--list")
    assert run.returncode == 0
    assert all(name in run.stdout for name in [*(p.name for p in PROPERTIES), "st3_torch.conformance:Backend"])


SUITE = """
from st3core.conformance import BackendConformance, NumpyBackend

class TestMine(BackendConformance):
    backend = NumpyBackend()
    max_examples = 3

class Flushing(NumpyBackend):
    flushes_subnormals = True

class TestFlushing(BackendConformance):
    backend = Flushing()
    max_examples = 1
"""


def test_the_test_class_and_the_plugin(tmp_path):
    (tmp_path / "test_mine.py").write_text(SUITE)
    plugin = ("-p", "st3core.conformance.pytest_plugin", "--conformance-max-examples", "2", "--conformance-seed", "5")
    for options in ((), plugin):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert f"{2 * len(PROPERTIES) - 2} passed, 2 skipped" in run.stdout
