"""Data sets of one's own: arrays, a NumPy file, a folder of pictures."""

from collections.abc import Sequence
import pathlib

import numpy as np
from PIL import Image

from mpqfl_jax import errors
from mpqfl_jax.datasets import Dataset

SPLITS = ("train", "test")
_LEAST_SIDE = 11
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORM = (
  "Expected a NumPy file (.npz) with x_train, y_train, x_test and y_test, or a"
  " folder with pictures as train/CLASS/NAME.png and test/CLASS/NAME.png."
)


def is_path(name: str) -> bool:
  """Whether a name of `--dataset` is a file or a folder, not a known set."""
  return name.endswith(".npz") or "/" in name or "\\" in name


def load(path: str) -> Dataset:
  """Reads a `.npz` file or a folder of pictures.

  Args:
    path: the file, with the arrays of `from_arrays`; or the folder, with one
      folder a class in each of `train` and `test`, pictures of one size in it.

  Raises:
    UserError: nothing is there, or it is of another form.
  """
  place = pathlib.Path(path)
  if place.is_dir():
    return _folder(place)
  if place.suffix != ".npz" or not place.is_file():
    raise errors.UserError(f"no data set at {path}. {_FORM}")
  try:
    with np.load(place) as file:
      arrays = {name: file[name] for name in file.files}
  except (OSError, ValueError) as e:
    raise errors.UserError(f"cannot read {path}: {e}. {_FORM}") from e
  names = [f"{kind}_{split}" for split in SPLITS for kind in "xy"]
  missing = [name for name in names if name not in arrays]
  if missing:
    raise errors.UserError(f"{path} has no {', '.join(missing)}. {_FORM}")
  classes = [str(name) for name in arrays.get("class_names", ())]
  x_train, y_train, x_test, y_test = (arrays[name] for name in names)
  return from_arrays(place.stem, x_train, y_train, x_test, y_test, classes)


def from_arrays(
  name: str,
  x_train: np.ndarray,
  y_train: np.ndarray,
  x_test: np.ndarray,
  y_test: np.ndarray,
  class_names: Sequence[str] = (),
) -> Dataset:
  """A data set of arrays; moments for normalising are of `x_train`.

  Args:
    name: for tables.
    x_train, x_test: [examples, height, width] or with a last axis of 1 or 3
      channels, uint8.
    y_train, y_test: [examples] integers, classes from 0.
    class_names: of the classes; their numbers where empty.

  Raises:
    UserError: arrays of another form.
  """
  images = [np.asarray(x) for x in (x_train, x_test)]
  images = [x[..., None] if x.ndim == 3 else x for x in images]
  labels = [np.asarray(y) for y in (y_train, y_test)]
  for split, x, y in zip(SPLITS, images, labels, strict=True):
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
      raise errors.UserError(
        f"x_{split} of {name} is {x.dtype} of shape {list(x.shape)}. Expected"
        " uint8 of [examples, height, width, channels] with 1 or 3 channels."
      )
    if min(x.shape[1:3]) < _LEAST_SIDE:
      raise errors.UserError(
        f"images of {name} are {x.shape[1]} by {x.shape[2]}. Expected at least"
        f" {_LEAST_SIDE} pixels a side, the window of structural similarity."
      )
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
      raise errors.UserError(
        f"y_{split} of {name} is {y.dtype} of shape {list(y.shape)}. Expected"
        f" {len(x)} integers, one for each image."
      )
    if not len(x):
      raise errors.UserError(f"x_{split} of {name} is empty. Expected images.")
  if images[0].shape[1:] != images[1].shape[1:]:
    raise errors.UserError(
      f"{name}: images to train on are {list(images[0].shape[1:])}, those to"
      f" test on {list(images[1].shape[1:])}. Expected one size."
    )
  together = np.concatenate(labels)
  classes = tuple(class_names) or tuple(
    str(i) for i in range(int(together.max()) + 1)
  )
  if together.min() < 0 or together.max() >= len(classes) or len(classes) < 2:
    raise errors.UserError(
      f"{name}: labels go from {together.min()} to {together.max()} with"
      f" {len(classes)} classes. Expected 0 to one below the number of classes,"
      " which is at least 2."
    )
  mean, std = _moments(images[0])
  return Dataset(
    name,
    images[0],
    labels[0].astype(np.int32),
    images[1],
    labels[1].astype(np.int32),
    classes,
    mean,
    std,
    f"images of one's own, {len(images[0])} to train on",
  )


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel, of images in [0, 1]."""
  counts = np.stack(
    [np.bincount(x[..., c].ravel(), minlength=256) for c in range(x.shape[-1])]
  )
  values = np.arange(256) / 255
  share = counts / counts.sum(1, keepdims=True)
  mean = share @ values
  std = np.sqrt(share @ values**2 - mean**2)
  # A channel that never changes is only shifted.
  return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _folder(place: pathlib.Path) -> Dataset:
  for split in SPLITS:
    if not (place / split).is_dir():
      raise errors.UserError(f"no folder {place / split}. {_FORM}")
  classes = sorted(
    entry.name for entry in (place / "train").iterdir() if entry.is_dir()
  )
  arrays = []
  for split in SPLITS:
    found = sorted(
      entry.name for entry in (place / split).iterdir() if entry.is_dir()
    )
    unknown = sorted(set(found) - set(classes))
    if unknown:
      raise errors.UserError(
        f"{place / split / unknown[0]} is a class that"
        f" {place / 'train'} does not have. {_FORM}"
      )
    files = []
    for label, name in enumerate(classes):
      here = place / split / name
      mine = [
        f for f in sorted(here.glob("*")) if f.suffix.lower() in _SUFFIXES
      ]
      if not mine:
        raise errors.UserError(
          f"no pictures of the class {name!r} in {here}. {_FORM} Every class"
          " needs some in both."
        )
      files += [(file, label) for file in mine]
    if not files:
      raise errors.UserError(f"no pictures in {place / split}. {_FORM}")
    arrays += [_pictures([file for file, _ in files])]
    arrays += [np.array([label for _, label in files], np.int32)]
  x_train, y_train, x_test, y_test = arrays
  return from_arrays(place.name, x_train, y_train, x_test, y_test, classes)


def _pictures(files: list[pathlib.Path]) -> np.ndarray:
  pictures = []
  for file in files:
    try:
      with Image.open(file) as picture:
        grey = picture.mode in ("1", "L", "LA")
        pictures.append(np.asarray(picture.convert("L" if grey else "RGB")))
    except OSError as e:
      raise errors.UserError(f"cannot read {file}: {e}.") from e
    if pictures[-1].shape != pictures[0].shape:
      raise errors.UserError(
        f"{file} is {list(pictures[-1].shape)}, {files[0]} is"
        f" {list(pictures[0].shape)}. Expected pictures of one size and kind;"
        " resize them first."
      )
  return np.stack(pictures)
