"""``python -m fdm_jax`` is ``fdm``."""

from fdm_jax.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
