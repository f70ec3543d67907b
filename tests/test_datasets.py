"""Data sets: embedded samples against their originals, full sets, mistakes."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
from PIL import Image, features
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets import proto

from mpqfl_jax import datasets, errors

REPOSITORY = pathlib.Path(__file__).parents[1]
TFDS_DIR = pathlib.Path(
  os.environ.get("MPQFL_TFDS_DIR", REPOSITORY.parent / "shared" / "tfds")
)
needs_tfds_dir = pytest.mark.skipif(
  not TFDS_DIR.is_dir(),
  reason=f"no TFDS folder at {TFDS_DIR}: set MPQFL_TFDS_DIR to one",
)
SAMPLES = sorted(datasets.SAMPLES)
# Training and test images.
SIZES = {
  "mnist_sample": (6000, 1000),
  "fashion_mnist_sample": (6000, 1000),
  "cifar10_sample": (3000, 1000),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache of each test's own."""
  folder = tmp_path / "cache"
  monkeypatch.setenv("MPQFL_CACHE_DIR", str(folder))
  return folder


# Embedded samples.


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_is_whole_and_balanced(name):
  data = datasets.load(name)
  shape = (32, 32, 3) if name == "cifar10_sample" else (28, 28, 1)
  num_train, num_test = SIZES[name]
  assert data.name == name
  assert data.x_train.shape == (num_train, *shape)
  assert data.x_test.shape == (num_test, *shape)
  assert data.x_train.dtype == data.x_test.dtype == np.uint8
  assert data.y_train.dtype == data.y_test.dtype == np.int32
  assert np.bincount(data.y_train).tolist() == [num_train // 10] * 10
  assert np.bincount(data.y_test).tolist() == [num_test // 10] * 10
  assert len(data.class_names) == 10
  assert "\n" not in data.source


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_is_distinct_and_in_no_order(name):
  data = datasets.load(name)
  for rows, labels, full in zip(
    datasets.sample_indices(name),
    (data.y_train, data.y_test),
    (50_000 if name == "cifar10_sample" else 60_000, 10_000),
    strict=True,
  ):
    assert len(np.unique(rows)) == len(rows) == len(labels)
    assert rows.min() >= 0
    assert rows.max() < full
    # Neighbours agree in 1 label of 10, within five deviations.
    agree = np.mean(labels[1:] == labels[:-1])
    assert abs(agree - 0.1) < 5 * np.sqrt(0.09 / len(labels))
  train = {image.tobytes() for image in data.x_train}
  assert not any(image.tobytes() in train for image in data.x_test)


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_has_the_moments_of_the_full_set(name):
  """The published moments, within five errors of the sample.

  The error of a mean over independent images is the deviation of the images'
  own means over the root of their number; so for the second moment.
  """
  data = datasets.load(name)
  x = data.x_train.astype(np.float64) / 255
  assert data.mean.dtype == data.std.dtype == np.float32
  assert data.mean.shape == data.std.shape == (x.shape[-1],)
  first = x.mean((1, 2))
  second = np.square(x).mean((1, 2))
  for values, expected in (
    (first, data.mean),
    (second, data.mean**2 + data.std**2),
  ):
    error = values.std(0) / np.sqrt(len(values))
    assert (np.abs(values.mean(0) - expected) < 5 * error).all()


@pytest.mark.parametrize(
  ("name", "least"),
  [
    ("mnist_sample", 0.75),
    ("fashion_mnist_sample", 0.6),
    ("cifar10_sample", 0.2),
  ],
)
def test_labels_belong_to_their_images(name, least):
  """The nearest class mean beats chance as far as it should."""
  data = datasets.load(name)
  train = data.x_train.reshape(len(data.x_train), -1).astype(np.float64)
  test = data.x_test.reshape(len(data.x_test), -1).astype(np.float64)
  means = np.stack([train[data.y_train == k].mean(0) for k in range(10)])
  distance = np.square(means).sum(1) - 2 * test @ means.T
  assert np.mean(distance.argmin(1) == data.y_test) > least


def test_samples_fit_in_twelve_megabytes():
  files = list((pathlib.Path(datasets.__file__).parent / "data").iterdir())
  assert sum(file.stat().st_size for file in files) <= 12e6


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("kind", ["webp", "npz"])
@pytest.mark.parametrize("fault", ["missing", "one bit", "truncated", "empty"])
def test_damaged_sample_is_one_clear_line(
  name, kind, fault, tmp_path, monkeypatch
):
  folder = tmp_path / "data"
  shutil.copytree(pathlib.Path(datasets.__file__).parent / "data", folder)
  path = folder / f"{name}.{kind}"
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  if fault == "missing":
    path.unlink()
  elif fault == "one bit":
    path.write_bytes(raw)
  else:
    os.truncate(path, len(raw) // 2 if fault == "truncated" else 0)
  monkeypatch.setattr(datasets, "_SAMPLE_DIR", folder)
  with pytest.raises(errors.UserError) as mistake:
    datasets.load(name)
  assert str(path) in str(mistake.value)
  assert "Restore it" in str(mistake.value)
  assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 99, 100, 101, 250])
def test_mosaic_is_lossless(channels, n):
  shape = (5, 7, channels)
  images = np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)
  raw = datasets.encode_mosaic(images)
  np.testing.assert_array_equal(datasets.decode_mosaic(raw, n, shape), images)


