"""Small image archives written by hand, and one prepared copy of the digits for all tests of a session."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from encoded import png


class Archives:
    """Writes the same files as a zip and as a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def zip(self, files: dict[str, bytes], name: str = "a.zip") -> str:
        with zipfile.ZipFile(self.folder / name, "w") as out:
            for file, data in files.items():
                out.writestr(file, data)
        return str(self.folder / name)

    def dir(self, files: dict[str, bytes], name: str = "a") -> str:
        for file, data in files.items():
            path = self.folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(self.folder / name)


@pytest.fixture
def archives(tmp_path):
    return Archives(tmp_path)


@pytest.fixture(scope="session")
def pixels():
    return np.random.RandomState(0).randint(0, 256, (7, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def files(pixels):
    """Seven RGB images of 4x4 in EDM's layout, with labels listed in another order than the files."""
    names = [f"0000{i // 4}/img{i:08d}.png" for i in range(7)]
    labels = [[names[i], i % 3] for i in reversed(range(7))]
    files = {name: png(image) for name, image in zip(names, pixels, strict=True)}
    return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))
