"""`fdm report` on workdirs that were written by hand: what is there is on the page, what is not is left out."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from fdm_jax import pictures
from fdm_jax.cli.main import main
from fdm_jax.cli.report import distinct_names
from fdm_jax.defaults import recipe, to_json
from fdm_jax.reporting.markup import duration, shown
from fdm_jax.reporting.page import spread
from fdm_jax.reporting.runs import PALETTE, Point, Run, best_of, colours, find_pairs

SIGMAS = (0.02, 0.2, 2.0)
EMPTY = {"img", "meta"}
ELEMENTS = EMPTY | set(
    "html head title style body main section h1 h2 h3 p div table thead tbody tr th td "
    "span small ul li figure figcaption details summary".split()
)


def config(momentum, **fields):
    made = recipe("digits")
    made.update_from_flattened_dict({
        "momentum.enabled": momentum, "momentum.multiplier": 2.0, "warmup_steps": 200 if momentum else 0,
        "network.model_channels": 4, "network.channel_mult": (1,), "network.channel_mult_emb": 1,
        "data.resolution": 8, "data.channels": 1, "data.num_classes": 10, "train.images": 6000, **fields,
    })  # fmt: skip
    return made


def write_run(folder, momentum=True, evaluated=True, timed=True, rate=1.0, **fields):
    """A workdir of a run of 6,000 images with a training row at each 500 and an evaluation at each 1,000."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config(momentum, **fields)))
    rows = []
    for nimg in range(500, 6001, 500):
        place = {"step": nimg // 50, "nimg": nimg} | ({"seconds": nimg / 10} if timed else {})
        rows.append(place | {"loss": 20 + 50 * math.exp(-nimg / 900), "img_per_s": 123.4, "bad_gradients": 0.0})
        if evaluated and nimg % 1000 == 0:
            error = round(2.0 ** (-rate * nimg / 1000), 6)
            row = place | {"val/error": error, "eval/frechet_distance": 100 * error, "eval/precision": 1 - error}
            row |= {"eval/frechet_distance_deviation": error} | {f"val/error@{s:g}": error * (1 + s) for s in SIGMAS}
            rows.append(row)
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_grids(folder, count):
    (folder / "samples").mkdir()
    for i in range(count):
        images = np.full((4, 8, 8, 1), 10 * i, np.uint8)
        pictures.save_png(pictures.image_grid(images, 2), folder / "samples" / f"{500 * (i + 1):012d}.png")


def write_result(folder, extractor, metrics, **settings):
    (folder / "evaluations" / extractor).mkdir(parents=True)
    settings = {
        "extractor": extractor,
        "solver": "heun",
        "nfe": 35,
        "checkpoint": 120,
        "ref_sha256": "abcdef0123",
    } | settings
    content = {"metrics": metrics, "images": 2000, "settings": settings}
    (folder / "evaluations" / extractor / "result.json").write_text(json.dumps(content))


def write_sweep(folder, workdir, frechet=True, **more):
    folder.mkdir()
    settings = {"workdir": str(workdir.resolve()), "checkpoint": 120, "extractor": "pixels", "num": 50} | more
    lines = [{"settings": settings}]
    for solver in ("heun", "unipc-2"):
        for nfe in (5, 9, 17):
            row = {"solver": solver, "grid": "edm", "nfe": nfe, "distance": 1 / nfe**2, "distance_error": 0.001}
            lines.append(row | ({"frechet": 100 / nfe} if frechet else {}))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"solver": "he')
    return folder


class Page(html.parser.HTMLParser):
    """A page taken apart: balanced or refused, with its text, tables and attributes."""

    def __init__(self, text):
        super().__init__()
        assert text.startswith("<!DOCTYPE html>\n<html")
        self.open, self.text, self.images, self.rows, self.attributes, self.headings = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.words = " ".join(" ".join(self.text).split())
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attrs):
        assert tag in ELEMENTS
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, *starts):
        """The row whose first cells are these."""
        return next(row for row in self.rows if row[: len(starts)] == list(starts))

    def plots(self):
        return [image["alt"] for image in self.images if image.get("class") == "plot"]


