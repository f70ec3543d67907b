"""Images of one's own: the same set from arrays, a file and a folder."""

import numpy as np
from PIL import Image
import pytest

from mpqfl_jax import errors, own_images


def _arrays(channels=(), count=6):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (count, 12, 14, *channels), np.uint8)
  return x, np.arange(count) % 2, x[:4], np.arange(4) % 2


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_file_and_a_folder_are_the_arrays(tmp_path, channels):
  arrays = _arrays(channels)
  names = ("x_train", "y_train", "x_test", "y_test")
  np.savez(tmp_path / "mine.npz", **dict(zip(names, arrays, strict=True)))
  for split, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
      folder = tmp_path / "mine" / split / "ab"[label]
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.squeeze(image)).save(folder / f"{i}.png")
  file = own_images.load(str(tmp_path / "mine.npz"))
  folder = own_images.load(str(tmp_path / "mine"))
  assert file.class_names == ("0", "1") and folder.class_names == ("a", "b")
  assert file.name == folder.name == "mine"
  x = arrays[0].reshape(6, 12, 14, -1)
  np.testing.assert_array_equal(file.x_train, x)
  by_class = np.argsort(arrays[1], kind="stable")
  np.testing.assert_array_equal(folder.x_train, x[by_class])
  np.testing.assert_array_equal(folder.y_train, arrays[1][by_class])
  for found in (file, folder):
    np.testing.assert_allclose(found.mean, (x / 255).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std, (x / 255).std((0, 1, 2)), rtol=1e-5)


def test_a_constant_channel_is_only_shifted():
  x, y, *_ = _arrays()
  found = own_images.from_arrays("c", x * 0 + 51, y, x, y)
  assert found.mean.item() == pytest.approx(0.2) and found.std.item() == 1


@pytest.mark.parametrize(
  "place, change, words",
  [
    (0, lambda x: x / 255, "float64"),
    (0, lambda x: x[:, :5], "at least 11"),
    (0, lambda x: x[:0], "1 integers|0 integers"),
    (1, lambda y: y[:3], "6 integers"),
    (1, lambda y: y * 1.0, "float64"),
    (1, lambda y: y - 1, "from -1"),
    (2, lambda x: x[:, :, :12], "one size"),
    (3, lambda y: y * 0 + 7, "Expected 0"),
  ],
)
def test_other_arrays_are_refused(place, change, words):
  arrays = list(_arrays())
  arrays[place] = change(arrays[place])
  if "Expected 0" in words:
    with pytest.raises(errors.UserError, match=words):
      own_images.from_arrays("mine", *arrays, class_names=("a", "b"))
  else:
    with pytest.raises(errors.UserError, match=words):
      own_images.from_arrays("mine", *arrays)


def test_files_and_folders_of_another_form_are_refused(tmp_path):
  def refused(path, words):
    with pytest.raises(errors.UserError, match=words):
      own_images.load(str(path))

  refused(tmp_path / "none.npz", "no data set at")
  (tmp_path / "text.npz").write_text("no archive")
  refused(tmp_path / "text.npz", "cannot read")
  np.savez(tmp_path / "half.npz", x_train=np.zeros(3))
  refused(tmp_path / "half.npz", "has no y_train, x_test, y_test")
  folder = tmp_path / "pictures"
  folder.mkdir()
  refused(folder, "no folder")
  for split in own_images.SPLITS:
    (folder / split / "a").mkdir(parents=True)
  refused(folder, "no pictures")
  for split in own_images.SPLITS:
    Image.new("L", (12, 12)).save(folder / split / "a" / "1.png")
  refused(folder, "with 1 classes")
  Image.new("L", (13, 12)).save(folder / "train" / "a" / "2.png")
  refused(folder, "of one size")
  (folder / "train" / "a" / "2.png").write_text("no picture")
  refused(folder, "cannot read")
  (folder / "train" / "a" / "2.png").unlink()
  (folder / "test" / "b").mkdir()
  refused(folder, "a class that")
  (folder / "train" / "b").mkdir()
  Image.new("L", (12, 12)).save(folder / "train" / "b" / "1.png")
  refused(folder, "no pictures of the class 'b' in .*test/b")
  (folder / "test" / "b").rmdir()
  refused(folder, "no pictures of the class 'b' in .*test/b")
