"""One training on one device and again on two, in a process of its own: ``python -m tests.st3_keras.distributed KIND``."""

import json
import os
import sys

KIND = sys.argv[1]
if KIND in ("data_parallel", "model_parallel"):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
from keras import layers

from st3_keras import PolynomialSchedule, Sparsifier


def make():
    keras.utils.set_random_seed(0)
    penalty = keras.regularizers.L2(1e-3)
    hidden = layers.Dense(16, activation="relu", kernel_regularizer=penalty)
    model = keras.Sequential([keras.Input((8,)), hidden, layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def train(model):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((64, 8), np.float32), generator.standard_normal((64, 4), np.float32)
    sp = Sparsifier(model, PolynomialSchedule(0.8, begin_step=0, end_step=6))
    history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, callbacks=[sp], verbose=0).history
    return {"loss": history["loss"], "thresholds": list(sp.thresholds.values()), "sparsity": sp.sparsity}


def distributed():
    if KIND == "mirrored":
        import tensorflow as tf

        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            return train(make())
    import jax

    assert len(jax.devices()) == 2
    if KIND == "data_parallel":
        distribution = keras.distribution.DataParallel()
    else:
        mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], jax.devices())
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*kernel"] = (None, "model")
        distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    model = make()
    if KIND == "model_parallel":
        assert len(model.trainable_variables[0].value.sharding.device_set) == 2
    return train(model)


if __name__ == "__main__":
    if KIND == "mirrored":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    print(json.dumps([train(make()), distributed()]))