@pytest.fixture
def report(tmp_path):
    def make(*workdirs, sweeps=()):
        out = tmp_path / "report.html"
        arguments = [f"--workdir={workdir}" for workdir in workdirs] + [f"--sweep={sweep}" for sweep in sweeps]
        assert main(["report", *arguments, f"--out={out}"]) == 0
        assert not list(tmp_path.glob(".report.html*"))
        page = Page(out.read_text(encoding="utf-8"))
        assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
        sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
        assert len(sources) == len(page.images) and "url(" not in out.read_text(encoding="utf-8")
        return page

    return make


def test_two_runs(report, tmp_path):
    fdm = write_run(tmp_path / "fdm", rate=1.5)
    plain = write_run(tmp_path / "plain", momentum=False)
    page = report(fdm, plain)
    assert page.row("fdm")[1:4] == [
        "EDM with momentum, multiplier 2", "digits 8x8x1, by class", "ddpmpp, 4 x (1) channels, float32",
    ]  # fmt: skip
    assert page.row("plain")[1] == "EDM, plain"
    assert page.row("fdm")[5:] == ["64", "6,000", "10 min", "123.4"]
    assert page.row("momentum.enabled") == ["momentum.enabled", "True", "False"]
    assert page.row("warmup_steps") == ["warmup_steps", "200", "0"]
    assert not any(row[:1] == ["momentum.multiplier"] for row in page.rows)
    assert page.row("run", "training loss") == [
        "run",
        "training loss",
        "held-out error",
        "Fréchet distance",
        "precision",
    ]
    last = page.row("plain", "20.06")
    assert last[2:] == ["0.01562", "1.562 ± 0.016", "0.9844"]
    # 2^-9 against 2^-6; FDM had 2^-6 after 4,000 images.
    assert "0.001953 / 0.01562 = 0.125 after 6,000 images" in page.words
    assert (
        "fdm had the plain run's last 0.01562 in its evaluation after 4,000 images, 67% of the plain run's 6,000."
        in page.words
    )
    assert "img/s is the median. Wall time is that of training as a whole" in page.words
    assert "Last values; the best where it was an earlier one. Fréchet distances in training are of 2000 " in page.words
    assert "all 1 pairs" not in page.words and "not finite" not in page.words
    assert page.plots() == [
        "Held-out error", "Fréchet distance", "Other figures", "Training loss",
        "Held-out error at each noise level, last evaluation", "Held-out error at some noise levels, over training",
    ]  # fmt: skip
    assert "Training losses are of each family's own weights" in page.words
    assert "Training compute is images seen times the operations of one image" in page.words
    assert "fdm after 6,000 images; plain after 6,000 images." in page.words
    assert page.words.count("Fast Diffusion Model: 2 runs") == 2  # the title, and the heading
    assert page.headings == ["Runs", "Results", "Curves", "Error by noise level"]
    assert page.words.count("On images not trained on, with one weighting of noise levels for all families.") == 1
    assert page.attributes[2:6] == [
        ("name", "viewport"), ("content", "width=device-width, initial-scale=1"),
        ("http-equiv", "Content-Security-Policy"),
        ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
    ]  # fmt: skip


def test_the_share_is_given_only_if_fdm_got_there(report, tmp_path):
    page = report(write_run(tmp_path / "slow", rate=0.5), write_run(tmp_path / "plain", momentum=False))
    assert "slow did not get to the plain run's last 0.01562" in page.words and "% of the plain" not in page.words


def test_best_values_and_a_baseline_that_got_worse(report, tmp_path):
    plain = write_run(tmp_path / "plain", momentum=False)
    rows = read_rows(plain)
    rows[-1]["val/error"] = 0.2
    write_rows(plain, rows)
    page = report(write_run(tmp_path / "fdm"), plain)
    assert page.row("plain", "20.06")[2] == "0.2best 0.03125 at 5,000"
    assert "in its evaluation after 3,000 images, 50% of the plain run's 6,000;" in page.words
    assert "the plain run itself first was there after 3,000." in page.words


