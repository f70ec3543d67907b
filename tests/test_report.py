"""The report, on runs made up of real images and invented results."""

import json
import pathlib
import re

import numpy as np
import scipy.ndimage

from mpqfl_jax import metrics

# name: (accuracy, bytes, epsilon, {(attack, knowledge): (blur, noise)})
DEFENSES = {
  "none": (
    0.968,
    53_456,
    None,
    {("dlg", "blind"): (0.0, 0.01), ("map", "adaptive"): (0.0, 0.004)},
  ),
  "paper": (
    0.964,
    9_204,
    None,
    {("dlg", "blind"): (2.5, 0.3), ("map", "adaptive"): (0.4, 0.03)},
  ),
  "mixed_random": (
    0.959,
    7_480,
    None,
    {("dlg", "blind"): (2.5, 0.35), ("map", "adaptive"): (0.6, 0.05)},
  ),
  "int2": (
    0.951,
    3_412,
    None,
    {("dlg", "blind"): (2.0, 0.5), ("map", "adaptive"): (1.4, 0.1)},
  ),
  "prune": (
    0.962,
    10_691,
    None,
    {("dlg", "blind"): (1.0, 0.12), ("map", "adaptive"): (0.8, 0.06)},
  ),
  "dp_gaussian(noise_multiplier=0.1)": (
    0.894,
    53_456,
    3.21,
    {("dlg", "blind"): (6.0, 0.5), ("map", "adaptive"): (9.0, 0.4)},
  ),
}


def fake_run(
  folder,
  images,
  labels,
  *,
  defenses=DEFENSES,
  knowledge=("blind", "adaptive"),
  task="train",
  rounds=30,
  seed=0,
):
  """Writes a run's folder: real images, blurred and noised, as attacks.

  Args:
    folder: where.
    images: [n, height, width, channels] in [0, 1], the first 8 attacked.
    labels: [n].
    defenses: as `DEFENSES`.
    knowledge: which regimes to keep.
    task: `train` or `attack`.
    rounds: how many rounds of training.
    seed: of everything invented.

  Returns:
    The summary.
  """
  rng = np.random.default_rng(seed)
  folder = pathlib.Path(folder)
  (folder / "reconstructions").mkdir(parents=True)
  original = images[:8].astype(np.float32)
  labels = np.asarray(labels)
  config = {
    "flags": {
      "task": task,
      "dataset": "mnist_sample",
      "model": "lenet_zhu",
      "num_clients": 100,
      "cohort_size": 10,
      "rounds": rounds,
      "defense": ",".join(defenses),
      "batch_size": 1,
      "local_steps": 1,
      "client_lr": 0.1,
    },
    "seeds": {"split": 11, "init": 12, "rounding": 13},
    "versions": {"mpqfl_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
    "commit": "0123456789abcdef",
    "host": {"cores": 2, "devices": ["cpu:0"]},
  }
  attack_lines, metric_lines, entries = [], [], {}
  for name, (accuracy, size, epsilon, attacks) in defenses.items():
    cells: dict = {}
    for (attack, regime), (blur, noise) in attacks.items():
      if regime not in knowledge:
        continue
      level = noise * rng.uniform(0.6, 1.6, (8, 1, 1, 1))
      guess = scipy.ndimage.gaussian_filter(original, (0, blur, blur, 0))
      guess = guess + level * rng.normal(size=guess.shape)
      guess = np.clip(guess, 0, 1).astype(np.float32)
      recovered = np.where(rng.uniform(size=8) < 0.9, labels[:8], 3)
      slug = re.sub(r"[^a-z0-9]+", "_", name).strip("_")
      np.savez(
        folder / "reconstructions" / f"{attack}_{regime}_{slug}_round0.npz",
        attack=attack,
        knowledge=regime,
        defense=name,
        round=0,
        original=original,
        reconstruction=guess,
        label=labels[:8],
        recovered_label=recovered,
        client=np.arange(8),
      )
      psnr = metrics.psnr_db(original, guess)
      ssim = metrics.ssim(original, guess)
      found = metrics.reidentified(original, guess, images[8:])
      cells.setdefault(attack, {})[regime] = metrics.summarize(psnr, ssim)
      for i in range(8):
        attack_lines.append(
          {
            "defense": name,
            "attack": attack,
            "knowledge": regime,
            "dataset": "mnist_sample",
            "model": "lenet_zhu",
            "image": i,
            "client": i,
            "round": 0,
            "batch_size": 1,
            "local_steps": 1,
            "labels_known": attack == "map",
            "weights": "initial",
            "iterations": 300,
            "restarts": 2,
            "objective": 1e-3,
            "seconds": 0.4,
            "mse": float(metrics.mse(original[i], guess[i])),
            "psnr_db": float(psnr[i]),
            "ssim": float(ssim[i]),
            "label_correct": bool(recovered[i] == labels[i]),
            "reidentified": bool(found[i]),
          }
        )
    entries[name] = {
      "test_accuracy": accuracy if task == "train" else None,
      "final_params_sha256": "00" * 32 if task == "train" else None,
      "uplink_bytes_per_client": size,
      "epsilon": epsilon,
      "attacks": cells,
    }
    for r in range(rounds if task == "train" else 0):
      rise = 1 - np.exp(-(r + 1) / 5)
      shaken = accuracy * rise + 0.01 * rng.normal() * np.exp(-r / 10)
      last = r == rounds - 1
      metric_lines.append(
        {
          "defense": name,
          "round": r,
          "train_loss": float(2.3 * np.exp(-r / 6)),
          "test_loss": None,
          "test_accuracy": accuracy if last else float(shaken),
          "uplink_bytes": 10 * size,
          "downlink_bytes": 10 * 53_456,
          "participants": 10,
          "rejected": 0,
          "seconds": 0.05,
        }
      )
  first = entries[next(iter(entries))]
  summary = {
    "test_accuracy": first["test_accuracy"],
    "rounds": rounds,
    "final_params_sha256": first["final_params_sha256"],
    "uplink_bytes_per_client": first["uplink_bytes_per_client"],
    "uplink_bytes_per_client_float32": 53_440,
    "seconds": 31.5,
    "compile_seconds": 8.2,
    "peak_rss_mb": 900.0,
    "defenses": entries,
    "references": metrics.references(
      original, images[8:].mean(axis=0), np.random.default_rng(1)
    ),
  }
  for name, value in (("config", config), ("summary", summary)):
    (folder / f"{name}.json").write_text(json.dumps(value, indent=2))
  files = [("attacks", attack_lines)]
  if task == "train":
    files.append(("metrics", metric_lines))
  for name, lines in files:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text)
  return summary
