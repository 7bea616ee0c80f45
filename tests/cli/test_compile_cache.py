"""The cache of compiled programs: what a kill or a full disk left in it is mended."""

import warnings
import zlib

import jax
import pytest
import tiny

from fdm_jax.cli.compile_cache import compile_cache

WHOLE = zlib.compress(b"a program of many bytes" * 100)
READING = "Error reading persistent compilation cache entry for 'jit_step': error: Error -5 while decompressing data"


@pytest.fixture
def cache(tmp_path):
    """Entries of two programs, some cut short, in what JAX takes for its cache."""
    entries = {"jit_step-0a": WHOLE, "jit_step-1b": WHOLE[:20], "jit_step-2c": b"", "jit_steps-3d": WHOLE[:20]}
    for name, data in entries.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield lambda: sorted(path.name.removesuffix("-cache") for path in tmp_path.iterdir())
    jax.config.update("jax_compilation_cache_dir", before)


def test_entries_that_were_cut_short_are_removed(cache, capsys):
    with compile_cache():
        warnings.warn(READING, stacklevel=1)
    assert cache() == ["jit_step-0a", "jit_steps-3d"]
    assert "jit_step in " in (said := capsys.readouterr().err) and "was cut short" in said and "Error -5" not in said


@pytest.mark.parametrize("cause", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_named_and_leaves_no_part(cache, capsys, cause):
    with compile_cache():
        warnings.warn(READING.replace("reading", "writing").replace("Error -5", cause), stacklevel=1)
    assert cache() == ["jit_step-0a", "jit_steps-3d"]
    said = capsys.readouterr().err
    assert f"(error: {cause}" in said and "the next start compiles it" in said and "kept anew" not in said


def test_a_folder_that_cannot_be_used_is_named(cache, tmp_path, capsys):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jit_step-0a-cache"))
    with compile_cache():
        warnings.warn(READING.replace("Error -5", "Not a directory"), stacklevel=1)
    assert len(cache()) == 4
    assert "JAX_COMPILATION_CACHE_DIR names another folder" in capsys.readouterr().err


def test_other_warnings_are_shown(cache):
    shown = warnings.showwarning
    with pytest.warns(UserWarning, match="the sky is falling"), compile_cache():
        warnings.warn("the sky is falling", stacklevel=1)
    assert warnings.showwarning is shown and len(cache()) == 4


def test_a_program_of_jax_is_compiled_and_kept_anew(tmp_path):
    """With JAX's own words, and its own entries."""
    script = """if True:
        import pathlib, sys, jax
        from fdm_jax.cli.compile_cache import compile_cache
        jax.config.update("jax_compilation_cache_dir", sys.argv[1])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        def step(x):
            return x + 1
        for whole in (True, False):
            with compile_cache():
                jax.jit(step)(1.0)
            (entry,) = pathlib.Path(sys.argv[1]).glob("jit_step-*-cache")
            data = entry.read_bytes()
            if whole:
                entry.write_bytes(data[:-10])
                size = len(data)
                jax.clear_caches()
            else:
                assert len(data) > size - 10
        """
    run = tiny.run_script(script, tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"jit_step in {tmp_path} was cut short" in run.stderr and "Warning" not in run.stderr
