"""Images in, shuffled batches out: TFDS builders, zips and folders, and the Grain pipeline; no TensorFlow."""
