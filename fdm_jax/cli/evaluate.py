"""Measure generated images against real ones: FID, and more than FID.

  fdm evaluate ref --data=cifar10 --extractor=inception --weights=inception.safetensors --out=cifar10.npz --keep-features
  fdm evaluate --workdir=runs/cifar10 --ref=cifar10.npz --weights=inception.safetensors --num=50000
  fdm evaluate --images=images.zip    --ref=cifar10.npz --weights=inception.safetensors

Without Inception's weights, features come from a classifier of one's own, or from the pixels of small images:

  fdm evaluate fit-classifier --data=digits --out=digits.safetensors
  fdm evaluate ref --data=digits --extractor=classifier --weights=digits.safetensors --out=digits.npz --keep-features
  fdm evaluate --workdir=runs/digits --ref=digits.npz --weights=digits.safetensors --num=2000

  fdm evaluate convert-inception --source=pt_inception-2015-12-05-6726825d.pth --out=inception.safetensors

Figures go to the terminal and, with all they depend on, to result.json in a folder of the workdir that bears the
settings' name.  A command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.distributed import add_distributed_argument, joined
from fdm_jax.cli.features import FEATURES, extract_all, gather
from fdm_jax.cli.images import existing_images, generated_images
from fdm_jax.cli.places import check_out, path_argument, place_argument
from fdm_jax.cli.record import but_places, differing, write_json
from fdm_jax.cli.sampling import add_checkpoint_argument, add_class_argument, add_sampling_arguments, check_noise
from fdm_jax.errors import UserError
from fdm_jax.progress import Progress, say
from fdm_jax.whole_files import remove_folder

if TYPE_CHECKING:
    from fdm_jax.data.sources import Source
    from fdm_jax.evaluation.extractors import Extractor
    from fdm_jax.evaluation.references import Reference

HELP = "measure images: FID, KID, precision and recall, Inception score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(act=evaluate)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--workdir", type=place_argument, metavar="DIR", help="generate with this run's model, and measure"
    )
    what.add_argument(
        "--images", type=place_argument, metavar="PATH", help="measure what is there: a folder, a zip, or an .npz"
    )
    parser.add_argument("--ref", type=place_argument, metavar="STATS.npz", help="statistics of real images")
    add_extractor_arguments(parser, "default: what the statistics were made with, else inception")
    parser.add_argument("--num", type=int, metavar="N", help="images (default: 50,000, or all there are)")
    parser.add_argument("--metrics", metavar="NAMES", help="frechet,kernel,precision-recall,inception-score")
    parser.add_argument(
        "--bootstrap", type=int, default=10, metavar="N", help="draws for FID's deviation; 0: none (default: 10)"
    )
    parser.add_argument("--out", type=place_argument, metavar="DIR", help="of the results (default: in the workdir)")
    parser.add_argument("--keep-features", action="store_true", help="leave the features in that folder")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    add_distributed_argument(parser)
    _add_generation_arguments(parser)

    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    # What it shares with the command may also stand before it, and has the command's defaults.
    sub = actions.add_parser("ref", help="make statistics of real images", argument_default=argparse.SUPPRESS)
    sub.set_defaults(act=make_reference)
    _add_data_arguments(sub)
    add_extractor_arguments(sub, "default: inception")
    sub.add_argument("--num", type=int, metavar="N", help="the first so many images (default: all)")
    sub.add_argument(
        "--keep-features", action="store_true", help="for kernel distance, precision and recall; a larger file"
    )
    sub.add_argument("--batch", type=int, metavar="N", help="images at a time (default: 64)")
    sub.add_argument("--out", required=True, type=path_argument, metavar="STATS.npz", help="the file")

    sub = actions.add_parser("fit-classifier", help="train a small classifier on a data set, for its features")
    sub.set_defaults(act=fit_classifier)
    _add_data_arguments(sub)
    sub.add_argument("--steps", type=int, default=1500, metavar="N", help="of training (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sub.add_argument("--out", required=True, type=path_argument, metavar="FILE.safetensors", help="the classifier")

    sub = actions.add_parser("convert-inception", help="rewrite pytorch-fid's weights so that torch is not needed")
    sub.set_defaults(act=convert_inception)
    sub.add_argument(
        "--source", required=True, type=path_argument, metavar="FILE.pth", help="pt_inception-2015-12-05-*.pth"
    )
    sub.add_argument("--out", required=True, type=path_argument, metavar="FILE.safetensors", help="the same weights")


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add_class_argument(parser)
    add_checkpoint_argument(parser)
    add_sampling_arguments(parser)


def add_extractor_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--extractor and --weights."""
    parser.add_argument("--extractor", metavar="KIND", help=f"inception, classifier, dinov2 or pixels ({default})")
    parser.add_argument("--weights", type=place_argument, metavar="FILE", help="of the extractor")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="NAME", help="a data set's name or path")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--data_dir", "--data-dir", type=path_argument, default=None, metavar="DIR", help="of named data sets"
    )


