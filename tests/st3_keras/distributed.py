"""One training on one device and again on two, in a process of its own: ``python -m tests.st3_keras.distributed KIND``."""

import hashlib
import json
import os
import sys
from tempfile import TemporaryDirectory

KIND = sys.argv[-1]
if KIND in ("data_parallel", "model_parallel"):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
from keras import layers

from st3_keras import PolynomialSchedule, Sparsifier


def make(seed=0):
    keras.utils.set_random_seed(seed)
    penalty = keras.regularizers.L2(1e-3)
    hidden = layers.Dense(16, activation="relu", kernel_regularizer=penalty)
    model = keras.Sequential([keras.Input((8,)), hidden, layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, use_ema=KIND == "mirrored_average", ema_momentum=0.9), "mse")
    return model


GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.standard_normal((64, 8), np.float32), GENERATOR.standard_normal((64, 4), np.float32)
SCHEDULE = PolynomialSchedule(0.8, begin_step=0, end_step=6)


def train(model):
    sp = Sparsifier(model, SCHEDULE)
    swap = [keras.callbacks.SwapEMAWeights()] if KIND == "mirrored_average" else []
    options = {"batch_size": 16, "epochs": 3, "shuffle": False, "verbose": 0, "validation_data": (X, Y)}
    history = model.fit(X, Y, callbacks=[sp, *swap], **options).history
    losses = history["loss"] + history["val_loss"]
    return {"loss": losses, "thresholds": list(sp.thresholds.values()), "sparsity": sp.sparsity}


def train_one_of_two(rank, file):
    """A process with half of each batch; the first prints what came out, with a digest of each process's weights."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = make(seed=rank)  # another one in the second process, until it is given the first one's weights
    parallel = DistributedDataParallel(model)
    sp = Sparsifier(model, SCHEDULE, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    variables = model.trainable_variables
    losses = []
    for start in [*range(8 * rank, 64, 16)] * 3:
        outputs = parallel(torch.from_numpy(X[start : start + 8]))
        loss = keras.ops.mean((outputs - torch.from_numpy(Y[start : start + 8])) ** 2) + sum(model.losses)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            sp.optimizer.apply([v.value.grad for v in variables], variables)
        sp.step()
        losses.append(loss.item())
    held = [*variables, *sp.optimizer.variables]
    digest = hashlib.sha256(b"".join(v.value.detach().numpy().tobytes() for v in held)).hexdigest()
    found = [None, None]
    distributed.all_gather_object(found, (losses, digest))
    if rank == 0:
        loss = np.mean([losses for losses, _ in found], axis=0).reshape(3, 4).mean(axis=1).tolist()
        result = {"loss": loss, "thresholds": list(sp.thresholds.values()), "sparsity": sp.sparsity}
        one = train(make())
        one["loss"] = one["loss"][:3]  # without those of evaluations
        print(json.dumps([one, {**result, "digests": [digest for _, digest in found]}]))
    sys.stdout.flush()
    distributed.barrier()
    os._exit(0)  # PyTorch may wait for ever in taking a process group down whose other end has left


def distributed():
    if KIND.startswith("mirrored"):
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
    if KIND.startswith("mirrored"):
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    if KIND == "data_parallel_torch":
        import torch

        with TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train_one_of_two, (f"{folder}/meeting",), nprocs=2)
    else:
        print(json.dumps([train(make()), distributed()]))
