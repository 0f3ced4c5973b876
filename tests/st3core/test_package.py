import subprocess
import sys

import st3core


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_all_names_what_is_public():
    assert set(st3core.__all__) == {
        "Method",
        "PolynomialSchedule",
        "__version__",
        "backward",
        "find_thresholds",
        "get_method",
        "least_squares_scale",
        "sparsify",
    }
    assert all(hasattr(st3core, name) for name in st3core.__all__)


def test_the_core_loads_no_framework():
    loaded = run("import st3core, sys; print(sorted({m.partition('.')[0] for m in sys.modules}))")
    for name in ("torch", "tensorflow", "keras", "jax", "matplotlib", "rich", "sklearn"):
        assert f"'{name}'" not in loaded


def test_the_core_works_where_no_framework_is_installed():
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow', 'keras', 'jax', 'matplotlib', 'rich'): sys.modules[name] = None\n"
        "import numpy, st3core\n"
        "w = numpy.arange(1.0, 5.0)\n"
        "print(st3core.sparsify(w, st3core.find_thresholds([w], 0.5)[0], 'hard_ste').tolist())"
    )
    assert run(code) == "[0.0, 0.0, 3.0, 4.0]"