@needs_tfds_dir
@pytest.mark.parametrize("name", SAMPLES)
def test_sample_equals_its_originals(name):
  """Pixels and labels against what TFDS itself reads at the recorded rows."""
  data = datasets.load(name)
  info = datasets.SAMPLES[name]
  builder = tfds.builder(info.full, data_dir=str(TFDS_DIR))
  assert str(builder.info.version) == info.version
  train, test = datasets.sample_indices(name)
  for split, rows, x, y in (
    ("train", train, data.x_train, data.y_train),
    ("test", test, data.x_test, data.y_test),
  ):
    originals = builder.as_data_source(split).__getitems__(rows.tolist())
    np.testing.assert_array_equal(x, [e["image"] for e in originals])
    np.testing.assert_array_equal(y, [e["label"] for e in originals])


@needs_tfds_dir
@pytest.mark.slow
def test_drawing_again_gives_the_same_samples(tmp_path):
  """Pixels, labels and rows always; bytes where the WebP encoder is the same.

  `data/README.md` says which encoder wrote the mosaics.
  """
  tool = [sys.executable, "tools/draw_samples.py", f"--data_dir={TFDS_DIR}"]
  subprocess.run([*tool, "--check"], cwd=REPOSITORY, check=True)
  subprocess.run(
    [*tool, f"--output_dir={tmp_path}"], cwd=REPOSITORY, check=True
  )
  encoder = f"libwebp {features.version('webp')}"
  readme = REPOSITORY / "mpqfl_jax" / "data" / "README.md"
  same_encoder = encoder in readme.read_text()
  for name, info in datasets.SAMPLES.items():
    labels = (tmp_path / f"{name}.npz").read_bytes()
    assert hashlib.sha256(labels).hexdigest() == info.labels_sha256
    images = (tmp_path / f"{name}.webp").read_bytes()
    if same_encoder:
      assert hashlib.sha256(images).hexdigest() == info.images_sha256
  if not same_encoder:
    pytest.skip(f"bytes not compared: {encoder} did not write the mosaics")


# Full sets, from a small TFDS folder made here.


