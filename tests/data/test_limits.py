"""Memory stays bounded whatever the size of the set: FFHQ's 70,000 images of 64x64, prepared and read."""

import pytest
import tiny

SCRIPT = """
import pathlib, sys
import numpy as np
import tiny
from fdm_jax.data import builders, raw
from fdm_jax.data.opening import open_source
from fdm_jax.data.pipeline import make_batches

class Noise:
    labels = None
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    def __len__(self):
        return 70_000
    def read(self, i):
        image = self.noise.copy()
        image[:2, 0, 0] = divmod(i % 65536, 256)
        return image

data_dir = pathlib.Path(sys.argv[1])
data = raw.RawData({"train": Noise()}, 64, 3, 0, (), lambda: "")
folder = builders.prepare(data_dir, "folder/noise", lambda: builders.Folder(
    raw=data, metadata={}, config="noise", data_dir=str(data_dir)))
source = open_source(folder)
batches = make_batches(source, batch_size=256, seed=0)
for _ in range(300):
    next(batches)
first, *_, last = source.read([0, 1, 65535])["image"]
assert len(source) == 70_000 and tuple(last[:2, 0, 0]) == (255, 255) and not first[:2, 0, 0].any()
print(tiny.peak_memory())
"""


@pytest.mark.slow
def test_memory_of_preparing_and_reading_a_large_set(tmp_path):
    done = tiny.run_script(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 2**26 < int(done.stdout) < 2**30
