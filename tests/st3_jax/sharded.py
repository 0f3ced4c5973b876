"""Run in a process of its own: parameters spread over four CPU devices."""

import dataclasses
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from st3_jax import PolynomialSchedule, Sparsifier, shortlist, weights
from st3_jax.search import find_neighbours
from st3_jax.weights import Weights
from st3core import get_method

SCHEDULES = {
    0.9: PolynomialSchedule(0.9, begin_step=0, end_step=3),
    0.5: PolynomialSchedule(0.5, begin_step=0, end_step=3),
}
LAYER = dataclasses.replace(get_method("st3"), name="by layer", scope="layer")
SPECS = {
    "first": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
    "second": {"kernel": PartitionSpec("model", None), "bias": PartitionSpec()},
}
"""Cut along the output channels, and across them."""


def made_params():
    """Large enough for their rows to be folded."""
    generator = np.random.default_rng(0)
    shapes = {"first": (96, 128), "second": (128, 96)}
    return {
        name: {"kernel": jnp.asarray(generator.standard_normal(shape), np.float32), "bias": jnp.zeros(shape[1])}
        for name, shape in shapes.items()
    }


def run(sparsifier, params):
    state = sparsifier.init(params)
    for _ in range(2):
        state = sparsifier.update(params, state)
    return state, sparsifier.apply(params, state)


def assert_same_bits(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_nothing_gathered(compiled):
    text = compiled.as_text()
    assert "all-reduce" in text
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert name not in text


def check_shortlist():
    """Searches whose forecasts are good, bad, and next to ties, on shards as on one device."""
    weights._LARGE, shortlist.SMALL = 0, 100
    specs, method = (SPECS["first"]["kernel"], SPECS["second"]["kernel"]), get_method("st3_sigma")
    arrays = [np.array(layer["kernel"]) for layer in made_params().values()]
    arrays[1][:40] = arrays[1][0, 0]

    def search(arrays, hint, mesh_axes=None):
        return find_neighbours(Weights(arrays, method, mesh_axes), *hint)

    mesh = Mesh(np.array(jax.devices()), ("model",))
    shards = jax.device_put(arrays, [NamedSharding(mesh, spec) for spec in specs])
    with jax.enable_x64(True):
        axes = [((), ("model",)), (("model",), ())]
        mapped = jax.shard_map(
            lambda arrays, hint: search(arrays, hint, axes),
            mesh=mesh,
            in_specs=(list(specs), PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        whole, hint = jax.jit(search), jnp.array([0, 0, 0])
        spread = [jax.jit(own).lower(shards, hint).compile() for own in (search, mapped)]
        for compiled in spread:
            assert_nothing_gathered(compiled)
        for rank in range(0, sum(array.size for array in arrays), 1999):
            key = int(whole(arrays, jnp.array([rank, 0, 0]))[0])
            for off in (0, -50, 3000):
                hint = jnp.array([rank, key + off, 16])
                for compiled in spread:
                    assert_same_bits(compiled(shards, hint), whole(arrays, hint))
                assert int(whole(arrays, hint)[0]) == key


def check(name):
    method = LAYER if name == "layer" else get_method(name)
    schedule, params = SCHEDULES[0.5 if method.scope == "n:m" else 0.9], made_params()
    sparsifier = Sparsifier(schedule, method)
    expected = jax.jit(lambda p: run(sparsifier, p))(params)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    spread = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    shards = jax.device_put(params, spread)

    compiled = jax.jit(lambda p: run(sparsifier, p)).lower(shards).compile()
    assert_nothing_gathered(compiled)
    found = compiled(shards)
    assert_same_bits(found, expected)
    assert not found[1]["first"]["kernel"].sharding.is_fully_replicated

    rules = {"*/kernel": PartitionSpec(None, "model"), "second/kernel": PartitionSpec("model")}
    if method.rescale == "least_squares":
        return
    local = Sparsifier(schedule, method, sharded=rules)
    mapped = jax.shard_map(lambda p: run(local, p), mesh=mesh, in_specs=(SPECS,), out_specs=(PartitionSpec(), SPECS))
    assert_same_bits(jax.jit(mapped)(shards), expected)
    whole = PartitionSpec()
    measured = jax.shard_map(local.sparsity, mesh=mesh, in_specs=(SPECS, whole), out_specs=whole)
    assert_same_bits(jax.jit(measured)(shards, expected[0]), jax.jit(sparsifier.sparsity)(params, expected[0]))


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    for name in sys.argv[1:]:
        check_shortlist() if name == "shortlist" else check(name)