def write_set(root: pathlib.Path, sizes: dict[str, int], seed: int) -> dict:
  """Writes an `mnist` 3.0.1 of random images in TFDS's layout."""
  folder = root / "mnist" / "3.0.1"
  folder.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  arrays = {}
  for split, size in sizes.items():
    x = rng.integers(0, 256, (size, 28, 28, 1), np.uint8)
    y = rng.integers(0, 10, size)
    path = folder / f"mnist-{split}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for image, label in zip(x, y, strict=True):
      png = io.BytesIO()
      Image.fromarray(image[..., 0]).save(png, "PNG")
      example = proto.tf_example_pb2.Example()
      feature = example.features.feature
      feature["image"].bytes_list.value.append(png.getvalue())
      feature["label"].int64_list.value.append(int(label))
      writer.write(example.SerializeToString())
    writer.close()
    arrays[split] = x, y
  kinds = "tensorflow_datasets.core.features"
  (folder / "features.json").write_text(
    json.dumps(
      {
        "pythonClassName": f"{kinds}.features_dict.FeaturesDict",
        "featuresDict": {
          "features": {
            "image": {
              "pythonClassName": f"{kinds}.image_feature.Image",
              "image": {
                "dtype": "uint8",
                "shape": {"dimensions": ["28", "28", "1"]},
              },
            },
            "label": {
              "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
              "classLabel": {"numClasses": "10"},
            },
          }
        },
      }
    )
  )
  (folder / "dataset_info.json").write_text(
    json.dumps(
      {
        "name": "mnist",
        "version": "3.0.1",
        "fileFormat": "array_record",
        "moduleName": "tensorflow_datasets.image_classification.mnist",
        "splits": [
          {
            "name": split,
            "numBytes": "1",
            "shardLengths": [str(size)],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
          }
          for split, size in sizes.items()
        ],
      }
    )
  )
  return arrays


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A TFDS folder and its arrays; the last batch of a split is not full."""
  monkeypatch.setattr(datasets, "_DECODE_BATCH", 50)
  root = tmp_path / "tfds"
  return root, write_set(root, {"train": 123, "test": 57}, seed=0)


def assert_holds(data: datasets.Dataset, arrays: dict) -> None:
  np.testing.assert_array_equal(data.x_train, arrays["train"][0])
  np.testing.assert_array_equal(data.y_train, arrays["train"][1])
  np.testing.assert_array_equal(data.x_test, arrays["test"][0])
  np.testing.assert_array_equal(data.y_test, arrays["test"][1])
  assert data.x_train.dtype == data.x_test.dtype == np.uint8
  assert data.y_train.dtype == data.y_test.dtype == np.int32


def refuse_to_decode(*args):
  raise AssertionError("decoded what is cached")


def test_full_set_is_decoded_once_and_mapped(small, cache, monkeypatch):
  root, arrays = small
  assert_holds(datasets.load("mnist", str(root)), arrays)
  assert len(list(cache.iterdir())) == 4
  monkeypatch.setattr(datasets, "_decode", refuse_to_decode)
  data = datasets.load("mnist", str(root))
  assert_holds(data, arrays)
  assert isinstance(data.x_train, np.memmap)
  assert not data.x_train.flags.writeable


def test_default_folder_is_the_one_of_tfds(small, monkeypatch):
  root, arrays = small
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  assert_holds(datasets.load("mnist"), arrays)


def test_cache_folder_honours_xdg(small, tmp_path, monkeypatch):
  monkeypatch.delenv("MPQFL_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  datasets.load("mnist", str(small[0]))
  assert len(list((tmp_path / "xdg" / "mpqfl_jax").iterdir())) == 4


def test_newest_version_is_read(small):
  root, arrays = small
  older = root / "mnist" / "3.0.0"
  shutil.copytree(root / "mnist" / "3.0.1", older)
  for path in older.glob("*.array_record*"):
    path.write_bytes(b"")
  assert_holds(datasets.load("mnist", str(root)), arrays)


def test_cache_does_not_confuse_folders(small, tmp_path):
  """Same name, version, sizes: other images."""
  root, arrays = small
  other_root = tmp_path / "other"
  other = write_set(other_root, {"train": 123, "test": 57}, seed=1)
  for _ in range(2):
    assert_holds(datasets.load("mnist", str(root)), arrays)
    assert_holds(datasets.load("mnist", str(other_root)), other)


@pytest.mark.parametrize(
  "fault",
  ["truncated", "longer", "empty", "type", "shape", "header", "zip", "gone"],
)
@pytest.mark.parametrize("which", ["train-x", "train-y", "test-x", "test-y"])
def test_damaged_cache_is_rebuilt(small, cache, which, fault):
  root, arrays = small
  datasets.load("mnist", str(root))
  (path,) = cache.glob(f"*-{which}.npy")
  array = np.load(path)
  if fault == "truncated":
    os.truncate(path, path.stat().st_size - 1)
  elif fault == "longer":
    path.write_bytes(path.read_bytes() + b"\0")
  elif fault == "empty":
    os.truncate(path, 0)
  elif fault == "type":
    np.save(path, array.astype(np.float32))
  elif fault == "shape":
    np.save(path, array[:-1])
  elif fault == "header":
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + b"([{" + raw[23:])
  elif fault == "zip":
    path.write_bytes(b"PK\3\4" + bytes(200))
  else:
    path.unlink()
  assert_holds(datasets.load("mnist", str(root)), arrays)
  assert not list(cache.glob("*.partial"))


LOAD_OFFLINE = """
import socket, sys