def test_runs_pair_up_by_all_that_they_share(report, tmp_path):
    runs = [
        write_run(tmp_path / f"{name}-{seed}", momentum=name == "fdm", rate=1.1 if name == "fdm" else 1.0, seed=seed)
        for name in ("fdm", "plain")
        for seed in (0, 1)
    ]
    page = report(*runs, write_run(tmp_path / "other", momentum=False, seed=0, **{"train.learning_rate": 0.1}))
    assert "held-out error of fdm-0 / plain-0" in page.words and "held-out error of fdm-1 / plain-1" in page.words
    assert "fdm-0 / plain-1" not in page.words and "/ other" not in page.words
    assert "held-out error, all 2 pairs: ratio 0.660 in the geometric mean" in page.words


def test_two_runs_that_differ_in_more(report, tmp_path):
    plain = write_run(tmp_path / "plain", momentum=False, **{"train.learning_rate": 0.1})
    assert "The two also differ in train.learning_rate." in report(write_run(tmp_path / "fdm"), plain).words
    other = write_run(tmp_path / "other", rate=2.0, **{"momentum.multiplier": 1.0})
    page = report(tmp_path / "fdm", other)
    assert "One run against the other" in page.words and "held-out error of other / fdm" in page.words
    assert "% of the plain" not in page.words


def test_an_old_run_alone(report, tmp_path):
    """Without wall time, evaluations or fields that came later, and with a row that a crash cut short."""
    run = write_run(tmp_path / "old", evaluated=False, timed=False)
    fields = json.loads((run / "config.json").read_text())
    del fields["eval"], fields["data"]["workers"]
    (run / "config.json").write_text(json.dumps(fields))
    write_rows(run, read_rows(run), end='{"step": 13, "ni')
    page = report(run)
    assert page.plots() == ["Training loss"] and page.words.count("Fast Diffusion Model: old") == 2
    assert page.row("old")[6:8] == ["6,000", "–"] and page.row("run", "training loss") == ["run", "training loss"]
    assert "No wall time was recorded for old." in page.words
    for absent in ("configurations differ", "Error by noise level", "Samples", "function evaluations", "against"):
        assert absent not in page.words
    assert (
        "Wall time is" not in page.words and "Last values" not in page.words and "in training are of" not in page.words
    )


def test_old_and_new_runs_differ_only_in_what_was_set(report, tmp_path):
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    fields = json.loads((old / "config.json").read_text())
    fields["family"] = {"name": "edm"}
    del fields["data"]["workers"]
    (old / "config.json").write_text(json.dumps(fields))
    assert "The configurations are the same." in report(old, new).words


def test_values_that_are_not_finite(report, tmp_path):
    run = write_run(tmp_path / "run")
    rows = read_rows(run)
    for row in rows[:9]:
        row |= {key: None for key in row if key not in ("step", "nimg")}
    rows[-1] |= {"val/error": None, "eval/precision": math.nan, "val/error@2": math.inf}
    write_rows(run, [*rows, {"step": 5, "nimg": None}, {"step": 6}, [1]])
    page = report(run)
    assert page.row("run", "20.06")[2:] == ["0.03125at 5,000", "1.562 ± 0.016", "0.9688at 5,000"]
    assert len(page.plots()) == 6


def test_gradients_that_were_not_finite(report, tmp_path):
    """Their values are counted, not the steps: none is left out."""
    run = write_run(tmp_path / "run")
    rows = read_rows(run)
    rows[0]["bad_gradients"], rows[1]["bad_gradients"] = 1200.0, 34.0
    write_rows(run, rows)
    page = report(run, write_run(tmp_path / "other"))
    assert "1,234 values of run's gradients were not finite" in page.words and "other's gradients" not in page.words


def test_a_run_that_diverged(report, tmp_path):
    """Evaluated, and never with a finite error."""
    run = write_run(tmp_path / "run")
    write_rows(run, [row | {key: None for key in row if key.startswith("val/")} for row in read_rows(run)])
    assert report(run).plots() == ["Fréchet distance", "Other figures", "Training loss"]
    page = report(run, write_run(tmp_path / "plain", momentum=False))
    assert page.row("run", "20.06")[2] == "–" and "plain after 6,000 images." in page.words
    assert "run after 6,000 images" not in page.words and "held-out error of" not in page.words