def run(args: argparse.Namespace) -> int:
    need_positive(args, "batch", "num", "steps", "nfe")  # of the action, as far as it has them
    return args.act(args)


# --- fdm evaluate ---


def evaluate(args: argparse.Namespace) -> int:
    """Generate or read, extract, measure, write down."""
    if args.ref is None or (args.workdir is None) == (args.images is None):
        raise UserError(
            "fdm evaluate takes --workdir=DIR or --images=PATH, and --ref=STATS.npz (made by `fdm evaluate ref`)."
        )
    if args.images is not None:
        parser = argparse.ArgumentParser()
        _add_generation_arguments(parser)
        for name, default in vars(parser.parse_args([])).items():
            if getattr(args, name) != default:
                option = {"label": "class"}.get(name, name if name.startswith("S_") else name.replace("_", "-"))
                raise UserError(f"--{option} says how a --workdir's model generates, and --images are there already.")
    check_noise(args)
    if args.bootstrap < 0:
        raise UserError(f"--bootstrap must be 0 or more, and is {args.bootstrap}.")
    with joined(args.distributed, args.workdir, leave_when_told=True):
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    import jax

    from fdm_jax.evaluation.measures import choose_metrics, measure
    from fdm_jax.training.agreement import all_or_none
    from fdm_jax.training.locking import locked

    made = generated_images(args) if args.images is None else None
    with all_or_none("Another process cannot evaluate, and says why."):
        images = made or existing_images(args)
        reference, extractor = open_reference(args.ref, args.extractor, args.weights, images.shape)
    metrics = choose_metrics(args.metrics.split(",") if args.metrics else None, reference, extractor)
    settings = images.settings | extractor.describe() | {
        "ref": str(args.ref), "ref_sha256": reference.checksum, "ref_description": reference.description,
    }  # fmt: skip
    parent = args.workdir / "evaluations" if args.workdir else Path("evaluations")
    folder = args.out or parent / folder_name(images.name, settings)
    with locked(folder, hold=jax.process_index() == 0):
        seconds, piece = extract_all(folder, settings, images, extractor, args)
        # The others wait: JAX would end all of them if the first one took more than five minutes to part from them.
        with all_or_none("The first process cannot measure the images, and says why."):
            if jax.process_index() == 0:  # which has all features before it
                features, logits = gather(folder, range(0, images.num, piece))
                result = measure(features, logits, reference, extractor, metrics, bootstrap=args.bootstrap)
                metrics_and_size = {"metrics": _measured_before(folder, settings) | result, "images": len(features)}
                made_by = {"seconds": round(seconds, 1), "settings": settings, "versions": versions()}
                write_json(folder / "result.json", metrics_and_size | made_by)
                if not args.keep_features:
                    remove_folder(folder / FEATURES)
                _print(result)
                print(
                    f"{len(features):,} images ({images.name}), features of {extractor.kind}; all of it in {folder}/result.json."
                )
    return 0


def _print(result: dict[str, Any]) -> None:
    """A line for each metric."""
    for name, figure in result.items():
        deviation = "" if figure["deviation"] is None else f" +- {figure['deviation']:.4g} ({figure['deviation_of']})"
        print(f"{name:18} {figure['value']:.5g}{deviation}")


def open_reference(
    path: Path, kind: str | None, weights: Path | None, shape: tuple[int, int, int]
) -> tuple[Reference, Extractor]:
    """The same as :func:`~fdm_jax.evaluation.references.open_with_extractor`; says if they are of another resolution."""
    from fdm_jax.evaluation.references import open_with_extractor

    reference, extractor = open_with_extractor(path, kind, weights, shape)
    known = reference.description.get("resolution", shape[0])
    if known != shape[0]:
        say(
            f"fdm: warning: the statistics {path} are of images of {known}x{known}, and these are {shape[0]}x{shape[1]}: "
            "the distance counts that too."
        )
    return reference, extractor


