"""Prepare data sets from the files that you have, look at them, and hand them on.  Nothing is ever downloaded.

  fdm dataset prepare cifar10 --source=cifar-10-python.tar.gz
  fdm dataset prepare ffhq64  --source=images1024x1024
  fdm dataset prepare afhqv2  --source=afhq-v2-dataset
  fdm dataset prepare folder  --source=photos --resolution=64 --transform=center-crop
  fdm dataset stats cifar10 --out=cifar10.png
  fdm dataset export cifar10 --out=cifar10.zip
  fdm dataset bench cifar10 --batch-size=64,512 --workers=0,2

A prepared set trains as --config.data.source=NAME, and its folder can be moved and given as a path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from fdm_jax.cli.places import check_out, path_argument
from fdm_jax.errors import UserError
from fdm_jax.progress import LINE_SECONDS, Progress, say

if TYPE_CHECKING:
    from fdm_jax.data.sources import Source

HELP = "prepare, describe, export and time data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.data.images import TRANSFORMS
    from fdm_jax.data.labels import KINDS
    from fdm_jax.data.opening import ORIGINALS

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text[0].lower() + text[1:], description=text + ".")
        sub.set_defaults(act=run)
        sub.add_argument(
            "--data_dir",
            "--data-dir",
            type=path_argument,
            metavar="DIR",
            help="of named data sets (default: the user's cache)",
        )
        return sub

    sub = action("prepare", prepare, "Turn a data set as it comes into one that is fast to read")
    sub.add_argument("name", choices=ORIGINALS, metavar="NAME", help=", ".join(ORIGINALS))
    sub.add_argument("--source", required=True, type=path_argument, metavar="PATH", help="an archive or a folder")
    sub.add_argument(
        "--name", dest="config", metavar="WORD", help="calls a folder, zip or mnist (default: as its source)"
    )
    sub.add_argument("--resolution", type=int, metavar="R", help="side of the images (default: what they have)")
    sub.add_argument(
        "--transform", choices=TRANSFORMS, default="none", help="for pictures that are not square (default: none)"
    )
    sub.add_argument(
        "--labels",
        choices=KINDS,
        default="auto",
        help="where classes come from (default: %(default)s)",
    )
    sub.add_argument("--classes", metavar="A,B,...", help="names of the classes, in the order of their numbers")
    sub.add_argument(
        "--channels", type=int, choices=(1, 3), help="make all pictures grey, or RGB (default: what they have)"
    )
    sub.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out, and count, pictures that cannot be read or are not of the first one's size and channels",
    )
    sub.add_argument(
        "--threads", type=int, default=4, metavar="N", help="pictures read at the same time (default: %(default)s)"
    )

    def reads(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("source", metavar="SOURCE", help="as --config.data.source: a name or a path")
        sub.add_argument("--split", default="train", help="train, test or all (default: %(default)s)")

    sub = action("stats", stats, "Count classes, measure mean, deviation and sigma_data, and draw a grid")
    reads(sub)
    sub.add_argument("--out", type=path_argument, metavar="FILE.png", help="the grid of pictures")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    sub = action("export", export, "Write a zip in EDM's layout, which the PyTorch original reads")
    reads(sub)
    sub.add_argument("--out", required=True, type=path_argument, metavar="FILE.zip", help="a new file")
    sub = action("bench", bench, "Measure how fast batches are read: one JSON line per combination")
    reads(sub)
    sub.add_argument("--batch-size", default="256", metavar="N,...", help="default: %(default)s")
    sub.add_argument("--threads", default="4", metavar="N,...", help="default: %(default)s")
    sub.add_argument(
        "--workers", default="0", metavar="N,...", help="processes instead of threads (default: %(default)s)"
    )
    sub.add_argument(
        "--images", type=int, default=20_000, metavar="N", help="to read for each line (default: %(default)s)"
    )
    sub.add_argument(
        "--cache-mb", type=int, default=0, metavar="MB", help="images kept in memory (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from fdm_jax.user_dirs import default_data_dir

    args.data_dir = args.data_dir or default_data_dir()
    return args.act(args)


def prepare(args: argparse.Namespace) -> int:
    """``fdm dataset prepare``."""
    from fdm_jax.data.prepared import PreparedSource, find_prepared
    from fdm_jax.data.preparing import Request, prepare_dataset
    from fdm_jax.storage_errors import disk_full
    from fdm_jax.user_dirs import default_data_dir

    options = ("name", "config", "resolution", "transform", "labels", "channels", "skip_bad", "threads")
    classes = tuple(word.strip() for word in args.classes.split(",")) if args.classes else ()
    request = Request(source=args.source, classes=classes, **{option: getattr(args, option) for option in options})
    before = find_prepared(request.full_name, args.data_dir)
    began = time.monotonic()
    try:
        folder, left_out = prepare_dataset(request, args.data_dir)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"{request.full_name} cannot be prepared in {args.data_dir}: {error}.") from error
    for sentence in left_out[:20]:
        say(f"Left out: {sentence}")
    if left_out:
        print(f"Left out in all: {len(left_out):,} bad pictures.")
    prepared = PreparedSource(folder, "all")
    if before is None and (enlarged := prepared.metadata.get("enlarged")):
        say(
            f"Enlarged: {enlarged:,} of the pictures are smaller than {prepared.spec.resolution} pixels, and a model will "
            "learn their blur: take them out of the source, or another --resolution."
        )
    where = "" if args.data_dir == default_data_dir() else f" --config.data.data_dir={shlex.quote(str(args.data_dir))}"
    took = f"in {time.monotonic() - began:.1f} s" if before is None else "before: delete its folder to make it anew"
    print(
        f"Prepared {prepared.spec} ({prepared.splits}), {took}.\n"
        f"Their folder: {folder}\nTrain on them with --config.data.source={request.full_name}{where}"
    )
    return 0


def _open(args: argparse.Namespace, cache_mb: int = 0) -> Source:
    """The source with its labels, if it has any."""
    from fdm_jax.data.labels import NoLabelsError
    from fdm_jax.data.opening import open_source

    options: dict[str, Any] = {"split": args.split, "data_dir": args.data_dir, "cache_mb": cache_mb}
    try:
        return open_source(args.source, **options)
    except NoLabelsError:
        return open_source(args.source, use_labels=False, **options)


def stats(args: argparse.Namespace) -> int:
    """``fdm dataset stats``."""
    from fdm_jax import pictures
    from fdm_jax.data import statistics

    if args.out is not None:
        check_out(args.out, ".png")
    source = _open(args)
    spec, result = source.spec, statistics.measure(source)
    names = spec.class_names or tuple(map(str, range(spec.num_classes)))
    if args.out is not None:
        columns = min(spec.num_classes, 10) or 10
        images = statistics.examples(source, columns, 8)
        pictures.save_png(pictures.image_grid(images, columns, scale=max(1, 64 // spec.resolution)), args.out)
    if args.json:
        print(json.dumps({
            "name": spec.name, "split": args.split, "images": spec.num_images, "resolution": spec.resolution,
            "channels": spec.channels, "classes": dict(zip(names, result.class_counts.tolist(), strict=True)),
            "mean": result.mean.tolist(), "std": result.std.tolist(), "sigma_data": result.sigma_data,
            **({"metadata": metadata} if (metadata := getattr(source, "metadata", None)) else {}),
        }))  # fmt: skip
        return 0
    print(f"{spec}; split {args.split}")
    width = max([*map(len, names), 5])
    for i, (name, count) in enumerate(zip(names, result.class_counts, strict=True)):
        name = "" if name == str(i) else name
        print(f"  {i:>5}  {name:<{width}}  {count:>9,}  {count / spec.num_images:6.2%}")
    channels = ("grey",) if spec.channels == 1 else ("red", "green", "blue")
    for name, mean, std in zip(channels, result.mean, result.std, strict=True):
        print(f"  {name:<{width + 7}}  mean {mean:+.4f}  std {std:.4f}    pixels in [-1, 1]")
    advice = "all pictures are of one colour"  # and a sigma_data of 0 is none that EDM can take
    if result.sigma_data:
        advice = f"--config.family.sigma_data={result.sigma_data:.3g} (EDM uses 0.5)"
    print(f"  {'sigma_data':<{width + 7}}  {result.sigma_data:.4f}: {advice}")
    if args.out is not None:
        print(f"Grid: {args.out}")
    return 0


def export(args: argparse.Namespace) -> int:
    """``fdm dataset export``."""
    from fdm_jax.data.export import write_zip

    source = _open(args)
    with contextlib.closing(Progress(len(source), 0, seconds=LINE_SECONDS)) as progress:
        write_zip(source, args.out, progress.count)
    print(f"{source.spec}, in {args.out}.")
    return 0


def bench(args: argparse.Namespace) -> int:
    """``fdm dataset bench``: the loader alone, from the disk (or its cache) to batches of uint8."""
    from fdm_jax.data.pipeline import make_batches

    lists = {}
    for option in ("batch_size", "threads", "workers"):
        text, least = getattr(args, option), 0 if option == "workers" else 1
        numbers = text.split(",")
        if not all(number.strip().isdecimal() and int(number) >= least for number in numbers):
            raise UserError(
                f"--{option.replace('_', '-')} must be whole numbers from {least} with commas between, and is {text!r}."
            )
        lists[option] = [int(number) for number in numbers]
    for batch_size in lists["batch_size"]:
        for workers in lists["workers"]:
            for threads in lists["threads"] if not workers else [1]:
                source = _open(args, args.cache_mb)
                batches = make_batches(source, batch_size=batch_size, seed=0, num_threads=threads, num_workers=workers)
                next(batches)  # starts threads or workers
                count = max(args.images // batch_size, 2)
                began = time.perf_counter()
                for _ in range(count):
                    next(batches)
                seconds = time.perf_counter() - began
                batches.close()
                spec = source.spec
                print(json.dumps({
                    "what": "loader", "data": spec.name, "resolution": spec.resolution, "channels": spec.channels,
                    "batch_size": batch_size, "threads": threads, "workers": workers, "cache_mb": args.cache_mb,
                    "images_per_second": round(count * batch_size / seconds, 1), "max_rss_mib": round(_rss() / 2**20, 1),
                }), flush=True)  # fmt: skip
    return 0


def _rss() -> int:
    """The most memory that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