def no_network(*args, **kwargs):
  raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = no_network
from mpqfl_jax import datasets
data = datasets.load("mnist", sys.argv[1])
assert "tensorflow" not in sys.modules
print(data.x_train.sum(), data.x_test.sum(), flush=True)
"""


def test_two_processes_offline_without_tensorflow(small, cache):
  root, arrays = small
  command = [sys.executable, "-c", LOAD_OFFLINE, str(root)]
  running = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    for _ in range(2)
  ]
  expected = f"{arrays['train'][0].sum()} {arrays['test'][0].sum()}"
  for process in running:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.strip() == expected
  assert len(list(cache.iterdir())) == 4


@needs_tfds_dir
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(datasets.FULL_SETS))
def test_full_set(name):
  """Published sizes, moments and names of classes.

  CIFAR-10's copy may have been through JPEG, which takes 0.7% off its
  deviation.
  """
  data = datasets.load(name, str(TFDS_DIR))
  info = datasets.FULL_SETS[name]
  train = 50_000 if name == "cifar10" else 60_000
  assert data.x_train.shape == (train, *info.image_shape)
  assert data.x_test.shape == (10_000, *info.image_shape)
  x = data.x_train.reshape(-1, info.image_shape[-1])
  np.testing.assert_allclose(x.mean(0) / 255, data.mean, atol=3e-4)
  tolerance = 2e-3 if name == "cifar10" else 3e-4
  np.testing.assert_allclose(x.std(0) / 255, data.std, atol=tolerance)
  if name == "cifar10":
    # TFDS learns these names from the download. Krizhevsky's order is
    # alphabetical.
    names = sorted(data.class_names)
  else:
    names = tfds.builder(name).info.features["label"].names
  assert list(data.class_names) == list(names)


# Mistakes around full sets.


def load_wrongly(name: str, data_dir: pathlib.Path | str | None) -> str:
  with pytest.raises(errors.UserError) as mistake:
    datasets.load(name, None if data_dir is None else str(data_dir))
  message = str(mistake.value)
  assert "\n" not in message
  return message


def hide(monkeypatch, *hidden: str) -> None:
  """Makes packages look as if they were not installed."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name in hidden else find_spec(name),
  )


def test_unknown_name():
  assert "Did you mean 'mnist_sample'" in load_wrongly("mnist_sampel", None)


def test_missing_folder(tmp_path):
  assert f"{tmp_path / 'no'} is not a folder" in load_wrongly(
    "mnist", tmp_path / "no"
  )


