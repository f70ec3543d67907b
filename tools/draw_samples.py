"""Draws the embedded samples from a TensorFlow Datasets folder.

  python tools/draw_samples.py --data_dir=FOLDER

The draw depends on nothing but `SEED`, the set's name and the row numbers:
rows are ranked by SHA-256, and the first so many of each class are kept, in
the order of their rank. No random number generator is involved, so that any
version of NumPy draws the same rows. The files' bytes depend on Pillow's WebP
encoder as well; `--check` compares pixels, labels and rows instead of bytes.
"""

import argparse
import hashlib
import pathlib
import sys

import numpy as np

from mpqfl_jax import datasets, errors

SEED = 20221013
# Images of the training and of the test split.
SIZES = {
  "mnist_sample": (6000, 1000),
  "fashion_mnist_sample": (6000, 1000),
  "cifar10_sample": (3000, 1000),
}


def draw(name: str, split: str, labels: np.ndarray, size: int) -> np.ndarray:
  """Rows of a class-balanced sample, in a random order.

  Args:
    name: the full set's name.
    split: `train` or `test`.
    labels: [examples], the split's labels.
    size: rows to draw, a multiple of the number of classes.

  Returns:
    [size], int64.
  """
  classes = int(labels.max()) + 1
  if size % classes:
    raise ValueError(f"{size} rows do not divide among {classes} classes")
  rank = [
    hashlib.sha256(f"{SEED}/{name}/{split}/{row}".encode()).digest()
    for row in range(len(labels))
  ]
  order = np.array(sorted(range(len(labels)), key=rank.__getitem__))
  kept = [order[labels[order] == k][: size // classes] for k in range(classes)]
  return order[np.isin(order, np.concatenate(kept))]


def sample(
  name: str, full: datasets.Dataset
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The images, training before test, and the labels and rows of a sample."""
  num_train, num_test = SIZES[name]
  train = draw(full.name, "train", full.y_train, num_train)
  test = draw(full.name, "test", full.y_test, num_test)
  images = np.concatenate([full.x_train[train], full.x_test[test]])
  labels = {
    "y_train": full.y_train[train].astype(np.uint8),
    "y_test": full.y_test[test].astype(np.uint8),
    "train_index": train.astype("<u4"),
    "test_index": test.astype("<u4"),
  }
  return images, labels


def check(
  name: str, images: np.ndarray, labels: dict[str, np.ndarray]
) -> list[str]:
  """What differs between the embedded sample and a fresh draw."""
  embedded = datasets.load(name)
  train, test = datasets.sample_indices(name)
  pairs = {
    "images": (np.concatenate([embedded.x_train, embedded.x_test]), images),
    "y_train": (embedded.y_train, labels["y_train"]),
    "y_test": (embedded.y_test, labels["y_test"]),
    "train_index": (train, labels["train_index"]),
    "test_index": (test, labels["test_index"]),
  }
  return [key for key, (a, b) in pairs.items() if not np.array_equal(a, b)]


def main() -> int:
  parser = argparse.ArgumentParser(
    description="Draw the embedded samples from a TFDS folder."
  )
  parser.add_argument("--data_dir", required=True, help="the TFDS folder")
  parser.add_argument(
    "--output_dir",
    type=pathlib.Path,
    default=pathlib.Path(datasets.__file__).parent / "data",
    help="where to write (default: inside the package)",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="write nothing; compare the embedded samples with a fresh draw",
  )
  args = parser.parse_args()
  failed = False
  for name in SIZES:
    full = datasets.load(datasets.SAMPLES[name].full, args.data_dir)
    images, labels = sample(name, full)
    if args.check:
      differing = check(name, images, labels)
      failed |= bool(differing)
      print(f"{name}: {', '.join(differing) or 'nothing'} differs")
      continue
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [args.output_dir / f"{name}.{kind}" for kind in ("webp", "npz")]
    paths[0].write_bytes(datasets.encode_mosaic(images))
    np.savez(paths[1], **labels)
    print(f"{name} ({full.source})")
    for path in paths:
      digest = hashlib.sha256(path.read_bytes()).hexdigest()
      print(f"  {digest}  {path.name}, {path.stat().st_size:,} bytes")
  return int(failed)


if __name__ == "__main__":
  try:
    sys.exit(main())
  except errors.UserError as mistake:
    print(mistake, file=sys.stderr)
    sys.exit(2)
