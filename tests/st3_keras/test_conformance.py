from st3_keras.conformance import Backend
from st3core.conformance import BackendConformance
from tests.st3_keras.networks import BACKEND


class TestKeras(BackendConformance):
    backend = Backend()
    max_examples = 4 if BACKEND == "jax" else 10  # JAX compiles anew for almost every case