def test_a_run_that_only_began(report, tmp_path):
    run = write_run(tmp_path / "one")
    write_rows(run, read_rows(run)[:1])
    page = report(run, write_run(tmp_path / "whole"))
    assert page.row("one")[6] == "500 of 6,000" and page.row("one", "48.69")[2:] == ["–", "–", "–"]
    write_rows(tmp_path / "whole", read_rows(run))
    assert report(run, tmp_path / "whole").plots() == []


def test_names_are_text(report, tmp_path):
    name = "a<b>&c \"$x^$ 'é"
    run = write_run(tmp_path / name, **{"data.source": "<script>alert(1)</script>"})
    rows = read_rows(run)
    rows[-1]["eval/<i>$\\frac$"] = 1.0
    rows[2]["eval/<i>$\\frac$"] = 2.0
    write_rows(run, rows)
    write_result(run, "pixels", {"<u>": {"value": 1.0, "deviation": None}}, solver="<s>", **{"class": "&lt;"})
    page = report(run, write_run(tmp_path / "_b", momentum=False))
    assert page.row(name)[2].startswith("<script>alert(1)</script> 8x8x1")
    assert "eval/<i>$\\frac$" in page.row("run", "training loss")
    assert "<s>, 35 NFE, step 120, class &lt;" in page.words


