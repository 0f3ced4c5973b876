from st3_jax.conformance import Backend
from st3core.conformance import BackendConformance


class TestJax(BackendConformance):
    backend = Backend()
    max_examples = 5  # compiles anew for almost every case; `make conformance` asks more
