"""Labelled images as NumPy arrays: embedded samples and full TFDS sets.

The samples ship inside the package (`data/README.md` says where they come
from), so that everything runs without a network. The full sets are read from
the array_record files of a TensorFlow Datasets folder, without TensorFlow, and
decoded once: the pixels are kept as memory-mapped arrays in a user cache
(`MPQFL_CACHE_DIR`, else `XDG_CACHE_HOME/mpqfl_jax`, else
`~/.cache/mpqfl_jax`), because the TFDS folder may be read-only.
"""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
import tqdm

from mpqfl_jax import errors, host

_SAMPLE_DIR = pathlib.Path(__file__).parent / "data"
_MOSAIC_COLUMNS = 100
_DECODE_BATCH = 500
# Part of every cached file's name: raise it when what is cached changes.
_CACHE_FORMAT = 1


class Dataset(NamedTuple):
  """A classification set, split into training and test images.

  Attributes:
    name: the name that flags and result files use.
    x_train, x_test: [examples, height, width, channels], uint8.
    y_train, y_test: [examples], int32, class numbers from 0.
    class_names: what each class number means.
    mean, std: [channels], float32, in units of [0, 1] images, over the full
      training set (also where the images are a sample of it).
    source: one line on where the images come from, for result files.
  """

  name: str
  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  class_names: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray
  source: str


class SetInfo(NamedTuple):
  """What is known of a full set without reading it.

  Attributes:
    image_shape: (height, width, channels).
    class_names: what each class number means.
    mean, std: per channel, in units of [0, 1] images, over the training set.
  """

  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]


