"""Load what was saved and exported where this library does not exist: ``python tests/st3_keras/deployed.py FOLDER``."""

import json
import sys
from pathlib import Path

import numpy as np


def saved_model(path, x):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)  # it owns the variables
    return loaded.serve(tf.constant(x)).numpy()


def litert(path, x):
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(path)
    (output,) = interpreter.get_signature_runner()(**{"x": x}).values()
    return output


def torch_program(path, x):
    import torch

    return torch.export.load(path).module()(torch.from_numpy(x)).detach().numpy()


READERS = {"saved_model": saved_model, "model.tflite": litert, "model.pt2": torch_program}


def kernels(model):
    """The kernel of every dense layer, by the layer's path: what ``quantize`` changes in these networks."""
    import keras

    known = (keras.layers.Dense, keras.layers.EinsumDense)
    held = [layer for layer in model._flatten_layers() if isinstance(layer, known)]
    return {layer.path: np.array(keras.ops.convert_to_numpy(layer._kernel)) for layer in held}


def main(folder):
    import keras

    with np.load(folder / "outputs.npz") as file:
        x = file["inputs"]
    model = keras.models.load_model(folder / "final.keras")
    facts = {"loaded": model.predict(x, verbose=0).tolist()}
    written = [name for name in READERS if (folder / name).exists()]
    facts["exported"] = {name: READERS[name](str(folder / name), x).tolist() for name in written}
    before = kernels(model)
    model.quantize("int8")
    after = kernels(model)
    facts["dtypes"] = sorted({k.dtype.name for k in after.values()})
    facts["zeros"] = [int((before[path] == 0).sum()) for path in before]
    facts["kept"] = [int(((before[path] == 0) & (after[path] == 0)).sum()) for path in before]
    facts["quantized"] = model.predict(x, verbose=0).tolist()
    print(json.dumps(facts))


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("st3_keras", "st3core")))  # None: importing them raises ImportError
    main(Path(sys.argv[1]))
