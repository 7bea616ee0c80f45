"""The core stays pure: it imports nothing of the shell, and nothing that reads, writes, logs or parses."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import fdm_jax

ROOT = pathlib.Path(fdm_jax.__file__).parent
CORE = [
    *(
        ROOT / f"{name}.py"
        for name in ("errors", "devices", "momentum", "families", "denoiser", "objective", "augment")
    ),
    *(ROOT / "networks").glob("*.py"),
    *(ROOT / "sampling").glob("*.py"),
    *(ROOT / "training" / f"{name}.py" for name in ("schedules", "axis", "step")),
]
CORE_MODULES = ("errors", "devices", "momentum", "families", "denoiser", "objective", "augment", "networks", "sampling")
ALLOWED = {
    "__future__", "abc", "collections", "dataclasses", "difflib", "functools", "itertools", "math", "typing",
    "diffrax", "flax", "jax", "numpy", "optax",
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_core_imports_core_only():
    assert len(CORE) > 15
    for path in CORE:
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "fdm_jax":
                inside = not rest or rest[0] in CORE_MODULES or name in (
                    "fdm_jax.training.step", "fdm_jax.training.schedules", "fdm_jax.training.axis",
                )  # fmt: skip
                assert inside, f"{path.name} imports {name}"
            else:
                assert top in ALLOWED, f"{path.name} imports {name}"


def test_tensorflow_is_imported_nowhere():
    for path in ROOT.rglob("*.py"):
        assert not any(name.split(".")[0] == "tensorflow" for name in imports(path)), path


def test_one_module_reads_the_configuration():
    """Elsewhere a ConfigDict is handed on; fields are read by experiment, and by the loop for what it reports."""
    readers = {path.name for path in ROOT.rglob("*.py") if "ml_collections" in set(imports(path))}
    assert readers <= {"experiment.py", "defaults.py", "config.py"}


def test_the_package_has_the_configurations(tmp_path):
    """Whoever installs it without the repository has those of configs/, and by the same names."""
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT.parent / name, tmp_path)
    for name in ("configs", "fdm_jax"):
        shutil.copytree(
            ROOT.parent / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(*tmp_path.glob("*.whl")) as wheel:
        for file in (ROOT.parent / "configs").glob("*.py"):
            assert wheel.read(f"fdm_jax/configs/{file.name}") == file.read_bytes()


def test_the_same_versions_of_python_everywhere():
    project = ROOT.parent
    oldest, newest = re.search(r"python_requires = >=3\.(\d+),<3\.(\d+)", (project / "setup.cfg").read_text()).groups()
    newest = int(newest) - 1
    for name in ("Makefile", "launch/tpu_worker.sh"):
        assert f"not (3, {oldest}) <= sys.version_info[:2] <= (3, {newest})" in (project / name).read_text()
    for name in ("Makefile", "README.md", "launch/README.md"):
        assert f"Python 3.{oldest} to 3.{newest}" in (project / name).read_text()