# Means and deviations are the ones in general use, to four digits: MNIST from
# PyTorch's `examples/mnist`; Fashion-MNIST and CIFAR-10 as the moments of the
# distributed training sets. Normalising by fixed constants keeps a model's
# input the same for a sample and for the full set.
FULL_SETS: dict[str, SetInfo] = {
  "mnist": SetInfo(
    image_shape=(28, 28, 1),
    class_names=tuple("0123456789"),
    mean=(0.1307,),
    std=(0.3081,),
  ),
  "fashion_mnist": SetInfo(
    image_shape=(28, 28, 1),
    class_names=(
      "T-shirt/top",
      "Trouser",
      "Pullover",
      "Dress",
      "Coat",
      "Sandal",
      "Shirt",
      "Sneaker",
      "Bag",
      "Ankle boot",
    ),
    mean=(0.2860,),
    std=(0.3530,),
  ),
  "cifar10": SetInfo(
    image_shape=(32, 32, 3),
    class_names=(
      "airplane",
      "automobile",
      "bird",
      "cat",
      "deer",
      "dog",
      "frog",
      "horse",
      "ship",
      "truck",
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  ),
}


class SampleInfo(NamedTuple):
  """An embedded sample: the set it was drawn from and its files' digests.

  Attributes:
    full: the full set's name in `FULL_SETS`.
    version: the TFDS version that it was drawn from.
    images_sha256: of `NAME.webp`, a lossless mosaic of all images.
    labels_sha256: of `NAME.npz`, labels and indices into the full set.
  """

  full: str
  version: str
  images_sha256: str
  labels_sha256: str


# Printed by `tools/draw_samples.py`.
SAMPLES: dict[str, SampleInfo] = {
  "mnist_sample": SampleInfo(
    full="mnist",
    version="3.0.1",
    images_sha256=(
      "5370a9780bf828c15d053ded472285099ac278ec13dead5da70d65fd355db0fd"
    ),
    labels_sha256=(
      "d8cbd9847c34d87e2cfcc467d29f64562c2629a5911657e448499d41700ba6cd"
    ),
  ),
  "fashion_mnist_sample": SampleInfo(
    full="fashion_mnist",
    version="3.0.1",
    images_sha256=(
      "bcf8018768ac0d0249c7c8ec58f6c9fb18e6de9a529aa35bce15cc02762c9b63"
    ),
    labels_sha256=(
      "c7a6acdae118c23818e82d43c42e1e7bb35ad2ed1368796931ca06fd06960182"
    ),
  ),
  "cifar10_sample": SampleInfo(
    full="cifar10",
    version="3.0.2",
    images_sha256=(
      "df4471285c63f949b68b5e401395a7a848efb3b7e2de6ece8f879025e03094ca"
    ),
    labels_sha256=(
      "2e05594c1332ccd5a9136a454ace5083af9d8597373289cd39a6d9a836be101b"
    ),
  ),
}


def load(name: str, data_dir: str | None = None) -> Dataset:
  """Loads a data set by name.

  Args:
    name: `mnist_sample`, `fashion_mnist_sample` or `cifar10_sample`, which ship
      with the package; or `mnist`, `fashion_mnist` or `cifar10`, the full sets.
    data_dir: the TFDS folder to read a full set from, or None for TFDS's own
      (`TFDS_DATA_DIR`, else `~/tensorflow_datasets`). Samples ignore it.

  Returns:
    The data set; a full set's images are memory-mapped and read-only.

  Raises:
    UserError: for an unknown name, a folder that does not hold the set and
      cannot be made to, an extra that is not installed, or a damaged file.
  """
  if name in SAMPLES:
    return _load_sample(name)
  if name in FULL_SETS:
    return _load_full(name, data_dir)
  raise errors.unknown_name("dataset", name, [*SAMPLES, *FULL_SETS])


# Embedded samples.


def encode_mosaic(images: np.ndarray) -> bytes:
  """Encodes images as one lossless WebP, a grid in reading order.

  Args:
    images: [examples, height, width, channels], uint8, 1 or 3 channels.

  Returns:
    The file's bytes.
  """
  n, height, width, channels = images.shape
  rows = -(-n // _MOSAIC_COLUMNS)
  tiles = np.zeros((rows * _MOSAIC_COLUMNS, height, width, channels), np.uint8)
  tiles[:n] = images
  grid = tiles.reshape(rows, _MOSAIC_COLUMNS, height, width, channels)
  grid = grid.transpose(0, 2, 1, 3, 4).reshape(
    rows * height, _MOSAIC_COLUMNS * width, channels
  )
  out = io.BytesIO()
  Image.fromarray(np.broadcast_to(grid, (*grid.shape[:2], 3))).save(
    out, "WEBP", lossless=True, quality=100, method=6
  )
  return out.getvalue()


def decode_mosaic(
  raw: bytes, n: int, image_shape: tuple[int, int, int]
) -> np.ndarray:
  """The inverse of `encode_mosaic`.

  Args:
    raw: the file's bytes.
    n: number of images.
    image_shape: (height, width, channels).

  Returns:
    [n, height, width, channels], uint8.
  """
  height, width, channels = image_shape
  grid = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))[..., :channels]
  rows = grid.shape[0] // height
  tiles = grid.reshape(rows, height, _MOSAIC_COLUMNS, width, channels)
  tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, *image_shape)
  return np.ascontiguousarray(tiles[:n])


