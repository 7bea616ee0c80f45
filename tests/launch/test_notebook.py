"""The Colab notebook is kept without outputs, and runs from top to bottom."""

import re

import jax
import matplotlib
import nbformat
import pytest
import tiny
from cli.conftest import environment
from nbclient import NotebookClient

PATH = tiny.ROOT / "launch" / "fdm_jax_colab.ipynb"
# Less often than the notebook asks for, so that the time goes into what it shows. (8 digits of a class below are as many
# as training draws on the way: one program for both.)
OVERRIDES = [
    *(override for override in tiny.OVERRIDES if ".every_images=" not in override),
    "--config.log.every_images=160",
    "--config.checkpoint.every_images=320",
    "--config.samples.every_images=160",
    "--config.eval.every_images=160",
    "--config.eval.held_out_images=50",
]


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def parameters_cell(notebook):
    """Where the cell is whose values may be replaced, as of papermill."""
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def test_notebook_is_valid_and_stripped(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type in ("markdown", "code")
        assert set(cell.metadata) <= {"tags"}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.slow
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    """With a tiny model: the two runs, pictures of everything, and the exported model gives the same images."""
    index, folder = parameters_cell(notebook), tmp_path / "with a space" / "out"
    values = {"FOLDER": str(folder), "TRAIN_IMAGES": 320, "PER_CLASS": 8, "OVERRIDES": OVERRIDES}
    for name in values:  # otherwise replacing it would do nothing
        assert re.search(rf"^{name} = ", notebook.cells[index].source, re.MULTILINE), name
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))

    # Nothing of the person who runs the tests is read or written.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    env = environment() | {
        "PYTHONPATH": str(tiny.ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # but for matplotlib's list of fonts, which takes long to make
    }
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    shown = {name: [kind for o in each for kind in o.get("data", {})] for name, each in outputs.items()}
    for name in ("momentum-plot", "schedule-plot", "coefficients-plot", "progress", "steps", "curves", "readable"):
        assert shown[name].count("image/png") == 1, name
    assert shown["sample"].count("image/png") == 2
    assert "text/html" in shown["report"]
    text = {name: "".join(o.text for o in each if o.output_type == "stream") for name, each in outputs.items()}
    assert f"jax {jax.__version__}" in text["devices"]
    assert "these seeds, bit for bit: True" in text["interop"]
    for run in ("edm-fdm", "edm"):
        assert (folder / run / "checkpoints" / "20").is_dir()
    assert "momentum" in (folder / "report.html").read_text()
