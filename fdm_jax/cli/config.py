"""``--config=FILE.py:NAME`` with ``--config.x.y=value`` overrides."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import fdm_jax
from fdm_jax.defaults import default_config, field_names, flatten
from fdm_jax.errors import UserError, nearest

# The only tuple of texts; all others are of whole numbers.
NAMES = "data.class_names"


def add_config_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--config``; what follows it as ``--config.x.y=value`` is collected into ``args.overrides``."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE.py:NAME",
        help="a configuration: a file of yours, or configs/edm.py:digits and others that come with fdm_jax; set single "
        "fields with --config.FIELD=VALUE, for example --config.train.batch_size=256",
    )


def load(args: argparse.Namespace) -> ConfigDict:
    """The configuration that ``args.config`` and ``args.overrides`` name, locked.

    Raises:
      UserError: no such file, name or field, a file with other fields, or a value that is missing or of the wrong type.
    """
    path, _, name = args.config.partition(":")
    config = _load_file(path, name)
    _check_fields(config, path)
    config.lock()
    overrides, known = _pairs(args.overrides), field_names(config)
    for field, _ in overrides:
        if field not in known:
            raise UserError(f"There is no configuration field {field!r}: {nearest(field, known)}")
    values = flags.FlagValues()
    argv = ["fdm", *(f"--config.{field}={value}" for field, value in overrides)]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        if named := [pair for pair in overrides if f"config.{pair[0]}" in str(error)]:
            # The longest: channel_mult is part of channel_mult_emb, whichever is meant.
            raise _wrong_type(config, *max(named, key=lambda pair: len(pair[0]))) from error
        raise UserError(f"The configuration cannot be changed as asked: {error}") from error
    _check_values(values.config)
    return values.config


def _check_fields(config: ConfigDict, path: str) -> None:
    """Refuse a file's field that is none: nothing would read it, and the run that it was saved with could not be loaded."""
    known = field_names(default_config())
    there = [name for name in field_names(config) if name in known or not name.startswith("family.")]
    for name in there:
        if name not in known:
            raise UserError(
                f"The configuration file {path!r} has a field {name!r}, which does not exist: {nearest(name, known)}"
            )
    for name in known:
        if name not in there:
            raise UserError(
                f"The configuration file {path!r} has no field {name!r}: let get_config begin with one of "
                "fdm_jax.defaults, recipe('cifar10') or default_config()."
            )


def _check_values(config: ConfigDict) -> None:
    """Refuse what a ConfigDict lets pass: None in any field, and anything in a tuple."""
    defaults = flatten(default_config().to_dict())
    for field, value in flatten(config.to_dict()).items():
        if value is None and defaults.get(field) is not None:
            raise UserError(f"{field} has no value, and needs one such as {defaults[field]}.")
        if isinstance(value, tuple) and not all(map(_is_name if field == NAMES else _is_whole, value)):
            raise _wrong_type(config, field, str(value))


def _is_whole(value: object) -> bool:
    return type(value) is int


def _is_name(value: object) -> bool:
    # A comma: cat,dog without quotation marks would come here as one name.
    return isinstance(value, str) and value != "" and "," not in value


def _find(path: str) -> Path:
    """The user's file, or the one of that name that comes with the package: configs/edm.py, from whatever folder."""
    ours = {f"configs/{file.name}": file for file in Path(fdm_jax.__file__).with_name("configs").glob("*.py")}
    file = Path(path)
    if not file.is_file():
        file = ours.get(file.as_posix(), file)
    if not file.is_file():
        where = "" if file.is_absolute() else f" in {Path.cwd()}, nor in fdm_jax"
        raise UserError(f"There is no configuration file {path!r}{where}: {nearest(path, ours)}")
    return file


def _load_file(path: str, name: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("fdm_config", _find(path))
    if spec is None or spec.loader is None:
        raise UserError(f"The configuration file {path!r} must be a Python file, with a name ending in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(name) if name else module.get_config()
    except UserError:
        raise
    except Exception as error:  # somebody's own file: whatever is wrong in it, say where
        raise UserError(f"The configuration file {path!r} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config in {path!r} must return a ConfigDict, and returned {type(config).__name__}.")
    return config


def _pairs(overrides: list[str]) -> list[tuple[str, str]]:
    """["--config.a=1", "--config.b", "2"] -> [("a", "1"), ("b", "2")]"""
    pairs, rest = [], list(overrides)
    while rest:
        field, equals, value = rest.pop(0).removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--config.{field} needs a value: --config.{field}=VALUE.")
            value = rest.pop(0)
        pairs.append((field, value))
    # Of several values of one field the last counts; config_flags would join lists.
    return list(dict(pairs).items())


def _wrong_type(config: ConfigDict, field: str, value: str) -> UserError:
    node: Any = config
    *parents, leaf = field.split(".")
    for part in parents:
        node = node[part]
    kinds = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "names such as ('cat', 'dog')" if field == NAMES else "a list of whole numbers such as (1, 2, 2)",
    }
    return UserError(
        f"{field} must be {kinds.get(node.get_type(leaf), node.get_type(leaf).__name__)}, and is {value!r}."
    )
