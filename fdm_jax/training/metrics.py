"""The rows of ``metrics.jsonl``, and what they say of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# By which checkpoints are ranked, lower is better; of those that the newest evaluation has, the first.
RANKING = ("eval/fid", "eval/frechet_distance", "val/error")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; what is none is left out: a last line that a crash cut short, or another program's."""
    rows = []
    if path.exists():
        for line in path.read_bytes().decode(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an evaluation."""
    return any(name in row for name in RANKING)


def ranking_figures(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> figure that checkpoints are ranked by: of one kind, and none that was not finite."""
    evaluations = [row for row in rows if is_evaluation(row)]
    name = next((name for name in RANKING if evaluations and name in evaluations[-1]), "")
    return {row["step"]: row[name] for row in evaluations if row.get(name) is not None}
