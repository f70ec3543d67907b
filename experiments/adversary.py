"""The honest-but-curious server: every attack on every update that it kept."""

from collections.abc import Iterable, Sequence
import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import folder, observations, setting, view
from experiments.config import Config
from mpqfl_jax import attacks, layers, metrics, specs
from mpqfl_jax.types import Bins, Model, Observation


def attack_all(
  config: Config,
  built: setting.Setting,
  watched: Sequence[observations.Watched],
  run_dir: pathlib.Path,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
  """Runs every attack on every watched update and writes what came of it.

  Attack and settings are the same for every defence, down to the starting
  points. Each line of `attacks.jsonl` is written as soon as it is known.

  Args:
    config: the run's.
    built: what the run shares.
    watched: what the server kept.
    run_dir: the run's folder.

  Returns:
    defense -> attack -> knowledge -> summary, and the references of the
    attacked images.
  """
  model = setting.model(config, built.data, layers.ATTACK_FORM)
  auxiliary = view.auxiliary_images(built, watched)
  mean = mean_image(built)
  summaries: dict[str, dict[str, Any]] = {}
  for spec in config.attack:
    label = attack_label(config.attack, spec)
    for knowledge in config.attack_knowledge:
      scores: dict[str, list[dict[str, Any]]] = {}
      for shape, group in _by_shape(watched):
        attack = make(spec, model, shape, auxiliary)
        for defense in built.defenses:
          mine = [w for w in group if w.defense.spec == defense.spec]
          if mine:
            lines = _known(run_dir, label, knowledge, mine)
            if not lines and defense.unreadable:
              lines = _unreadable(config, label, knowledge, mine, run_dir)
            elif not lines:
              lines = _attack(
                config, built, attack, label, knowledge, mine, mean, run_dir
              )
            scores.setdefault(defense.spec, []).extend(lines)
      for defense_spec, lines in scores.items():
        entry = summaries.setdefault(defense_spec, {}).setdefault(label, {})
        entry[knowledge] = _summarize(lines)
  seen: dict[tuple[str, int], np.ndarray] = {}
  for w in watched:
    for row, image in zip(w.rows, view.truth(built, w)[0], strict=True):
      seen[w.split, int(row)] = image
  references = {}
  if seen:
    references = metrics.references(
      np.stack(list(seen.values())),
      mean,
      setting.rng(config, setting.NOISE_IMAGES),
    )
  return summaries, references


def mean_image(built: setting.Setting) -> np.ndarray:
  """Mean of the training split, [height, width, channels] in [0, 1]."""
  return (built.data.x_train.mean(0) / 255.0).astype(np.float32)


def _summarize(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
  reason = lines[0].get("reason")
  if reason is not None:
    names = ("psnr_db_median", "psnr_db_max", "ssim_median", "success_rate")
    return {**dict.fromkeys(names), "reason": reason}

  def of(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return metrics.summarize(
      np.array([line["psnr_db"] for line in lines]),
      np.array([line["ssim"] for line in lines]),
    )

  rounds = sorted({line["round"] for line in lines})
  if len(rounds) == 1:
    return of(lines)
  by_round = {
    str(r): of([line for line in lines if line["round"] == r]) for r in rounds
  }
  return {**of(lines), "rounds": by_round}


def make(
  spec: str, model: Model, shape: attacks.Work, auxiliary: np.ndarray
) -> attacks.AnyAttack:
  """The attack that a flag names, for updates of one shape.

  Raises:
    UserError: no such attack, or settings that it does not take.
  """
  name, options = specs.parse(spec)
  return attacks.make(
    name,
    model,
    steps=shape.steps,
    batch=shape.batch,
    epochs=shape.epochs,
    auxiliary=auxiliary,
    **options,
  )


def check(
  config: Config, built: setting.Setting, shapes: Iterable[attacks.Work]
) -> None:
  """Refuses an attack that cannot do what it will be asked to.

  Args:
    config: the run's.
    built: what the run shares.
    shapes: of the updates that will be attacked.

  Raises:
    UserError: before anything was computed.
  """
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), built.template
  )
  exact = Bins(zeros, zeros, zeros, jax.tree.map(lambda _: False, zeros))
  for spec in config.attack:
    for shape in shapes:
      attack = make(
        spec, built.model, shape, built.data.x_train[: view.FEW_AUXILIARY]
      )
      labels = jnp.zeros(shape[:2], jnp.int32) if config.labels_known else None
      for knowledge in config.attack_knowledge:
        bins = exact if knowledge == "adaptive" else None
        rate = jnp.float32(config.client_lr)
        attack.check(Observation(zeros, zeros, bins, labels, rate))


def threat(label: str) -> str:
  """Which server an attack takes: one that keeps to the protocol, or not."""
  name = specs.parse(label)[0]
  malicious = name in attacks.MALICIOUS
  return "malicious_server" if malicious else "honest_but_curious"


def attack_label(everything: Iterable[str], spec: str) -> str:
  """An attack's name in result files: short where that tells them apart.

  Args:
    everything: the specifications of all attacks, this one's too.
    spec: this one's.
  """
  name = specs.parse(spec)[0]
  same = {s for s in everything if specs.parse(s)[0] == name}
  return name if len(same) == 1 else spec


def _known(
  run_dir: pathlib.Path,
  label: str,
  knowledge: str,
  watched: Sequence[observations.Watched],
) -> list[dict[str, Any]]:
  """The lines of these attacks where a former part of the run has all.

  Those of an attack that was cut short go.
  """
  path = run_dir / "attacks.jsonl"
  lines: list[dict[str, Any]] = []

  def other(line: dict[str, Any]) -> bool:
    mine = (
      line["attack"] == label
      and line["knowledge"] == knowledge
      and line["defense"] == watched[0].defense.spec
      and (line["local_steps"], line["batch_size"], line["local_epochs"])
      == watched[0].shape
    )
    if mine:
      lines.append(line)
    return not mine

  folder.keep_lines(path, other)
  if len(lines) == sum(len(w.rows) for w in watched):
    for line in lines:
      folder.append_line(path, line)
    return lines
  return []


def _by_shape(watched: Sequence[observations.Watched]) -> Iterable:
  for shape in sorted({w.shape for w in watched}):
    yield shape, [w for w in watched if w.shape == shape]


def _attack(
  config: Config,
  built: setting.Setting,
  attack: attacks.AnyAttack,
  label: str,
  knowledge: str,
  watched: Sequence[observations.Watched],
  mean: np.ndarray,
  run_dir: pathlib.Path,
) -> list[dict[str, Any]]:
  truths = [view.truth(built, w) for w in watched]
  seen = [
    view.observe(config, w, knowledge, y)
    for w, (_, y) in zip(watched, truths, strict=True)
  ]
  batch = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
  restarts = config.attack_restarts or attack.restarts
  found = attacks.run(
    attack,
    batch,
    setting.key(config, setting.ATTACKS),
    restarts=restarts,
    devices=list(built.mesh.local_devices),
    channel=view.channel_of(watched[0]) if knowledge == "adaptive" else None,
  )
  lines: list[dict[str, Any]] = []
  kept: dict[int, list[tuple]] = {}
  pool = np.asarray(built.data.x_train[: metrics.MAX_CANDIDATES]) / 255.0
  noise = setting.rng(config, setting.NOISE_IMAGES)
  for i, (w, (x, y)) in enumerate(zip(watched, truths, strict=True)):
    order = metrics.match(x, found.x[i])
    image, guess = found.x[i][order], found.labels[i][order]
    scores = {
      "mse": metrics.mse(x, image),
      "psnr_db": metrics.psnr_db(x, image),
      "ssim": metrics.ssim(x, image),
      "ms_ssim": metrics.ms_ssim(x, image),
    }
    again = metrics.reidentified(x, image, pool.astype(np.float32))
    guesses = metrics.reference_images(x, mean, noise)
    best_guess = np.max(
      [metrics.psnr_db(x, guess) for guess in guesses.values()], 0
    )
    for j, row in enumerate(w.rows):
      line = {
        **_facts(config, w, label, knowledge, int(row)),
        "iterations": int(found.iterations[i]),
        "restarts": restarts,
        "objective": folder.number(found.objective[i]),
        "seconds": found.seconds / sum(len(v.rows) for v in watched),
        **{name: folder.number(value[j]) for name, value in scores.items()},
        "label_correct": bool(guess[j] == y[j]),
        "label_accuracy": metrics.label_accuracy(y, guess),
        "reidentified": bool(again[j]),
        "candidates": min(len(x) + len(pool), metrics.MAX_CANDIDATES),
        "guess_psnr_db": folder.number(best_guess[j]),
      }
      folder.append_line(run_dir / "attacks.jsonl", line)
      lines.append(line)
    kept.setdefault(w.round, []).append((x, image, y, guess, w))
  for round_number, parts in kept.items():
    _keep(run_dir, label, knowledge, round_number, parts)
  return lines


def _facts(
  config: Config, w: observations.Watched, label: str, knowledge: str, row: int
) -> dict[str, Any]:
  """What a line of `attacks.jsonl` says before anything was attacked."""
  return {
    "defense": w.defense.spec,
    "attack": label,
    "knowledge": knowledge,
    "threat": threat(label),
    "dataset": config.dataset,
    "model": config.model,
    "image": f"{w.split}:{row}",
    "client": w.client,
    "round": w.round,
    "batch_size": w.shape.batch,
    "local_steps": w.shape.steps,
    "local_epochs": w.shape.epochs,
    "labels_known": config.labels_known,
    "weights": "initial" if w.round <= 1 else "trained",
  }


def _unreadable(
  config: Config,
  label: str,
  knowledge: str,
  watched: Sequence[observations.Watched],
  run_dir: pathlib.Path,
) -> list[dict[str, Any]]:
  """No number, and why, for each image that an attack cannot be aimed at."""
  nothing = (
    "iterations",
    "restarts",
    "objective",
    "seconds",
    "mse",
    "psnr_db",
    "ssim",
    "ms_ssim",
    "label_correct",
    "label_accuracy",
    "reidentified",
    "candidates",
    "guess_psnr_db",
  )
  lines = []
  for w in watched:
    for row in w.rows:
      line = {
        **_facts(config, w, label, knowledge, int(row)),
        **dict.fromkeys(nothing),
        "reason": w.defense.unreadable,
      }
      folder.append_line(run_dir / "attacks.jsonl", line)
      lines.append(line)
  return lines


def _keep(run_dir, label, knowledge, round_number, parts) -> None:
  x, image, y, guess = (
    np.concatenate([part[i] for part in parts]) for i in range(4)
  )
  clients = np.concatenate([[w.client] * len(w.rows) for *_, w in parts])
  defense = parts[0][-1].defense.spec
  buffer = io.BytesIO()
  np.savez_compressed(
    buffer,
    attack=label,
    knowledge=knowledge,
    defense=defense,
    round=round_number,
    original=x,
    reconstruction=image,
    label=y,
    recovered_label=guess,
    client=clients,
  )
  shape = parts[0][-1].shape
  batch = "x".join(str(n) for n in shape[: 2 + (shape.epochs > 1)])
  name = "_".join(
    (
      folder.slug(label),
      knowledge,
      folder.slug(defense),
      f"round{round_number}",
      batch,
    )
  )
  folder.write_atomically(
    run_dir / "reconstructions" / f"{name}.npz", buffer.getvalue()
  )
