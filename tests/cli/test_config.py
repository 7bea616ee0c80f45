"""Which file ``--config`` names, and what its fields come to."""

import argparse
import shutil

import pytest
import tiny

from fdm_jax.cli.config import load
from fdm_jax.errors import UserError
from fdm_jax.experiment import Experiment


def test_more_columns_than_classes():
    """Are the classes; a grid that is too large keeps nobody from loading the model."""
    args = argparse.Namespace(config=tiny.CONFIG, overrides=["--config.samples.columns=1000000"])
    assert Experiment.from_config(load(args)).sample_grid() == (8, 10)
    args.overrides.append("--config.data.class_conditional=False")
    with pytest.raises(UserError, match="samples.rows = 8 times 1000000 columns must be at most 10,000"):
        Experiment.from_config(load(args)).sample_grid()


def test_configurations_of_the_package_from_another_folder(tmp_path, monkeypatch):
    """A file of the user's comes before one of the same name."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(config="configs/ve.py:digits", overrides=["--config.seed=3"])
    config = load(args)
    assert (config.family.name, config.data.source, config.seed) == ("ve", "digits", 3)
    (tmp_path / "configs").mkdir()
    shutil.copy(f"{tiny.ROOT}/configs/edm.py", "configs/ve.py")
    assert load(args).family.name == "edm"
