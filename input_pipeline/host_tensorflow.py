"""TensorFlow for the host alone: the accelerators are JAX's.

Whatever uses TensorFlow imports it from here. The import takes seconds, so it happens where
something is read or written with TensorFlow, and not before.
"""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

__all__ = ["tf"]
