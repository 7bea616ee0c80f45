"""Make one HTML page that sets runs beside each other: configuration, results, curves, samples.

  fdm report --workdir=runs/digits-fdm --workdir=runs/digits-plain --out=report.html
  fdm report --workdir=runs/a --workdir=runs/b --sweep=sweep-a --sweep=sweep-b --out=report.html

The page needs nothing but itself: pictures are inside it, and there are no scripts.  It shows what the workdirs hold:
the metrics of training, sample grids, results of `fdm evaluate` and `fdm likelihood`, and of `fdm sweep` where the
sweep lies in a folder of the workdir whose name begins with "sweep" or is named by --sweep.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_jax.cli.places import check_out, path_argument, place_argument
from fdm_jax.cli.record import parse_record
from fdm_jax.errors import UserError
from fdm_jax.whole_files import is_remote, resolved, write_whole

if TYPE_CHECKING:
    from fdm_jax.experiment import Experiment
    from fdm_jax.networks import SongUNet
    from fdm_jax.reporting.runs import Likelihood, Run, Sweep

HELP = "make an HTML page that compares runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        required=True,
        action="append",
        type=place_argument,
        metavar="DIR",
        help="workdir of a run; once for each",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        type=path_argument,
        metavar="DIR",
        help="a folder that `fdm sweep` made; repeatable",
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="FILE.html", help="the page")


def run(args: argparse.Namespace) -> int:
    _check_out(args.out)
    _check_workdirs(args.workdir)

    from fdm_jax.reporting.page import page

    runs = read_runs(args.workdir, args.sweep)
    content = page(runs, datetime.datetime.now().astimezone()).encode("utf-8", "replace")
    write_whole(args.out, lambda temporary: temporary.write_bytes(content))
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"{args.out}: {count}, {len(content) / 1e6:.1f} MB; open it in a browser.")
    return 0


def _check_out(out: Path) -> None:
    check_out(out, ".html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: the folder {out.parent} is not open for writing.")


def _check_workdirs(workdirs: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for workdir in workdirs:
        if resolved(workdir) in seen:
            raise UserError(f"The workdir {workdir} is named twice: name each run once.")
        seen.add(resolved(workdir))


# --- Reading ---


def read_runs(workdirs: Sequence[Path], sweeps: Sequence[Path] = ()) -> list[Run]:
    """All there is to report of the runs.

    Args:
      workdirs: of the runs.
      sweeps: folders of `fdm sweep` outside the workdirs.

    Raises:
      UserError: no workdir, nothing in it, a sweep of another run, or a file that cannot be read.
    """
    runs = [read_run(workdir, name) for workdir, name in zip(workdirs, distinct_names(workdirs), strict=True)]
    _deal_sweeps(runs, workdirs, sweeps)
    for one, workdir in zip(runs, workdirs, strict=True):
        if not (one.rows or one.evaluations or one.likelihoods or one.sweeps):
            raise UserError(f"{workdir} holds no metrics yet: train or evaluate the run first.")
    return runs


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last folder of each path, with so many before it as it takes to tell them apart."""
    parts = [(path if is_remote(path) else Path(os.path.abspath(path))).parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        longer = [
            min(length + (names.count(name) > 1), len(each))
            for name, each, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def read_run(workdir: Path, name: str) -> Run:
    """One workdir, without its sweeps.

    Raises:
      UserError: it is none, or a file in it cannot be read.
    """
    from fdm_jax.reporting.runs import Run, number
    from fdm_jax.training.checkpoints import read_config
    from fdm_jax.training.metrics import read_metrics

    config = read_config(workdir)
    if not isinstance(config, dict):
        raise UserError(f"The configuration {workdir / 'config.json'} cannot be read: it is no JSON object.")
    try:
        rows = read_metrics(workdir / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"The metrics {workdir / 'metrics.jsonl'} cannot be read: {error}.") from error
    flat, experiment = _parts(config)
    parameters, flops = _counts(experiment.network, experiment.image_shape) if experiment else (None, None)
    likelihoods = [_read_likelihood(path) for path in sorted(workdir.glob("likelihood-*.jsonl"))]
    return Run(
        name=name,
        config=flat,
        parameters=parameters,
        flops_per_image=flops,
        rows=[row for row in rows if isinstance(row, dict) and number(row.get("nimg")) is not None],
        evaluations=[_read_result(path) for path in sorted(workdir.glob("evaluations/*/result.json"))],
        likelihoods=[each for each in likelihoods if each.images],
        grids=_read_grids(workdir / "samples"),
    )


def _parts(fields: dict[str, Any]) -> tuple[dict[str, Any], Experiment | None]:
    """A configuration as {"train.images": ...}, and what it makes; None if this version cannot make it."""
    from fdm_jax.defaults import flatten, from_dict, to_json
    from fdm_jax.experiment import Experiment

    flat = flatten(fields)
    try:
        config = from_dict(fields)
        filled = flatten(json.loads(to_json(config)))  # fields that an earlier version did not have get their defaults
        if None in (filled["data.resolution"], filled["data.channels"]):
            return filled, None
        if filled["data.class_conditional"] and filled["data.num_classes"] is None:
            return filled, None
        experiment = Experiment.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError):
        return flat, None
    family = {f"family.{k}": v for k, v in vars(experiment.family).items() if isinstance(v, bool | int | float | str)}
    return filled | family, experiment


@functools.cache
def _counts(network: SongUNet, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Trained numbers, and operations per training image; equal networks are traced once, which takes seconds."""
    from fdm_jax.accounting import parameter_count, train_flops

    return parameter_count(network, image_shape), train_flops(network, image_shape)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if isinstance(result["metrics"], dict) and isinstance(result["settings"], dict):
            return result
        raise ValueError("it holds no metrics and settings")
    except OSError as error:
        raise UserError(f"The evaluation {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The evaluation {path} cannot be read ({error}): delete it, or measure again.") from error


def read_record(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of a file of results.

    Raises:
      UserError: it is no such file.
    """
    try:
        return parse_record(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of results ({error}).") from error


def _read_likelihood(path: Path) -> Likelihood:
    from fdm_jax.reporting.runs import Likelihood, number

    settings, rows = read_record(path)
    values = [value for row in rows if (value := number(row.get("bits_per_dim"))) is not None]
    n = len(values)
    mean = statistics.fmean(values) if n else math.nan
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Likelihood(settings, mean, error, n)


def _read_grids(folder: Path) -> list[tuple[int, bytes]]:
    """Sample grids by images seen; equal ones once, the last in any case, and those that were cut short not at all."""
    grids: dict[bytes, int] = {}
    for path in sorted(folder.glob("*.png"), key=lambda path: path.stem.zfill(20), reverse=True):
        content = path.read_bytes()
        if path.stem.isdecimal() and content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82"):
            grids.setdefault(content, int(path.stem))
    return sorted((nimg, content) for content, nimg in grids.items())


def _deal_sweeps(runs: list[Run], workdirs: Sequence[Path], named: Sequence[Path]) -> None:
    """Put each sweep with the run whose model it was made with."""
    owners = {str(resolved(workdir)): run for workdir, run in zip(workdirs, runs, strict=True)}
    done: set[Path] = set()
    for folder in named:
        if resolved(folder) in done:
            raise UserError(f"The sweep {folder} is named twice: name each once.")
        sweep = _read_sweep(folder)
        owner = owners.get(str(sweep.settings.get("workdir")))
        if owner is None:
            raise UserError(
                f"The sweep {folder} was made with {sweep.settings.get('workdir')}, which is not among the runs: "
                "name that workdir too, or leave the sweep out."
            )
        owner.sweeps.append(sweep)
        done.add(resolved(folder))
    for workdir, run in zip(workdirs, runs, strict=True):
        for path in sorted(workdir.glob("sweep*/results.jsonl")):
            if resolved(path.parent) not in done:
                sweep = _read_sweep(path.parent)
                # A workdir may have been moved since: then the place says whose it is.
                owners.get(str(sweep.settings.get("workdir")), run).sweeps.append(sweep)
                done.add(resolved(path.parent))


def _read_sweep(folder: Path) -> Sweep:
    from fdm_jax.reporting.runs import Sweep

    if not (folder / "results.jsonl").is_file():
        raise UserError(f"{folder} is not the folder of a sweep: it has no results.jsonl.")
    settings, rows = read_record(folder / "results.jsonl")
    return Sweep(settings, [row for row in rows if {"solver", "grid", "nfe"} <= row.keys()])
