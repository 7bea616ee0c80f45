"""Which file ``--config`` names."""

import argparse
import shutil

import tiny

from fdm_jax.cli.config import load


def test_configurations_of_the_package_from_another_folder(tmp_path, monkeypatch):
    """A file of the user's comes before one of the same name."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(config="configs/ve.py:digits", overrides=["--config.seed=3"])
    config = load(args)
    assert (config.family.name, config.data.source, config.seed) == ("ve", "digits", 3)
    (tmp_path / "configs").mkdir()
    shutil.copy(f"{tiny.ROOT}/configs/edm.py", "configs/ve.py")
    assert load(args).family.name == "edm"