def sample_indices(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Which examples of the full set a sample holds.

  Args:
    name: a sample's name.

  Returns:
    Row numbers in the full training set and in the full test set, int64, in
    the order of the sample's `x_train` and `x_test`.

  Raises:
    UserError: the sample's file is missing or damaged.
  """
  labels = _sample_labels(name)
  return (
    labels["train_index"].astype(np.int64),
    labels["test_index"].astype(np.int64),
  )


def _sample_labels(name: str) -> dict[str, np.ndarray]:
  raw = _checked_bytes(f"{name}.npz", SAMPLES[name].labels_sha256)
  with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
    return dict(stored)


def _checked_bytes(file_name: str, sha256: str) -> bytes:
  path = _SAMPLE_DIR / file_name
  try:
    raw = path.read_bytes()
  except OSError as error:
    fault = f"cannot be read ({error.strerror})"
  else:
    if hashlib.sha256(raw).hexdigest() == sha256:
      return raw
    fault = f"is damaged (its SHA-256 is not {sha256[:12]}...)"
  raise errors.UserError(
    f"the sample file {path} {fault}. Restore it: `git checkout -- "
    "mpqfl_jax/data` in a checkout, or reinstall the package with "
    "`pip install --force-reinstall --no-deps`."
  )


def _load_sample(name: str) -> Dataset:
  info = SAMPLES[name]
  full = FULL_SETS[info.full]
  labels = _sample_labels(name)
  num_train, num_test = len(labels["y_train"]), len(labels["y_test"])
  raw = _checked_bytes(f"{name}.webp", info.images_sha256)
  images = decode_mosaic(raw, num_train + num_test, full.image_shape)
  return Dataset(
    name=name,
    x_train=images[:num_train],
    y_train=labels["y_train"].astype(np.int32),
    x_test=images[num_train:],
    y_test=labels["y_test"].astype(np.int32),
    class_names=full.class_names,
    mean=np.array(full.mean, np.float32),
    std=np.array(full.std, np.float32),
    source=(
      f"embedded: {num_train} training and {num_test} test images of TFDS "
      f"{info.full} {info.version}, sha256 {info.images_sha256[:12]}"
    ),
  )


# Full sets.


def _load_full(name: str, data_dir: str | None) -> Dataset:
  info = FULL_SETS[name]
  root = _data_root(data_dir)
  folder = _prepared_folder(name, root)
  if folder is None:
    _prepare(name, root)
    folder = _prepared_folder(name, root)
    if folder is None:
      raise errors.UserError(
        f"{root / name} holds {name}, but not as array_record files. Prepare "
        "it again in an empty folder: --data_dir=FOLDER."
      )
  fingerprint = _fingerprint(folder)
  key = f"{name}-{folder.name}-{fingerprint[:24]}-v{_CACHE_FORMAT}"
  arrays = {}
  for split, size in _split_sizes(folder).items():
    x_path = host.cache_dir() / f"{key}-{split}-x.npy"
    y_path = host.cache_dir() / f"{key}-{split}-y.npy"
    x = _open_cached(x_path, np.uint8, (size, *info.image_shape))
    y = _open_cached(y_path, np.int32, (size,))
    if x is None or y is None:
      decoded = _decode(folder, split, size, info.image_shape)
      for path, array in zip((x_path, y_path), decoded, strict=True):
        _write_atomically(path, array)
      x = _open_cached(x_path, np.uint8, (size, *info.image_shape))
      y = _open_cached(y_path, np.int32, (size,))
      if x is None or y is None:
        raise errors.UserError(
          f"{x_path} and its labels could not be read back after they were "
          "written. Check the disk, or set MPQFL_CACHE_DIR to another folder."
        )
    arrays[split] = x, y
  return Dataset(
    name=name,
    x_train=arrays["train"][0],
    y_train=arrays["train"][1],
    x_test=arrays["test"][0],
    y_test=arrays["test"][1],
    class_names=info.class_names,
    mean=np.array(info.mean, np.float32),
    std=np.array(info.std, np.float32),
    source=f"TFDS {name} {folder.name}, sha256 {fingerprint[:12]}",
  )


def _data_root(data_dir: str | None) -> pathlib.Path:
  if data_dir is None:
    # TFDS's own rule, so that a cached set needs no import of TFDS.
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return pathlib.Path(default).expanduser()
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise errors.UserError(
      f"--data_dir={data_dir} is not a folder. Give the folder that holds "
      "data sets in the layout of TensorFlow Datasets (NAME/VERSION/...), or "
      "leave it out for TFDS's own."
    )
  return root


def _prepared_folder(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """The folder of the newest version with array_record files, if any."""
  found = [
    path
    for path in (root / name).glob("*.*.*")
    if (path / "dataset_info.json").is_file()
    and any(path.glob(f"{name}-*.array_record*"))
    and all(part.isdecimal() for part in path.name.split("."))
  ]

  def version(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.name.split("."))

  return max(found, key=version, default=None)


def _fingerprint(folder: pathlib.Path) -> str:
  """SHA-256 over the description and every data file: 50 MB, 0.1 s."""
  digest = hashlib.sha256()
  paths = [folder / "dataset_info.json", folder / "features.json"]
  for path in [*paths, *sorted(folder.glob("*.array_record*"))]:
    try:
      with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      raise errors.UserError(
        f"cannot read {path} ({error.strerror}). Prepare the data set again, "
        "or give another --data_dir."
      ) from error
    digest.update(f"{path.name} {content}\n".encode())
  return digest.hexdigest()


def _split_sizes(folder: pathlib.Path) -> dict[str, int]:
  path = folder / "dataset_info.json"
  try:
    splits = json.loads(path.read_text())["splits"]
    sizes = {
      split["name"]: sum(int(length) for length in split["shardLengths"])
      for split in splits
    }
    return {split: sizes[split] for split in ("train", "test")}
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
      f"{path} does not describe a train and a test split ({error!r}). "
      "Prepare the data set again, or give another --data_dir."
    ) from error


def _import_tfds() -> Any:
  needed = ("tensorflow_datasets", "array_record", "importlib_resources")
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  if missing:
    raise errors.UserError(
      f"reading a full data set needs {', '.join(missing)}, which is not "
      'installed: pip install "mpqfl_jax[tfds]". The embedded samples '
      f"({', '.join(SAMPLES)}) need nothing."
    )
  import tensorflow_datasets as tfds

  return tfds


def _prepare(name: str, root: pathlib.Path) -> None:
  """Downloads and prepares a set, where TensorFlow is installed."""
  sample = next((s for s, info in SAMPLES.items() if info.full == name), None)
  embedded = f"use --dataset={sample}, the embedded sample, or " * bool(sample)
  way_out = (
    f"{embedded}give the folder that holds the full set (--data_dir=FOLDER), "
    'or, with a network, pip install "mpqfl_jax[prepare]" and start again to '
    "download it"
  )
  problem = (
    f"the full set {name} is not on this machine: {way_out}. Looked for: "
    f"{root}/{name}/VERSION/*.array_record*"
  )
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(f"{problem}; and TensorFlow is not installed.")
  tfds = _import_tfds()
  try:
    builder = tfds.builder(name, data_dir=str(root))
    builder.download_and_prepare(file_format="array_record")
  except Exception as error:  # whatever the network or the disk comes up with
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise errors.UserError(
      f"{problem}; and preparing it failed: {lines[0]}."
    ) from error


def _decode(
  folder: pathlib.Path, split: str, size: int, image_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes one split into images (uint8) and labels (int32)."""
  tfds = _import_tfds()
  # In memory, not in the mapped file: a full disk is then an error, where
  # writing through a map would kill the process.
  x = np.empty((size, *image_shape), np.uint8)
  y = np.empty(size, np.int32)
  try:
    # From files alone: no builder code and no look-up in a bucket.
    builder = tfds.builder_from_directory(str(folder))
    source = builder.as_data_source(split)
    name = f"decoding {builder.info.name} {split}"
    bar = tqdm.tqdm(
      total=size, desc=name, unit="image", leave=None, disable=None
    )
    with bar:
      for start in range(0, size, _DECODE_BATCH):
        rows = range(start, min(start + _DECODE_BATCH, size))
        examples = source.__getitems__(list(rows))
        x[rows.start : rows.stop] = [e["image"] for e in examples]
        y[rows.start : rows.stop] = [e["label"] for e in examples]
        bar.update(len(rows))
  except Exception as error:  # array_record raises whatever Abseil does
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise errors.UserError(
      f"{folder} cannot be decoded ({split}: {lines[0]}). Prepare the data "
      "set again, or give another --data_dir."
    ) from error
  return x, y


# The cache of decoded arrays.


def _open_cached(
  path: pathlib.Path, dtype: Any, shape: tuple[int, ...]
) -> np.ndarray | None:
  """Maps a cached array; None where it is missing, damaged or another's."""
  try:
    array = np.lib.format.open_memmap(path, mode="r")
  except Exception:  # a damaged header fails in many ways; all mean: decode
    return None
  whole = (
    array.dtype == dtype
    and array.shape == shape
    and array.flags.c_contiguous
    and path.stat().st_size == array.offset + array.nbytes
  )
  return array if whole else None


def _write_atomically(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes beside `path` and moves into place: all or nothing, last one wins.

  Two processes that decode the same set both write the same bytes, each into
  a file of its own; a reader sees either file whole.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(
      dir=path.parent, prefix=path.stem, suffix=".partial"
    )
    try:
      with os.fdopen(handle, "wb") as file:
        np.save(file, array)
      os.replace(partial, path)
    finally:
      pathlib.Path(partial).unlink(missing_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"cannot write the cache of decoded images {path} ({error}). Set "
      "MPQFL_CACHE_DIR to a folder with room for it."
    ) from error