@pytest.mark.parametrize("layout", ["empty", "tfrecord"])
def test_unprepared_without_tensorflow(layout, tmp_path, monkeypatch):
  hide(monkeypatch, "tensorflow")
  if layout == "tfrecord":
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "mnist-train.tfrecord-00000-of-00001").write_text("")
  message = load_wrongly("mnist", tmp_path)
  assert str(tmp_path / "mnist") in message
  assert "--data_dir" in message
  assert 'pip install "mpqfl_jax[prepare]"' in message
  # What works at once comes first.
  first = message.split(", or ")[0]
  assert "use --dataset=mnist_sample, the embedded sample" in first


def test_missing_extra(small, monkeypatch):
  hide(monkeypatch, "array_record")
  message = load_wrongly("mnist", small[0])
  assert "array_record" in message
  assert 'pip install "mpqfl_jax[tfds]"' in message


class FakeTfds:
  """TFDS with a TensorFlow that prepares as `prepare` says."""

  def __init__(self, prepare):
    self.prepare = prepare
    self.asked = []

  def builder(self, name, data_dir):
    self.asked.append((name, data_dir))
    return self

  def download_and_prepare(self, file_format):
    self.asked.append(file_format)
    self.prepare()

  def builder_from_directory(self, folder):
    return tfds.builder_from_directory(folder)


def with_tensorflow(monkeypatch, prepare) -> FakeTfds:
  fake = FakeTfds(prepare)
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: find_spec("numpy" if name == "tensorflow" else name),
  )
  monkeypatch.setattr(datasets, "_import_tfds", lambda: fake)
  return fake


def test_unprepared_with_tensorflow_is_prepared(small, tmp_path, monkeypatch):
  root, arrays = small
  empty = tmp_path / "empty"
  empty.mkdir()
  fake = with_tensorflow(
    monkeypatch,
    lambda: shutil.copytree(root / "mnist", empty / "mnist"),
  )
  assert_holds(datasets.load("mnist", str(empty)), arrays)
  assert fake.asked == [("mnist", str(empty)), "array_record"]


def test_failed_download(tmp_path, monkeypatch):
  def fail():
    raise ConnectionError("no route to host\nand more")

  with_tensorflow(monkeypatch, fail)
  message = load_wrongly("mnist", tmp_path)
  assert "no route to host" in message
  assert "--data_dir" in message


def test_prepared_in_another_format(tmp_path, monkeypatch):
  """TFDS leaves a set alone that is there, whatever its format."""
  with_tensorflow(monkeypatch, lambda: None)
  assert "not as array_record" in load_wrongly("mnist", tmp_path)


@pytest.mark.parametrize("fault", ["truncated", "empty", "bits", "gone"])
def test_damaged_records(small, fault):
  root, _ = small
  (path,) = root.glob("mnist/3.0.1/mnist-test.array_record*")
  raw = bytearray(path.read_bytes())
  # The first record, after the file's header.
  raw[200:300] = bytes(100)
  if fault == "truncated":
    os.truncate(path, len(raw) // 2)
  elif fault == "empty":
    os.truncate(path, 0)
  elif fault == "bits":
    path.write_bytes(raw)
  else:
    path.unlink()
  message = load_wrongly("mnist", root)
  assert str(root / "mnist" / "3.0.1") in message
  assert "Prepare the data set again" in message


@pytest.mark.parametrize(
  "content", ["", "{}", '{"splits": [{"name": "train"}]}']
)
def test_damaged_description(small, content):
  root, _ = small
  path = root / "mnist" / "3.0.1" / "dataset_info.json"
  path.write_text(content)
  assert str(path) in load_wrongly("mnist", root)


def test_cache_that_cannot_be_written(small, tmp_path, monkeypatch):
  occupied = tmp_path / "file"
  occupied.write_text("")
  monkeypatch.setenv("MPQFL_CACHE_DIR", str(occupied))
  assert "MPQFL_CACHE_DIR" in load_wrongly("mnist", small[0])
