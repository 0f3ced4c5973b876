from st3_keras.conformance import Backend
from st3core.conformance import BackendConformance
from tests.st3_keras.networks import BACKEND


class TestKeras(BackendConformance):
    backend = Backend()
    max_examples = {"jax": 3, "tensorflow": 6, "torch": 10}[BACKEND]  # JAX compiles anew for almost every case
