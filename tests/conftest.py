"""Eight CPU devices for every test, so that parallel code runs in parallel."""

from collections.abc import Iterator
import gc
import os
import pathlib
import tempfile

# Workers, and the programs that tests start, share what they compile.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(tempfile.gettempdir()) / f"mpqfl_jax_tests_{os.getuid()}"),
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def without_the_last_modules_programs() -> Iterator[None]:
  """Two thousand tests would keep six gigabytes of programs a worker."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
  """The folder of prepared TFDS sets; the test is skipped where it is not."""
  default = pathlib.Path(__file__).parents[1].parent / "shared" / "tfds"
  folder = pathlib.Path(os.environ.get("MPQFL_TFDS_DIR", default))
  if not folder.is_dir():
    pytest.skip(f"no prepared TFDS sets in {folder}; set MPQFL_TFDS_DIR")
  return folder
