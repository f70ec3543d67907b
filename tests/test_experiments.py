"""The command line: runs end to end, and what it says of a mistake."""

import hashlib
import json
import logging
import re
import subprocess
import sys
import types

from absl import flags
from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  adversary,
  config,
  folder,
  main,
  observations,
  setting,
  view,
)
from mpqfl_jax import (
  attacks,
  federated,
  local,
  metrics,
  models,
  precision,
  trees,
)
from mpqfl_jax.types import Bins

SMALL = (
  "--model=mlp",
  "--num_clients=400",
  "--cohort_size=6",
  "--size_sigma=1.5",
  "--rounds=3",
  "--batch_size=4",
  "--devices=2",
)


def execute(*args: str) -> int:
  with flagsaver.flagsaver():
    left = flags.FLAGS(["main", *args])
    return main.execute(left)


def from_args(*args: str) -> config.Config:
  with flagsaver.flagsaver():
    flags.FLAGS(["main", *args])
    return config.from_flags(flags.FLAGS)


def lines(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
  run = tmp_path_factory.mktemp("runs") / "attacked"
  status = execute(
    *SMALL,
    f"--output_dir={run}",
    "--defense=none,paper,dp_gaussian(clip=2,noise_multiplier=0.5)",
    "--attack=dlg(iterations=3)",
    "--attack_rounds=1,3",
  )
  assert status == 0
  return run


def test_a_run_leaves_the_promised_files(attacked):
  summary = json.loads((attacked / "summary.json").read_text())
  resolved = json.loads((attacked / "config.json").read_text())
  assert resolved["model"] == "mlp" and resolved["plan_resolved"]["size"] == 1
  assert set(resolved["versions"]) >= {"jax", "flax", "optax", "mpqfl_jax"}
  rounds = lines(attacked / "metrics.jsonl")
  assert [r["round"] for r in rounds] == [1, 2, 3] * 3
  wanted = (
    "round, train_loss, test_loss, test_accuracy, uplink_bytes,"
    " downlink_bytes, participants, rejected, epsilon, client_lr, server_lr,"
    " seconds"
  )
  assert set(rounds[0]) == {"defense", *wanted.split(", ")}
  wanted = (
    "defense, attack, knowledge, dataset, model, image, round, batch_size,"
    " local_steps, local_epochs, threat, labels_known, weights, iterations,"
    " restarts, objective, seconds, mse, psnr_db, ssim, ms_ssim,"
    " label_correct, label_accuracy, reidentified, candidates, guess_psnr_db"
  )
  found = lines(attacked / "attacks.jsonl")
  assert set(found[0]) == {"client", *wanted.split(", ")}
  assert {r["weights"] for r in found} == {"initial", "trained"}
  for name, entry in summary["defenses"].items():
    mine = [r for r in rounds if r["defense"] == name]
    assert entry["test_accuracy"] == mine[-1]["test_accuracy"]
    assert entry["uplink_bytes_per_client"] == sum(
      r["uplink_bytes"] for r in mine
    ) / (3 * 6)
    scores = [r["psnr_db"] for r in found if r["defense"] == name]
    assert entry["attacks"]["dlg"]["blind"]["psnr_db_median"] == np.median(
      scores
    )
  assert summary["defenses"]["none"]["epsilon"] is None
  assert summary["defenses"]["paper"]["epsilon"] is None
  proven = "dp_gaussian(clip=2,noise_multiplier=0.5)"
  assert summary["defenses"][proven]["epsilon"] > 0
  assert set(summary["references"]) == {
    "mean_image",
    "grey",
    "best_constant",
    "noise",
  }
  assert (attacked / "report.html").stat().st_size > 10_000
  assert list((attacked / "figures").glob("*.png"))


def test_reconstructions_hold_what_the_lines_say(attacked):
  found = lines(attacked / "attacks.jsonl")
  files = sorted((attacked / "reconstructions").glob("*.npz"))
  count = 0
  for path in files:
    with np.load(path) as file:
      psnr = metrics.psnr_db(file["original"], file["reconstruction"])
      for client, value in zip(file["client"], psnr, strict=True):
        match = [
          r
          for r in found
          if r["defense"] == str(file["defense"])
          and r["round"] == int(file["round"])
          and r["client"] == client
          and abs(r["psnr_db"] - value) < 1e-4
        ]
        assert match
        count += 1
  assert count == len(found)


def test_watching_and_a_second_run_change_no_bit(attacked, tmp_path):
  summary = json.loads((attacked / "summary.json").read_text())
  run = tmp_path / "unwatched"
  assert execute(*SMALL, f"--output_dir={run}", "--defense=none,paper") == 0
  again = json.loads((run / "summary.json").read_text())
  for name in ("none", "paper"):
    assert (
      summary["defenses"][name]["final_params_sha256"]
      == again["defenses"][name]["final_params_sha256"]
    )
  first = (
    again["defenses"]["none"]["final_params_sha256"],
    again["defenses"]["paper"]["final_params_sha256"],
  )
  assert first[0] != first[1]


def test_the_attacked_images_are_the_clients_own(attacked):
  """The kept bytes decode to the update that the named rows produce."""
  found = lines(attacked / "attacks.jsonl")
  values = from_args(*SMALL, "--defense=none", "--attack=dlg")
  built = setting.build(values)
  for line in found:
    if line["defense"] == "none":
      row = int(re.fullmatch(r"train:(\d+)", line["image"])[1])
      held = built.clients.client(line["client"])
      assert row in held
      cohort = setting.sample(values, built.clients, line["round"])
      assert line["client"] in cohort.client_id
      assert line["batch_size"] * line["local_steps"] == len(held)


def test_attack_task_inverts_given_images(tmp_path):
  run = tmp_path / "attack"
  status = execute(
    "--task=attack",
    "--model=mlp",
    "--batch_size=2",
    "--attack=idlg(iterations=2)",
    "--attack_images=test:4-7",
    "--labels_known",
    "--attack_knowledge=blind,adaptive",
    "--defense=none,int4",
    f"--output_dir={run}",
  )
  assert status == 0
  found = lines(run / "attacks.jsonl")
  assert len(found) == 2 * 2 * 4
  assert {r["image"] for r in found} == {f"test:{i}" for i in range(4, 8)}
  assert not (run / "metrics.jsonl").exists()
  summary = json.loads((run / "summary.json").read_text())
  assert summary["defenses"]["int4"]["test_accuracy"] is None
  assert set(summary["defenses"]["int4"]["attacks"]["idlg"]) == {
    "blind",
    "adaptive",
  }


def test_a_client_of_several_epochs_is_attacked(tmp_path):
  run = tmp_path / "attack"
  status = execute(
    "--task=attack",
    "--model=mlp",
    "--batch_size=1",
    "--local_epochs=3",
    "--attack=idlg(iterations=60),analytic",
    "--attack_images=test:4-5",
    f"--output_dir={run}",
  )
  # One step on one image is all that `analytic` can do.
  assert status == 2
  status = execute(
    "--task=attack",
    "--model=mlp",
    "--batch_size=1",
    "--local_epochs=3",
    "--attack=idlg(iterations=60)",
    "--attack_images=test:4-5",
    f"--output_dir={run}",
  )
  assert status == 0
  found = lines(run / "attacks.jsonl")
  assert {r["image"] for r in found} == {"test:4", "test:5"}
  assert [(r["local_steps"], r["local_epochs"]) for r in found] == [(1, 3)] * 2
  # The simulated client is the real one: the search gets near its update.
  assert max(r["objective"] for r in found) < 0.1
  assert "3 local epochs" in (run / "report.html").read_text()


@pytest.mark.parametrize(
  "flags_, size, want",
  [
    (("--local_epochs=1",), 3, (1, 3, 1)),
    (("--local_epochs=1",), 8, (2, 4, 1)),
    (("--local_epochs=5",), 3, (1, 3, 5)),
    (("--local_epochs=2",), 8, (2, 4, 2)),
    (("--local_steps=2",), 9, (2, 4, 1)),
    (("--local_steps=6",), 8, (2, 4, 3)),
    (("--local_steps=3",), 8, None),  # half an epoch at the end
    (("--local_epochs=1",), 6, None),  # batches of 4 and 2
    (("--algorithm=fed_sgd",), 6, (1, 6, 1)),
    (("--local_epochs=1",), 0, None),
  ],
)
def test_what_an_attacker_knows_of_the_training(flags_, size, want):
  values = from_args(*SMALL, *flags_)
  schedule = local.Schedule(4, 20, values.local_epochs, values.local_steps)
  assert setting.update_shape(values, schedule, size) == want


def test_a_run_compiles_the_round_once(tmp_path, monkeypatch):
  """Whoever drops out, is sampled, or how much they hold; and nothing later."""
  compiled, finished = [], [0]

  class Listener(logging.Handler):
    def emit(self, record):
      match = re.match(
        r"Finished XLA compilation of (\S+)", record.getMessage()
      )
      if match:
        compiled.append((finished[0], match[1]))

  real = folder.append_line

  def append(path, value):
    real(path, value)
    finished[0] = value["round"]

  monkeypatch.setattr(folder, "append_line", append)
  listener = Listener()
  logger = logging.getLogger("jax._src.dispatch")
  logger.addHandler(listener)
  try:
    with jax.log_compiles():
      status = execute(
        *SMALL,
        "--rounds=7",
        "--eval_every=2",
        "--checkpoint_every=2",
        "--dropout=0.4",
        "--plan=chunk(size=4)",
        "--algorithm=scaffold",
        "--client_lr_schedule=step(at=(3,5))",
        "--server_optimizer=adam",
        f"--output_dir={tmp_path / 'run'}",
      )
  finally:
    logger.removeHandler(listener)
  assert status == 0
  rounds = [name for _, name in compiled if name == "jit(round)"]
  assert len(rounds) == 1, compiled
  # Evaluation and checkpoint come first in round 2; the report is last.
  late = [entry for entry in compiled if 2 <= entry[0] < 7]
  assert late == []


def test_an_entry_in_either_of_scaffolds_messages_is_known():
  update = {"a": jnp.arange(1.0, 41.0)}
  codec = precision.make("randomk", update, ratio=0.5)
  payloads = [
    codec.encode(jax.random.key(i), update, codec.init(update))[0]
    for i in range(2)
  ]
  # After one step of size 1 from variates of zero both messages are the update.
  zeros = jax.tree.map(jnp.zeros_like, update)
  watched = types.SimpleNamespace(
    variates=(zeros, zeros),
    shape=types.SimpleNamespace(steps=1, epochs=1),
    learning_rate=1.0,
  )
  both = Bins(*zip(*map(codec.bins, payloads), strict=True))
  pair = tuple(map(codec.decode, payloads))
  _, bins = view.without_drift(watched, pair, both)
  sent = np.any([~np.isinf(codec.bins(p).variance["a"]) for p in payloads], 0)
  assert 20 < sent.sum() < 40
  np.testing.assert_array_equal(bins.variance["a"], np.where(sent, 0, np.inf))
  np.testing.assert_array_equal(bins.lower["a"][sent], update["a"][sent])


def test_an_attack_on_scaffold_sees_gradients_without_drift(tmp_path):
  """The kept messages give the gradient of the client's one step."""
  run = tmp_path / "run"
  args = (
    *SMALL,
    "--rounds=2",
    "--num_clients=200",
    "--cohort_size=200",
    "--algorithm=scaffold",
    "--defense=none,int8",
    "--attack=analytic",
    "--attack_rounds=2",
    "--attack_knowledge=adaptive",
    "--client_lr=0.2",
    "--client_lr_schedule=exponential(decay=0.5)",
    f"--output_dir={run}",
  )
  assert execute(*args) == 0
  values = from_args(*args)
  built = setting.build(values)
  rounds = lines(run / "metrics.jsonl")
  rates = [r["client_lr"] for r in rounds]
  np.testing.assert_allclose(rates, [0.2, 0.1, 0.2, 0.1], rtol=1e-6)
  assert all(r["server_lr"] == 1.0 for r in rounds)
  seen = [
    (w, defense)
    for defense in built.defenses
    for w in observations.load(run, defense, 2, built.template)
  ]
  assert len(seen) == 4
  for w, defense in seen:
    x, y = built.data.x_train[w.rows] / 255.0, built.data.y_train[w.rows]
    gradient = jax.grad(
      lambda p: models.cross_entropy(built.model, p, x, y).mean()
    )(w.params)
    assert w.variates is not None and np.any(jax.tree.leaves(w.variates)[0])
    got = view.observe(values, w, "adaptive", y)
    span = max(
      np.ptp(leaf)
      for leaf in jax.tree.leaves(defense.codec.decode(w_payload(w)))
    )
    near = 1e-6 if defense.spec == "none" else span / 128
    for g, u, low, high in zip(
      *map(
        jax.tree.leaves,
        (gradient, got.update, got.bins.lower, got.bins.upper),
      ),
      strict=True,
    ):
      np.testing.assert_allclose(0.1 * g, u, atol=near)
      assert np.all((low - 1e-6 <= 0.1 * g) & (0.1 * g <= high + 1e-6))
    # The second message narrows what the first leaves open.
    if defense.spec == "int8":
      first = defense.codec.bins(w_payload(w))
      widths = [
        sum(
          float((b - a).sum())
          for a, b in zip(*map(jax.tree.leaves, ends), strict=True)
        )
        for ends in (
          (got.bins.lower, got.bins.upper),
          (first.lower[0], first.upper[0]),
        )
      ]
      assert widths[0] < 0.95 * widths[1]
  summary = json.loads((run / "summary.json").read_text())
  entry = summary["defenses"]["none"]
  assert (
    entry["uplink_bytes_per_client"]
    == summary["uplink_bytes_per_client_float32"]
  )


def w_payload(w):
  return w.defense.codec.unpack(w.message)


@pytest.mark.parametrize(
  ("plan", "algorithm", "specs"),
  [
    (
      "chunk(size=2)",
      "fed_sgd",
      "topk,int8(entropy=zstd),mixed_random(entropy=zstd(level=1))",
    ),
    *(
      pytest.param(
        *case,
        "int4,randomk,mixed_random,drive(entropy=zstd),prune(entropy=zstd),"
        "randomk(entropy=zstd),sign(entropy=zstd,error_feedback=true),"
        "budget(bytes=40000,entropy=zstd(level=9)),none(entropy=zstd)",
        marks=pytest.mark.slow,
      )
      for case in (("loop", "fed_avg"), ("vmap", "scaffold"))
    ),
    pytest.param(
      "vmap",
      "fed_avg",
      "nf4,ternary,qsgd(levels=300),float8(granularity=channel),"
      "guarded(bytes=40000),int3(granularity=64,rounding=dither),mixed_random",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_bytes_of_a_whole_run_are_those_of_its_messages(
  plan, algorithm, specs, tmp_path, monkeypatch
):
  # Every client is watched in every round; nobody attacks.
  monkeypatch.setattr(adversary, "attack_all", lambda *_: ({}, {}))
  args = (
    *SMALL,
    "--batch_size=600",  # one batch whatever the client
    f"--plan={plan}",
    f"--algorithm={algorithm}",
    f"--defense={specs}",
    "--downlink=int4(entropy=zstd)",
    "--dropout=0.3",
    "--attack=dlg",
    "--attack_rounds=1,2,3",
    "--attack_clients=6",
    "--eval_every=3",
    f"--output_dir={tmp_path / 'run'}",
  )
  assert execute(*args) == 0
  built = setting.build(from_args(*args))
  rounds = lines(tmp_path / "run" / "metrics.jsonl")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  lengths, arrived = set(), 0
  for defense in built.defenses:
    kept = observations.load(tmp_path / "run", defense, 3, built.template)
    mine = [r for r in rounds if r["defense"] == defense.spec]
    assert [r["round"] for r in mine] == [1, 2, 3]
    for line in mine:
      sent = [len(w.message) for w in kept if w.round == line["round"]]
      assert len(sent) == line["participants"]
      assert line["uplink_bytes"] == sum(sent)
      lengths |= set(sent)
      arrived += len(sent)
    entry = summary["defenses"][defense.spec]
    mean = sum(len(w.message) for w in kept) / len(kept)
    assert entry["uplink_bytes_per_client"] == pytest.approx(mean)
  # Not all of one length, and some messages were lost on the way.
  assert len(lengths) > 10 and arrived < 18 * len(built.defenses)


def test_auxiliary_images_hold_no_attacked_one(attacked):
  values = from_args(*SMALL)
  built = setting.build(values)
  rows = np.array([0, 3, 5])
  watched = observations.Watched(
    built.defenses[0],
    1,
    0,
    None,
    b"",
    "train",
    rows,
    attacks.Work(1, 3),
    0.1,
    None,
  )
  images = view.auxiliary_images(built, [watched])
  assert len(images) == len(built.data.x_train) - 3
  have = {image.tobytes() for image in images}
  assert not any(built.data.x_train[row].tobytes() in have for row in rows)


def test_final_params_digest_is_as_documented():
  params = {"b": {"x": np.float32([1, 2])}, "a": {"y": np.float32([[3]])}}
  want = hashlib.sha256(np.array([3, 1, 2], "<f4").tobytes()).hexdigest()
  from experiments import summary

  assert summary.params_sha256(params) == want


def test_poisson_cohorts_are_coins_and_all_of_one_length():
  values = from_args(
    *SMALL, "--client_sampling=poisson", "--rounds=200", "--cohort_size=20"
  )
  built = setting.build(values)
  cohorts = [setting.sample(values, built.clients, r) for r in range(1, 201)]
  assert len({len(c.client_id) for c in cohorts}) == 1
  present = [c.client_id[c.size > 0] for c in cohorts]
  counts = np.array([len(ids) for ids in present])
  # Binomial(400, 1/20): mean 20, variance 19.
  assert abs(counts.mean() - 20) < 4 * np.sqrt(19 / 200)
  assert 0.7 * 19 < counts.var() < 1.4 * 19
  for cohort, ids in zip(cohorts, present, strict=True):
    assert len(set(cohort.client_id)) == len(cohort.client_id)
    assert (cohort.size[: len(ids)] == built.clients.sizes[ids]).all()
  assert max(counts) == len(cohorts[0].client_id)
  protocol = built.protocol
  assert protocol.sampling_rate == 20 / 400
  want = np.bincount(np.concatenate(present), minlength=400)
  np.testing.assert_array_equal(protocol.ledger.participations, want)


@pytest.mark.slow
def test_every_mechanism_trains_and_is_attacked(tmp_path):
  run = tmp_path / "run"
  specs_ = [
    "dp_gaussian(epsilon=20)",
    "dp_laplace(clip=9,epsilon=20)",
    "dp_pbm(epsilon=20,trials=1)",
    "dp_rqm(levels=4)",
    "dp_sgd(epsilon=20)",
    "dp_central",
  ]
  status = execute(
    *SMALL,
    f"--output_dir={run}",
    f"--defense={','.join(specs_)}",
    "--attack=dlg(iterations=3)",
    "--attack_knowledge=blind,adaptive",
  )
  assert status == 0
  summary = json.loads((run / "summary.json").read_text())
  for spec, entry in summary["defenses"].items():
    assert set(entry["attacks"]["dlg"]) == {"blind", "adaptive"}
    if "epsilon=20" in spec:
      assert 19.8 < entry["epsilon"] <= 20 * (1 + 1e-9)
    assert entry["epsilon"] > 0 and entry["delta"] == 1e-5
    assert entry["epsilon_unit"] == (
      "example" if spec.startswith("dp_sgd") else "client"
    )
  # One bit an entry, and the header.
  bits = summary["defenses"]["dp_pbm(epsilon=20,trials=1)"]
  assert bits["uplink_bytes_per_client"] < (
    summary["uplink_bytes_per_client_float32"] / 30
  )


def test_heuristics_train_and_what_mixed_the_batches_is_kept(tmp_path):
  run = tmp_path / "run"
  args = (
    *SMALL,
    "--rounds=2",
    f"--output_dir={run}",
    "--defense=mixup(alpha=0.5),soteria(ratio=0.3),clip(norm=0.05)",
    "--attack=dlg(iterations=3)",
    "--attack_knowledge=blind,adaptive",
  )
  assert execute(*args) == 0
  summary = json.loads((run / "summary.json").read_text())
  for entry in summary["defenses"].values():
    assert set(entry["attacks"]["dlg"]) == {"blind", "adaptive"}
    assert entry["epsilon"] is None
  values = from_args(*args)
  built = setting.build(values)
  mixing, hiding, clipping = built.defenses
  key = jax.random.fold_in(setting.key(values, setting.ROUNDS), 1)
  kept = observations.load(run, mixing, 2, built.template)
  assert kept
  for w in kept:
    batches = federated.client_keys(key, w.client).batches
    steps = w.shape.steps * w.shape.epochs
    np.testing.assert_array_equal(
      w.mixing, mixing.mixup.weights(batches, steps)
    )
    for knowledge in config.KNOWLEDGE:
      seen = view.observe(values, w, knowledge, np.zeros(len(w.rows), int))
      assert (seen.mixing is None) == (knowledge == "blind")
  for w in observations.load(run, hiding, 2, built.template):
    assert w.mixing is None
    update = hiding.codec.decode(hiding.codec.unpack(w.message))
    rows = np.asarray(update["dense3"]["kernel"]).any(1)
    if w.shape.steps == 1:
      assert np.count_nonzero(rows) <= 140
  for w in observations.load(run, clipping, 2, built.template):
    update = clipping.codec.decode(clipping.codec.unpack(w.message))
    assert trees.norm(update) < 0.05001


def test_a_poisson_run_under_central_privacy(tmp_path):
  run = tmp_path / "run"
  status = execute(
    *SMALL,
    f"--output_dir={run}",
    "--client_sampling=poisson",
    "--defense=dp_central(epsilon=5,adaptive=True,count_stddev=9)",
  )
  assert status == 0
  summary = json.loads((run / "summary.json").read_text())
  entry = next(iter(summary["defenses"].values()))
  assert (entry["epsilon_model"], entry["epsilon_unit"]) == (
    "central",
    "client",
  )
  assert 4.9 < entry["epsilon"] <= 5
  rounds = lines(run / "metrics.jsonl")
  assert [r["epsilon"] for r in rounds] == sorted(r["epsilon"] for r in rounds)
  # Who is not there gets no model and sends nothing.
  for r in rounds:
    assert (
      r["uplink_bytes"]
      == r["participants"] * (entry["uplink_bytes_per_client"])
    )
  page = (run / "report.html").read_text()
  assert "not against the server" in page


@pytest.mark.parametrize(
  "args, words",
  [
    (["--dataset=mnist_sampel"], "Did you mean 'mnist_sample'"),
    (["--model=lenet"], "unknown model 'lenet'"),
    (["--partition=irid"], "Did you mean 'iid'"),
    (["--partition=dirichlet", "--dirichlet_alpha=0"], "alpha"),
    (["--defense=papr"], "Did you mean 'paper'"),
    (["--algorithm=scaffold", "--defense=dp_pbm"], "control variates"),
    (["--algorithm=scaffold", "--defense=dp_central"], "control variates"),
    (["--aggregator=median", "--defense=dp_central"], "about a sum"),
    (["--client_sampling=coin"], "client_sampling"),
    (["--algorithm=fed_sgd", "--defense=dp_sgd"], "Expected fed_avg"),
    (["--algorithm=fed_sgd", "--defense=mixup"], "Expected fed_avg"),
    (["--defense=soteria(ratio=2)"], "between 0 and 1"),
    (
      ["--attack=dlg", "--defense=dp_sgd(batches=poisson)"],
      "Expected batches=fixed",
    ),
    (["--defense=dp_gaussian(noise_multiplier=0)"], "without noise"),
    (
      ["--defense=dp_gaussian(noise_multiplier=0,epsilon=8)"],
      "contradict each other",
    ),
    (["--defense=dp_laplace(epsilon=-1)"], "epsilon=-1: expected a number"),
    (["--defense=prune(ratios=1)"], "Did you mean 'ratio'"),
    (["--defense=prune(ratio=2)"], "ratio"),
    (["--defense=none,none"], "twice"),
    (["--defense=missing.toml"], "missing.toml"),
    (["--defense="], "--defense is empty"),
    (["--attack=dgl"], "Did you mean 'dlg'"),
    (["--attack=dlg(iters=3)"], "iters"),
    (["--attack=dlg", "--attack_knowledge=all"], "unknown"),
    (["--attack=dlg", "--attack_rounds=9"], "rounds go from 1"),
    (["--attack_rounds=one"], "whole numbers"),
    (["--cohort_size=500"], "larger than --num_clients=400"),
    (["--num_clients=0"], "num_clients"),
    (["--plan=chunk(size=0)"], "chunk"),
    (["--devices=99"], "this machine has"),
    (["--client_lr=0"], "--client_lr is 0"),
    (["--server_optimizer=adm"], "Did you mean 'adam'"),
    (["--task=attack"], "needs --attack"),
    (["--model=lenet_zhu", "--attack=analytic"], "analytic"),
    (
      ["--task=attack", "--attack=idlg", "--batch_size=2"],
      "infers the label of one image",
    ),
    (["--task=attack", "--attack=dlg", "--attack_images=test:9"], "multiple"),
    (["--task=attack", "--attack=dlg", "--attack_images=all"], "test:0-7"),
    (
      ["--task=attack", "--attack=dlg", "--attack_images=test:999996-999999"],
      "has 1000 images",
    ),
    (["--dataset=mnist", "--data_dir=no/such/folder"], "no/such/folder"),
    (["left over"], "unexpected argument"),
  ],
)
def test_a_mistake_is_one_line_and_touches_nothing(
  args, words, tmp_path, capfd
):
  run = tmp_path / "run"
  try:
    status = execute(*SMALL, f"--output_dir={run}", *args)
    err = capfd.readouterr().err
  except flags.Error as e:  # what absl itself finds, `main._parse` prints
    status, err = 2, f"error: {e}\n"
  assert status == 2
  assert words in err and err.startswith("error: ")
  assert err.count("\n") == 1 or "lower_bound" in err
  assert not run.exists()


def test_a_folder_that_exists_is_kept(attacked, tmp_path, capfd):
  before = sorted(p.name for p in attacked.iterdir())
  assert execute(*SMALL, f"--output_dir={attacked}") == 2
  assert "--overwrite" in capfd.readouterr().err
  assert sorted(p.name for p in attacked.iterdir()) == before
  other = tmp_path / "precious"
  other.mkdir()
  (other / "thesis.txt").write_text("mine")
  assert execute(*SMALL, f"--output_dir={other}", "--overwrite") == 2
  assert (other / "thesis.txt").read_text() == "mine"
  assert "is not a run" in capfd.readouterr().err
  assert execute(*SMALL, f"--output_dir={other / 'thesis.txt'}") == 2


@pytest.mark.parametrize("flag", [None, "--overwrite", "--resume"])
@pytest.mark.parametrize("what", ["file", "folder", "config"])
def test_only_what_works_is_suggested(what, flag, tmp_path, capfd):
  place = tmp_path / "place"
  if what == "file":
    place.write_text("mine")
  else:
    place.mkdir()
    name = "config.json" if what == "config" else "thesis.txt"
    (place / name).write_text('{"layers": 3}')
  args = () if flag is None else (flag,)
  assert execute(*SMALL, f"--output_dir={place}", *args) == 2
  err = capfd.readouterr().err
  assert "Give a" in err and err.count("\n") == 1 and place.exists()
  # The flag may be named as what does not help, not as what would.
  assert not re.search(r"Give .*--(resume|overwrite)", err)


def test_a_folder_that_exists_is_refused_before_anything_is_built(
  attacked, capfd, monkeypatch
):
  monkeypatch.setattr(setting, "build", lambda *_: pytest.fail("too late"))
  for task in ("train", "leakage", "study"):
    args = (f"--task={task}", "--batch_size=1", f"--output_dir={attacked}")
    assert execute(*SMALL, *args, "--rounds=3") == 2
    assert "exists already" in capfd.readouterr().err


def test_a_corrupt_sample_is_one_line(tmp_path, capfd, monkeypatch):
  from mpqfl_jax import datasets

  copy = tmp_path / "data"
  copy.mkdir()
  for path in datasets._SAMPLE_DIR.iterdir():
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (copy / path.name).write_bytes(data)
  monkeypatch.setattr(datasets, "_SAMPLE_DIR", copy)
  assert execute(*SMALL, f"--output_dir={tmp_path / 'run'}") == 2
  err = capfd.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_an_interrupt_keeps_every_finished_round(tmp_path, capfd, monkeypatch):
  run = tmp_path / "run"
  real = folder.append_line

  def append_then_stop(path, value):
    real(path, value)
    if value["round"] == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(folder, "append_line", append_then_stop)
  assert execute(*SMALL, f"--output_dir={run}") == 130
  assert [r["round"] for r in lines(run / "metrics.jsonl")] == [1, 2]
  err = capfd.readouterr().err
  assert "interrupted" in err and f"--resume --output_dir={run}" in err


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "summary.json"
  folder.write_json(path, {"old": 1})

  def fail(*args):
    raise OSError("disk full")

  monkeypatch.setattr(folder.os, "replace", fail)
  with pytest.raises(OSError):
    folder.write_json(path, {"new": 2})
  assert json.loads(path.read_text()) == {"old": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_every_attack_has_file_names_of_its_own():
  slugs = {
    spec: folder.slug(spec)
    for spec in (
      "dlg",
      "dlg(layers=conv)",
      "dlg(layers=conv*)",
      "dlg(layers=conv?)",
      "dlg(layers=conv[12])",
      "dlg(layers=conv[!12])",
    )
  }
  assert len(set(slugs.values())) == len(slugs)
  assert slugs["dlg(layers=conv)"] == "dlg-layers=conv"
  assert all(re.fullmatch(r"[A-Za-z0-9.=-]+", name) for name in slugs.values())


@pytest.mark.parametrize(
  "text, want",
  [
    ("test:0-7", ("test", range(8))),
    ("train:5", ("train", range(5, 6))),
    (" test:10-12 ", ("test", range(10, 13))),
  ],
)
def test_attack_images(text, want):
  assert config.images(text) == want


def test_attack_labels_are_short_where_they_can_be():
  values = from_args("--attack=dlg(iterations=3),idlg")
  assert adversary.attack_label(values.attack, "dlg(iterations=3)") == "dlg"
  twice = from_args("--attack=dlg(iterations=3),dlg")
  assert adversary.attack_label(twice.attack, "dlg(iterations=3)") == (
    "dlg(iterations=3)"
  )


def test_the_program_itself_exits_with_2():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.main", "--rounds=none"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "path", sorted(config.FLAGS_DIR.glob("*.flags")), ids=lambda p: p.stem
)
def test_every_flag_file_resolves(path):
  values = from_args(f"--flagfile={path}")
  assert values.output_dir == f"runs/{path.stem}"