def _measured_before(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of the same images that are in the folder already: those asked for now do not drive them out."""
    try:
        before = json.loads((folder / "result.json").read_text())
        return dict(before["metrics"]) if not differing(before["settings"], settings) else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def folder_name(name: str, settings: dict[str, Any]) -> str:
    """Short, and another one for other settings, but the same one when the run was moved."""
    digest = hashlib.sha256(json.dumps(but_places(settings), sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{digest}"


def versions() -> dict[str, str]:
    """Of what decides numbers."""
    import platform

    names = ("fdm_jax", "jax", "jaxlib", "flax", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


# --- fdm evaluate ref, fit-classifier, convert-inception ---


def _open_data(args: argparse.Namespace, use_labels: bool) -> Source:
    from fdm_jax.data.opening import open_source

    return open_source(args.data, split=args.split, data_dir=args.data_dir, use_labels=use_labels, cache_mb=0)


def make_reference(args: argparse.Namespace) -> int:
    """Statistics of a data set."""
    from fdm_jax.data.staging import local_copy
    from fdm_jax.devices import make_mesh
    from fdm_jax.evaluation.extractors import FeatureMaker, open_extractor
    from fdm_jax.evaluation.moments import Moments
    from fdm_jax.evaluation.references import Reference, save_reference
    from fdm_jax.host_memory import program_check

    check_out(args.out, ".npz")
    source = _open_data(args, use_labels=False)
    spec, num = source.spec, args.num or len(source)
    if num > len(source):
        raise UserError(f"{spec.name} holds {len(source):,} images, and --num asks for {num:,}.")
    extractor = open_extractor(
        args.extractor or "inception",
        args.weights and local_copy(args.weights),
        (spec.resolution, spec.resolution, spec.channels),
    )
    read = min(512, num)  # images at once
    maker = FeatureMaker(extractor, make_mesh(), min(args.batch, read), program_check())
    counted, kept = Moments(extractor.width), []
    progress = Progress(num, 0)
    for batch in source.in_order(read, num):
        features, _ = maker(batch["image"])
        counted.add(features)
        if args.keep_features:
            kept.append(features)
        progress.more(len(features))
    progress.close()
    description = extractor.describe() | {
        "data": spec.name, "split": args.split, "images": num, "resolution": spec.resolution, "versions": versions(),
    }  # fmt: skip
    save_reference(Reference(*counted.result(), np.concatenate(kept) if kept else None, description), args.out)
    print(
        f"{args.out}: mean and covariance of {extractor.width} numbers ({extractor.kind}) of {num:,} of the "
        f"{spec.num_images:,} images of {spec.name}."
    )
    return 0


def fit_classifier(args: argparse.Namespace) -> int:
    """Train, judge on held-out images, save."""
    from fdm_jax.evaluation import classifier

    check_out(args.out, ".safetensors")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed must be from 0 to 2^31 - 1, and is {args.seed}.")
    source = _open_data(args, use_labels=True)
    batch = source.read(np.arange(len(source)))
    order = np.random.default_rng(args.seed).permutation(len(source))
    held, rest = np.split(order, [max(len(order) // 10, 1)])
    images, labels = batch["image"], batch["label"]
    progress = Progress(args.steps * 128, 0)
    fitted = classifier.fit(
        images[rest], labels[rest], (images[held], labels[held]), source.spec.name,
        steps=args.steps, batch_size=128, seed=args.seed,
        report=lambda steps, loss: progress.count(steps * 128, f"loss {loss:.3f}"),
    )  # fmt: skip
    progress.close()
    classifier.save(fitted, args.out)
    print(
        f"{args.out}: a classifier of {source.spec}; of {len(held):,} held-out images it reads {fitted.accuracy:.1%} right."
    )
    return 0


def convert_inception(args: argparse.Namespace) -> int:
    """Read with torch, write without."""
    from fdm_jax.evaluation.inception import convert_inception as convert

    convert(args.source, args.out)
    print(f"{args.out}: Inception's weights from {args.source.name}, to be read without torch.")
    return 0
