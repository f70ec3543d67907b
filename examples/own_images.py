"""Images of your own: a NumPy file, and a folder of pictures.

    python examples/own_images.py

On the command line: `--dataset=images.npz` or `--dataset=./pictures`.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

from experiments import config, main

place = pathlib.Path(sys.argv[1] if sys.argv[1:] else "runs") / "own_images"
rng = np.random.default_rng(0)
arrays = {}
for split, count in (("train", 400), ("test", 100)):
  y = np.arange(count) % 2  # vertical stripes or horizontal ones
  x = rng.integers(0, 120, (count, 28, 28))
  x[y == 0, :, ::4] += 120
  x[y == 1, ::4, :] += 120
  arrays[f"x_{split}"], arrays[f"y_{split}"] = x.astype(np.uint8), y
  for i in range(count):
    folder = place / "pictures" / split / ("across", "down")[y[i]]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(arrays[f"x_{split}"][i]).save(folder / f"{i}.png")
np.savez(place / "images.npz", **arrays)

for source in ("images.npz", "pictures"):
  main.run(
    config.make(
      dataset=str(place / source),
      model="mlp",
      rounds=3,
      output_dir=str(place / f"run_{source}"),
      overwrite=True,
    )
  )
