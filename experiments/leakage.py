"""The task `leakage`: what an attacker will reach, predicted without attacks.

The updates of given images, one each, under every defence; and, where a byte
limit is given, a policy file that leaks least within it.
"""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import attack, folder, setting, summary, view
from experiments.config import Config
from mpqfl_jax import errors, guard, layers, metrics, precision
from mpqfl_jax.attacks import core, leakage, objectives
from mpqfl_jax.types import Model, Params, Update

# Training images that a policy is searched for, and coordinates of an image
# that the search looks at.
_IMAGES, _COMPONENTS = 4, 400
POLICY = "policy.toml"


def run(
  config: Config, built: setting.Setting, run_dir: pathlib.Path
) -> dict[str, Any]:
  """Predicts for every defence; `leakage.jsonl` has a line an image.

  Args:
    config: the run's.
    built: what its defences share; its clients hold one image each.
    run_dir: the run's folder.

  Returns:
    What `summary.json` holds.

  Raises:
    UserError: an encrypted defence, of which there is nothing to predict, or
      bounds that no policy keeps.
  """
  begin = time.perf_counter()
  sent, _ = attack.broadcast(config, built)
  model = setting.model(config, built.data, layers.ATTACK_FORM)
  by_defense = {
    d.spec: attack.updates(config, built, d, sent) for d in built.defenses
  }
  first = next(iter(by_defense.values()))[0]
  auxiliary = view.auxiliary_images(built, first)
  truths = [view.truth(built, w) for w in first]
  x = np.concatenate([images for images, _ in truths])
  y = np.concatenate([labels for _, labels in truths])
  sensitivities = leakage.sensitivity(
    model,
    sent.params,
    jnp.asarray(x),
    jnp.asarray(y),
    config.client_lr,
    auxiliary,
  )
  true = _updates(config, model, sent.params, x, y)
  (run_dir / "leakage.jsonl").unlink(missing_ok=True)
  entries = {}
  for spec, (watched, lengths) in by_defense.items():
    seen = [view.observe(config, w, "adaptive", y) for w in watched]
    known = [
      [_known(np.asarray(v)) for v in jax.tree.leaves(o.bins.variance)]
      for o in seen
      if o.bins is not None
    ]
    noise, sent_share = np.moveaxis(np.array(known), -1, 0)
    # An update that was scaled down before noise came to it shows as much as a
    # whole one under more noise.
    shares = [
      objectives.clipped_share(u, o.clips)
      for u, o in zip(true, seen, strict=True)
      if o.clips is not None
    ]
    noise /= np.square(shares)[:, None]
    psnr = leakage.expected_psnr_db(sensitivities, noise, sent_share)
    for w, value in zip(watched, psnr, strict=True):
      line = {
        "defense": spec,
        "image": f"{w.split}:{w.rows[0]}",
        "psnr_db_predicted": float(value),
      }
      folder.append_line(run_dir / "leakage.jsonl", line)
    entries[spec] = {
      "psnr_db_predicted_median": float(np.median(psnr)),
      "psnr_db_predicted_min": float(psnr.min()),
      "psnr_db_predicted_max": float(psnr.max()),
      "uplink_bytes_per_client": float(np.mean(lengths)),
    }
  mean = (built.data.x_train.mean(0) / 255.0).astype(np.float32)
  noise_images = setting.rng(config, setting.NOISE_IMAGES)
  result = {
    "task": config.task,
    "defenses": entries,
    "references": metrics.references(x, mean, noise_images),
    "uplink_bytes_per_client_float32": built.float32_bytes,
    "peak_rss_mb": summary.peak_rss_mb(),
  }
  if config.guard_bytes is not None:
    result["policy"] = _guard(config, built, model, sent.params, run_dir)
  return {**result, "seconds": time.perf_counter() - begin}


def _known(variance: np.ndarray) -> tuple[float, float]:
  """Of a leaf: mean squared error of what was sent, and how much that is."""
  sent = np.isfinite(variance)
  return (variance[sent].mean() if sent.any() else np.inf), sent.mean()


def check(config: Config, built: setting.Setting) -> None:
  """Raises UserError for what the prediction does not cover."""
  for defense in built.defenses:
    if defense.encryption is not None:
      raise errors.UserError(
        f"--task=leakage with --defense={defense.spec}: a ciphertext shows"
        " nothing, so there is nothing to predict. Expected other defences."
      )
  if len(built.data.x_train) < view.FEW_AUXILIARY:
    raise errors.UserError(
      f"--task=leakage needs {view.FEW_AUXILIARY} training images for its"
      f" prior, and {config.dataset} has {len(built.data.x_train)}."
    )


def _guard(
  config: Config,
  built: setting.Setting,
  model: Model,
  params: Params,
  run_dir: pathlib.Path,
) -> dict[str, Any]:
  """Searches a policy on training images and writes it."""
  assert config.guard_bytes is not None
  data = built.data
  rows = np.linspace(0, len(data.y_train) - 1, _IMAGES).astype(int)
  x = jnp.asarray(data.x_train[rows], jnp.float32) / 255
  y = jnp.asarray(data.y_train[rows], jnp.int32)
  sensitivities = leakage.sensitivity(
    model,
    params,
    x,
    y,
    config.client_lr,
    view.images_beside(data.x_train, data.x_train[rows]),
    min(_COMPONENTS, x[0].size),
  )
  updates = _updates(config, model, params, x, y)
  known = guard.tables(updates)
  with tqdm.tqdm(desc="policy", unit="step", disable=None) as bar:

    def told(psnr_db: float) -> None:
      bar.update()
      bar.set_postfix_str(f"{psnr_db:.1f} dB")

    found = guard.search(
      sensitivities, known, config.guard_bytes, config.guard_error, told
    )
  rules = guard.rules(found, known, params)
  path = run_dir / POLICY
  guard.write(
    path,
    rules,
    f"Least predicted leakage of {config.model} on {config.dataset} in"
    f" {config.guard_bytes:,} bytes.",
  )
  codec = precision.make(str(path), params)
  payload, _ = codec.encode(jax.random.key(0), updates[0], codec.init(params))
  length = len(codec.pack(jax.device_get(payload)))
  assert length == found.num_bytes, (length, found.num_bytes)
  return {
    "path": str(path),
    "psnr_db_predicted": found.psnr_db,
    "relative_error": found.error,
    "num_bytes": length,
    "rules": [[r.path, r.precision, dict(r.options)] for r in rules],
  }


def _updates(
  config: Config, model: Model, params: Params, x, y
) -> list[Update]:
  """What clients of one image each want to send."""
  simulate = jax.jit(
    lambda image, label: core.simulate(
      model, params, image[None, None], label[None, None], config.client_lr
    )
  )
  pairs = zip(jnp.asarray(x), jnp.asarray(y), strict=True)
  return [simulate(image, label) for image, label in pairs]
