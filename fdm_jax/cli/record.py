"""Results that arrive one after the other, in a file or folder from which the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdm_jax.errors import UserError
from fdm_jax.whole_files import append_text, make_folder, write_text, write_whole

SETTINGS = "settings.json"

# Names in settings of what has a checksum there as well.  A run may be moved, and is called otherwise on other hosts.
PLACES = ("workdir", "guide", "images", "ref")


def read_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the results in a folder depend on, as its ``settings.json`` says; None without one.

    ``settings`` are those that one would write there: with none of their names, the file is another program's.

    Raises:
      UserError: the file is another program's, or cannot be read.
    """
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & settings.keys():
        raise UserError(f"{path} is there already and holds no settings of results: give another --out.")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a file for people too, whole or not at all; its folder is made."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def but_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decide results, as they are read back."""
    return {name: value for name, value in json.loads(json.dumps(dict(settings))).items() if name not in PLACES}


def differing(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings that make results others; one that is not there is like None."""
    before, settings = but_places(before), but_places(settings)
    return sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))


def made_otherwise(place: Path, what: str, different: Sequence[str]) -> UserError:
    """What to say where ``what`` is there already, made with other settings of these names."""
    names = ", ".join(different)
    return UserError(f"{place} holds {what} made with another {names}: delete it, or give another --out.")


def parse_record(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of a :class:`Record`'s file, without a last line that a kill cut short.

    Raises:
      ValueError, KeyError, TypeError: it is something else.
    """
    whole, _, _ = text.rpartition("\n")
    first, *rows = [json.loads(line) for line in whole.splitlines()]
    if not isinstance(first["settings"], dict) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds something else")
    return first["settings"], rows


class Record:
    """A file of JSON lines: the settings first, then a row for each result.

    Args:
      path: of the file; its folder is made.
      settings: what the results depend on.

    Attributes:
      rows: those of earlier runs and those added since.

    Raises:
      UserError: the file holds results of other settings, is something else, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        try:
            make_folder(path.parent)
            if path.is_file() and (text := path.read_text()):  # devices are written only: /dev/stdout, a pipe
                self._read(text, settings)
            else:
                self._begin(settings)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be written: {why}; give another --out.") from error

    def _begin(self, settings: Mapping[str, Any]) -> None:
        write_text(self.path, json.dumps({"settings": dict(settings)}) + "\n")

    def _read(self, text: str, settings: Mapping[str, Any]) -> None:
        try:
            before, self.rows = parse_record(text)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is there already and is not a file of results: give another --out."
            ) from error
        different = differing(before, settings)
        if different and not self.rows:  # that command failed before its first result
            self._begin(settings)
        elif different:
            raise made_otherwise(self.path, "results", different)
        elif not text.endswith("\n"):
            write_text(self.path, text[: text.rindex("\n") + 1])

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append results."""
        append_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.rows += [dict(row) for row in rows]