def test_equal_folder_names_are_told_apart(report, tmp_path):
    page = report(write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"), write_run(tmp_path / "c"))
    assert page.row("a/run") and page.row("b/run") and page.row("c")
    assert distinct_names(["x/1/run", "y/1/run", "y/2/run"]) == ["x/1/run", "y/1/run", "2/run"]


def test_many_runs(report, tmp_path):
    page = report(*(write_run(tmp_path / f"r{i}", seed=i % 2, evaluated=False) for i in range(12)))
    assert page.row("seed")[1] == "0: r0, r2, r4, r6, r8, r101: r1, r3, r5, r7, r9, r11"
    assert len(set(colours(12))) == 12 and colours(3) == list(PALETTE[:3])


def test_sample_grids(report, tmp_path):
    run = write_run(tmp_path / "run")
    write_grids(run, 12)
    (run / "samples" / "notes.png").write_text("no picture")
    whole = (run / "samples" / "000000000500.png").read_bytes()
    for nimg, size in ((7000, 9), (8000, len(whole) - 5)):  # of a disk that was full
        (run / "samples" / f"{nimg:012d}.png").write_bytes(whole[:size])
    page = report(run)
    grids = [image for image in page.images if image.get("class") != "plot"]
    assert [image["alt"] for image in grids] == [
        f"samples of run after {nimg:,} images" for nimg in (6000, 500, 1500, 2500, 4000, 5000)
    ]
    assert "Samples run , 6,000 images run , earlier 500 images 1,500 images" in page.words
    assert grids[0]["class"] == "last" and (grids[0]["width"], grids[0]["height"]) == ("19", "19")
    for path in sorted((run / "samples").glob("0*.png"))[1:12]:
        path.write_bytes((run / "samples" / "000000000500.png").read_bytes())
    assert [image["alt"] for image in report(run).images if image.get("class") == "last"] == [grids[0]["alt"]]


@pytest.mark.parametrize(
    "changed, others",
    [
        ({}, []),
        ({"warmup_steps": 200, "log.every": 2, "parallel": "fsdp", "eval.every_images": 2}, []),
        ({"train.images": 7000}, ["train.images"]),
        ({"data.source": "mnist", "init_from": "x"}, ["data.source", "init_from"]),
        ({"eval.extractor": "inception"}, ["eval.extractor"]),
        ({"momentum.enabled": False, "seed": 1}, ["seed"]),
    ],
)
def test_what_had_better_not_differ_between_two_runs(changed, others):
    """Not the momentum, nor what decides no figure."""
    plain = {"momentum.enabled": False, "warmup_steps": 0, "train.images": 6000, "data.source": "digits"}
    [pair] = find_pairs([Run("base", plain), Run("run", plain | {"momentum.enabled": True} | changed)])
    assert (pair.run.name, pair.base.name, pair.others) == ("run", "base", others)
    assert pair.fdm == changed.get("momentum.enabled", True)


def test_evaluations(report, tmp_path):
    """Only Inception's features make an FID."""
    run = write_run(tmp_path / "run", evaluated=False)
    figure = {"value": 2.3456, "deviation": 0.0712, "deviation_of": "draws"}
    write_result(
        run,
        "inception",
        {"fid": figure, "recall": {"value": 0.61234, "deviation": None}},
        S_churn=0.0,
        match_original=False,
        ref_description={"data": "cifar10"},
    )
    more = {"guidance": 1.5, "grid": "log-snr", "guidance_interval": "0,inf", "S_churn": 40.0, "guide": None}
    write_result(run, "pixels", {"fid": figure | {"value": None}, "frechet_distance": figure}, **more)
    page = report(run, write_run(tmp_path / "without"))
    head = page.row("run", "features and reference")
    assert head[2:] == ["sampler", "images", "FID", "Fréchet distance", "recall"]
    inception = page.row("run", "inception, cifar10 (abcdef)")
    assert inception[2:] == ["heun, 35 NFE, step 120", "2,000", "2.346 ± 0.071", "–", "0.6123"]
    assert page.row("run", "pixels, (abcdef)")[2:] == [
        "heun, 35 NFE, step 120, guidance 1.5, grid log-snr, S_churn 40.0", "2,000", "–", "2.346 ± 0.071", "–",
    ]  # fmt: skip


def test_likelihood(report, tmp_path):
    run = write_run(tmp_path / "run", evaluated=False)
    settings = {"data": "digits", "split": "test", "checkpoint": 120, "draws": 2, "exact": False}
    lines = [{"settings": settings}, *({"index": i, "bits_per_dim": 3 + i} for i in range(3))]
    (run / "likelihood-test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ind')
    row = report(run).row("run", "digits, test")
    assert row[2:] == ["Hutchinson, 2 per image", "step 120", "3", "4.00 ± 0.58"]


def test_sweeps(report, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", momentum=False)
    write_sweep(a / "sweep-1", a)
    (b / "sweep-of-pictures").mkdir()
    write_sweep(b / "sweep", tmp_path / "moved", frechet=False)  # whose workdir had another name
    page = report(a, b, sweeps=[write_sweep(tmp_path / "elsewhere", b), a / "sweep-1"])
    title = "By solver and number of function evaluations (NFE)"
    assert page.plots().count(title) == 1 and page.headings[-1] == "Quality against function evaluations"
    assert page.row("a", "unipc-2", "5")[3:] == ["0.0400 ± 0.0010", "20"]
    assert sum(row[:3] == ["a", "heun", "9"] for row in page.rows) == 1
    assert any(row[:3] == ["run", "solver", "NFE"] and len(row) == 5 for row in page.rows)
    assert sorted(row[4] for row in page.rows if row[:3] == ["b", "heun", "5"]) == ["20", "–"]
    assert "Fréchet distance (pixels), 50 images" in page.words and "FID" not in page.words


def test_sweeps_of_one_run_are_told_apart(report, tmp_path):
    run = write_run(tmp_path / "run")
    write_sweep(run / "sweep-a", run, guidance=None, checkpoint=60)
    write_sweep(run / "sweep-b", run, guidance=2.0)
    solvers = {row[1] for row in report(run).rows if row[2:3] == ["9"]}
    assert solvers == {
        f"{solver}, {settings}"
        for solver in ("heun", "unipc-2")
        for settings in ("step 60, guidance None", "step 120, guidance 2.0")
    }


def test_a_configuration_of_another_version(report, tmp_path):
    run = write_run(tmp_path / "one")
    fields = json.loads((run / "config.json").read_text())
    fields["network"]["wings"] = 2
    (run / "config.json").write_text(json.dumps(fields))
    page = report(run)
    assert page.row("one")[4] == "–" and "this version cannot make such a network" in page.words


def test_an_imported_model_has_evaluations_only(report, tmp_path):
    run = write_run(tmp_path / "one")
    (run / "metrics.jsonl").unlink()
    write_result(run, "pixels", {"frechet_distance": {"value": 1.5, "deviation": 0.25}})
    page = report(run)
    assert "1.50 ± 0.25" in page.words and page.row("one")[6:] == ["–", "–", "–"] and not page.plots()


def refused(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fdm report: ") and said.count("\n") == 1
    return said


def test_refusals(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), f"--out={tmp_path}/r.html"
    workdir = f"--workdir={run}"
    assert "must end in .html" in refused(capsys, workdir, f"--out={tmp_path}/r.htm")
    assert "there is no folder" in refused(capsys, workdir, f"--out={tmp_path}/none/r.html")
    (tmp_path / "folder.html").mkdir()
    assert "it is a folder" in refused(capsys, workdir, f"--out={tmp_path}/folder.html")
    assert "named twice" in refused(capsys, workdir, f"--workdir={run}/../run", out)
    assert "is not the workdir of a run" in refused(capsys, f"--workdir={tmp_path}", out)
    assert "is not the folder of a sweep" in refused(capsys, workdir, f"--sweep={tmp_path}", out)
    sweep = write_sweep(tmp_path / "sweep", tmp_path / "other")
    assert "not among the runs" in refused(capsys, workdir, f"--sweep={sweep}", out)
    sweep = write_sweep(tmp_path / "own", run)
    assert "named twice" in refused(capsys, workdir, f"--sweep={sweep}", f"--sweep={sweep}", out)
    (sweep / "results.jsonl").write_text("1\n")
    assert "no file of results" in refused(capsys, workdir, f"--sweep={sweep}", out)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1'])
def test_no_metrics(content, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(content)
    assert "holds no metrics yet" in refused(capsys, f"--workdir={run}", f"--out={tmp_path}/r.html")


@pytest.mark.parametrize("file, content", [
    ("config.json", b"{"), ("config.json", b"[1]"), ("likelihood-test.jsonl", b"{}\n"),
    ("evaluations/a/result.json", b"{}"), ("evaluations/a/result.json", b"{"), ("sweep/results.jsonl", b"[]\n"),
])  # fmt: skip
def test_damaged_files(file, content, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_bytes(content)
    assert (run / file).name in refused(capsys, f"--workdir={run}", f"--out={tmp_path}/r.html")


@pytest.mark.parametrize("file", ["evaluations/a/result.json", "likelihood-test.jsonl"])
def test_files_that_the_system_does_not_give(file, tmp_path, capsys):
    """They may be sound: nobody is told to delete them, or that they are no results."""
    run = write_run(tmp_path / "run")
    (run / file).unlink(missing_ok=True)
    (run / file).mkdir(parents=True)
    said = refused(capsys, f"--workdir={run}", f"--out={tmp_path}/r.html")
    assert f"{run / file} cannot be read (Is a directory)." in said


def test_a_page_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    run, out = write_run(tmp_path / "run", evaluated=False), tmp_path / "r.html"
    out.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert "cannot be written: denied" in refused(capsys, f"--workdir={run}", f"--out={out}")
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "run"]


def test_numbers_for_people():
    assert [shown(v) for v in (None, 0.123456, 9999.7, 12345.6, 0.00001234)] == [
        "–", "0.1235", "10,000", "12,346", "1.234e-05",
    ]  # fmt: skip
    assert re.sub(r"\s", " ", shown(1.23456, 0.0345)) == "1.235 ± 0.035" and shown(-12.3, 15.0).startswith("-12\xa0±")
    assert [duration(s) for s in (None, 59, 120, 150, 179.7, 3600, 4980, 7500, 200_000)] == [
        "–", "59 s", "2 min 0 s", "2 min 30 s", "3 min 0 s", "60 min", "83 min", "2 h 5 min", "2 d 7 h",
    ]  # fmt: skip
    assert spread(4, 6) == [0, 1, 2, 3] and spread(12, 6) == [0, 2, 4, 7, 9, 11]
    points = [Point(1, None, 3.0), Point(2, None, 1.0), Point(3, None, 2.0)]
    assert (best_of(points, -1).nimg, best_of(points, 1).nimg, best_of(points, 0)) == (2, 1, None)
