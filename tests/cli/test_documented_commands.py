"""The commands that README and help texts show are commands that the program takes."""

import pathlib
import re
import shlex

import pytest

from fdm_jax.cli.main import parse
from fdm_jax.defaults import default_config, field_names

ROOT = pathlib.Path(__file__).parents[2]


def shown():
    """(file, command) of every indented line that begins with fdm; what stands behind three spaces or # is a remark."""
    for path in [ROOT / "README.md", *sorted((ROOT / "fdm_jax" / "cli").glob("*.py"))]:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if match := re.match(r"\s{2,}fdm ([a-z].*)", line):
                yield path.name, re.sub(r"\s{3,}[^-\s].*", "", match[1].split(" #")[0])


@pytest.mark.parametrize(("file", "command"), sorted(set(shown())))
def test_a_command_as_shown(file, command):
    fields = {part.removeprefix("--config.").partition("=")[0] for part in parse(shlex.split(command)).overrides}
    assert fields <= set(field_names(default_config()))


def test_they_are_found():
    assert len(list(shown())) > 60
