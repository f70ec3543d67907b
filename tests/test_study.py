"""The grid of a study, its cache, its page; one run from end to end."""

import dataclasses
import json
import re

from absl import flags
from absl.testing import flagsaver
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from experiments import config, main, study, study_grid
from mpqfl_jax import errors
from mpqfl_jax.report import evidence, html, study_tables, tables
from tests import browser

DEFENSES = ("none", "paper", "int4")


def tiny(output_dir, **kw):
  return config.make(
    **{
      "task": "study",
      "output_dir": str(output_dir),
      "model": "mlp",
      "study_seeds": "0,1",
      "num_clients": 100,
      "cohort_size": 3,
      "rounds": 2,
      "batch_size": 4,
      "defense": DEFENSES,
      "attack": "dlg(iterations=3)",
      "attack_knowledge": "blind,adaptive",
      "attack_images": "test:0-1",
      "attack_restarts": 1,
      "devices": 2,
      **kw,
    }
  )


def pretend(values, data=None):
  """Writes what a cell would, invented but of its shape."""
  place = study.pathlib.Path(values.output_dir)
  (place / "reconstructions").mkdir(parents=True)
  (place / "config.json").write_text(
    json.dumps({**dataclasses.asdict(values), "commit": "c0ffee"})
  )
  rng = np.random.default_rng(values.seed)
  level = {"none": 0.01, "paper": 0.3, "int4": 0.1}
  lines, entries = [], {}
  for spec in values.defense:
    entries[spec] = {
      "test_accuracy": 0.9 + 0.001 * values.seed - level[spec] / 10
      if values.task == "train"
      else None,
      "uplink_bytes_per_client": 4000 if spec == "none" else 1000,
      "epsilon": 2.5 if spec == "paper" else None,
      "delta": 1e-5 if spec == "paper" else None,
      "epsilon_model": "central" if spec == "paper" else None,
      "epsilon_unit": "client" if spec == "paper" else None,
      "final_params_sha256": f"{spec} {values.seed} {values.num_clients}",
      "seconds": 1.0,
      "compile_seconds": 0.5,
      "attacks": {},
    }
    for i in range(2 if values.task == "attack" else 0):
      lines.append(
        {
          "defense": spec,
          "attack": "dlg",
          "knowledge": values.attack_knowledge[0],
          "dataset": values.dataset,
          "model": values.model,
          "image": f"test:{i}",
          "round": 0,
          "batch_size": values.batch_size,
          "local_steps": values.local_steps,
          "labels_known": False,
          "weights": "initial",
          "iterations": 3,
          "restarts": 1,
          "psnr_db": float(-20 * np.log10(level[spec])),
          "ssim": 0.5,
        }
      )
    if values.task == "attack":
      image = rng.uniform(size=(2, 28, 28, 1))
      image *= values.attack != ("dlg(iterations=5)",)  # black
      np.savez(
        place / "reconstructions" / f"{spec}.npz",
        attack="dlg",
        knowledge=values.attack_knowledge[0],
        defense=spec,
        round=0,
        original=np.zeros((2, 28, 28, 1)),
        reconstruction=image * level[spec],
        label=np.array([1, 2]),
        recovered_label=np.array([1, 3]),
        client=np.array([0, 1]),
      )
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (place / "attacks.jsonl").write_text(text)
  if values.task == "train":
    tests = {2: 0.5 + 0.1 * values.seed, 3: None, 4: 0.9}
    (place / "metrics.jsonl").write_text(
      "".join(
        json.dumps(
          {"defense": values.defense[0], "round": r, "test_accuracy": accuracy}
        )
        + "\n"
        for r, accuracy in tests.items()
      )
    )
  if values.task == "costs":
    cost = {
      "uplink_bytes": 1234,
      "downlink_bytes": 4321,
      "train_seconds": 0.25,
      "send_seconds": 0.002,
      "server_seconds": 0.0125,
      "keys": [
        {"clients": 70, "pairs": 70, "seconds": 3.5, "bytes": 5_000_000}
      ],
    }
    rows = [
      {"dataset": values.dataset, "defense": spec, **cost}
      for spec in values.defense
    ]
    (place / "costs.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows)
    )
  guess = {"psnr_db_median": 12.0, "ssim_median": 0.1}
  summary = {
    "defenses": entries,
    "final_params_sha256": next(iter(entries.values()))["final_params_sha256"],
    "uplink_bytes_per_client_float32": 4000,
    "references": {"mean_image": guess} if values.task == "attack" else {},
    "seconds": 1.0,
    "compile_seconds": 0.5,
  }
  (place / "summary.json").write_text(json.dumps(summary))
  return place


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
  run = tmp_path_factory.mktemp("runs") / "study"
  study.run(tiny(run, study_batches="1,2"), pretend)
  html.write(run)
  return run


def test_the_grid_is_the_product(tmp_path):
  cells = study_grid.cells(
    tiny(tmp_path, study_batches="1,2", attack="dlg,map", study_seeds="0,5")
  )
  train = [c for c in cells if c.config.task == "train"]
  assert len(train) == 2 * 3 and len(cells) == len(train) + 2 * 2 * 2 + 1
  assert {(c.config.seed, c.config.defense) for c in train} == {
    (seed, (d,)) for seed in (0, 5) for d in DEFENSES
  }
  assert all(not c.config.attack for c in train)
  attack = [c.config for c in cells if c.config.task == "attack"]
  assert all(c.defense == DEFENSES and c.seed == 0 for c in attack)
  assert len({c.output_dir for c in attack}) == 8


def test_late_rounds_are_attacked_under_one_seed_beside_a_twin(tmp_path):
  cells = study_grid.cells(tiny(tmp_path, attack_rounds="1,2"))
  watched = [c for c in cells if c.config.task == "train" and c.config.attack]
  assert [c.config.attack_rounds for c in watched] == [(2,)] * 3
  twins = [c for c in cells if c.twin]
  assert [c.config.defense for c in twins] == [("none",)]
  assert twins[0].config.seed == 0 and not twins[0].config.attack


def test_the_hash_follows_what_a_cell_depends_on(tmp_path):
  def hashes(task, **kw):
    cells = study_grid.cells(tiny(tmp_path, **kw))
    return {
      study_grid.cell_hash(c.config) for c in cells if c.config.task == task
    }

  for task in ("train", "attack"):
    base = hashes(task)
    assert base == hashes(task, checkpoint_every=3, study_encryption="x.json")
    assert not base & hashes(task, model="lenet_zhu")
    # Another data set beside the first adds cells and changes none.
    more = hashes(task, study_datasets="mnist_sample,cifar10_sample")
    assert base < more and len(more) == 2 * len(base)
  assert hashes("attack") == hashes("attack", rounds=9, num_clients=50)
  watched = {"attack_rounds": "2"}
  assert hashes("train", **watched) < hashes(
    "train", **watched, study_clients="50"
  )
  assert hashes("train") == hashes("train", attack="map", attack_restarts=4)
  assert not hashes("train") & hashes("train", rounds=9)


def test_cells_that_are_there_are_not_run_again(tmp_path):
  ran = []

  def stop_at_three(values, data):
    if len(ran) == 3:
      raise KeyboardInterrupt
    ran.append(values.output_dir)
    return pretend(values)

  with pytest.raises(KeyboardInterrupt):
    study.run(tiny(tmp_path / "s"), stop_at_three)
  rest = []
  study.run(
    tiny(tmp_path / "s", resume=True),
    lambda values, data: rest.append(values.output_dir) or pretend(values),
  )
  assert len(ran) == 3 and len(rest) == 2 * 3 + 2 + 1 - 3
  assert not set(ran) & set(rest)
  with pytest.raises(errors.UserError, match="another config"):
    study.run(tiny(tmp_path / "s", resume=True, rounds=5), pretend)
  # The same grid again leaves its config as it is.
  mark = tmp_path / "s" / "config.json"
  before = json.loads(mark.read_text()) | {"command": ["as it began"]}
  mark.write_text(json.dumps(before))
  study.run(tiny(tmp_path / "s", resume=True), pretend)
  assert json.loads(mark.read_text()) == before
  # So does one of before there were numbers of clients.
  del before["study_clients"]
  mark.write_text(json.dumps(before))
  study.run(tiny(tmp_path / "s", resume=True), pretend)
  assert json.loads(mark.read_text()) == before
  # A grid that has grown runs what is new, and says so in its config.
  grown = []
  run = study.run(
    tiny(tmp_path / "s", resume=True, study_seeds="0,1,7"),
    lambda values, data: grown.append(values.seed) or pretend(values),
  )
  assert grown == [7, 7, 7]
  kept = json.loads((run / "config.json").read_text())
  assert kept["study_seeds"] == [0, 1, 7]


def test_the_folder_holds_what_scripts_rely_on(pretended):
  summary = json.loads((pretended / "summary.json").read_text())
  assert summary["task"] == "study" and set(summary["defenses"]) == {*DEFENSES}
  paper = summary["defenses"]["paper"]
  assert paper["test_accuracy"] == pytest.approx(0.9 + 0.0005 - 0.03)
  assert paper["attacks"]["dlg"]["blind"]["psnr_db_median"] == pytest.approx(
    -20 * np.log10(0.3)
  )
  assert [c["key"] for c in summary["claims"]] == list("abcdefghi")
  lines = (pretended / "study.jsonl").read_text().splitlines()
  points = [json.loads(line) for line in lines]
  assert points == summary["frontier"]
  assert [p["defense"] for p in points] == [*DEFENSES]
  assert points[0]["adaptive"]["images"] == 2
  assert points[0]["references"]["mean_image"]["psnr_db_median"] == 12.0
  assert summary["cells"] == 2 * 3 + 4 + 1 and summary["commits"] == ["c0ffee"]


def test_what_the_server_cannot_read_is_no_score(tmp_path):
  def encrypted(values, data=None):
    place = pretend(values)
    lines = (place / "attacks.jsonl").read_text().splitlines()
    hidden = []
    for line in map(json.loads, lines):
      if line["defense"] == "int4":
        line |= {"psnr_db": None, "ssim": None, "reason": "it is ciphertext"}
      hidden.append(json.dumps(line) + "\n")
    (place / "attacks.jsonl").write_text("".join(hidden))
    return place

  run = study.run(tiny(tmp_path / "s"), encrypted)
  summary = json.loads((run / "summary.json").read_text())
  entry = summary["defenses"]["int4"]
  assert entry["attacks"] == {} and entry["unreadable"] == "it is ciphertext"
  assert summary["defenses"]["paper"]["unreadable"] is None
  point = next(p for p in summary["frontier"] if p["defense"] == "int4")
  assert point["strongest"] is None and point["pareto"] is None
  text = study_tables.markdown(run)
  nothing = tables.MISSING
  assert f"| {nothing} | {nothing} | {nothing} | it is ciphertext |" in text
  assert text.count("it is ciphertext") == 2  # beside its costs, too
  assert "it is ciphertext" in html.write(run).read_text()


def test_two_settings_of_an_attack_are_two_attacks(tmp_path):
  """Their cells, which know of one each, both call it by its short name."""

  def stronger(values, data=None):
    place = pretend(values)
    lines = (place / "attacks.jsonl").read_text().splitlines()
    if values.attack == ("dlg(iterations=5)",):
      moved = [json.loads(line) for line in lines]
      for line in moved:
        line["psnr_db"] += 7
      lines = map(json.dumps, moved)
    text = "".join(f"{line}\n" for line in lines)
    (place / "attacks.jsonl").write_text(text)
    return place

  both = ("dlg(iterations=3)", "dlg(iterations=5)")
  values = tiny(tmp_path / "s", attack=",".join(both), attack_knowledge="blind")
  run = study.run(values, stronger)
  summary = json.loads((run / "summary.json").read_text())
  found = summary["defenses"]["paper"]["attacks"]
  weak = -20 * np.log10(0.3)
  assert [found[spec]["blind"]["psnr_db_median"] for spec in both] == [
    pytest.approx(weak),
    pytest.approx(weak + 7),
  ]
  top = summary["frontier"][0]["strongest"]
  assert (top["attack"], top["images"]) == (both[1], 2)
  html.write(run)
  # Of the stronger one, whose pictures are black: the other's are of noise.
  wall = np.asarray(Image.open(run / "figures/wall_mnist_sample_blind_0.png"))
  assert np.mean(np.max(wall[..., :3], -1) == 0) > 0.15


def test_settings_stand_side_by_side(pretended):
  text = study_tables.settings_markdown(study_tables.read(pretended))
  head, _, *rows = text.splitlines()
  assert head.endswith("| batch of 1 | batch of 2 |")
  assert rows[1] == "| paper | 10.5 / 10.5 | 10.5 / 10.5 |"
  nothing = tables.MISSING
  assert rows[3:] == [
    f"| _best guess for each image_ | {nothing} | {nothing} |",
    "| _images_ | 2 | 2 |",
    "| _images in an update_ | 1 | 2 |",
  ]
  assert 'id="throughout"' in (pretended / "report.html").read_text()


def test_other_numbers_of_clients_are_attacked_beside_the_study(tmp_path):
  few = {"attack_rounds": "1,2", "study_seeds": "0,1"}
  plain = study_grid.cells(tiny(tmp_path, **few))
  cells = study_grid.cells(tiny(tmp_path, study_clients="2,500", **few))
  more = [c for c in cells if c.aside]
  assert [c for c in cells if not c.aside] == plain and len(more) == 2 * 3
  assert {(c.config.num_clients, c.config.cohort_size) for c in more} == {
    (2, 2),
    (500, 3),
  }
  assert all(
    c.config.seed == 0 and c.config.attack_rounds == (2,) for c in more
  )

  def late(values, data=None):
    place = pretend(values)
    if values.task == "train" and values.attack:
      lines = [
        {
          **base,
          "knowledge": knowledge,
          "weights": "trained",
          "round": 2,
          "psnr_db": float(values.num_clients % 97),
          "guess_psnr_db": 7.0,
        }
        for knowledge in values.attack_knowledge
        for base in reconstruction(values)
      ]
      text = "".join(json.dumps(line) + "\n" for line in lines)
      (place / "attacks.jsonl").write_text(text)
    return place

  def reconstruction(values):
    yield {
      "defense": values.defense[0],
      "attack": "dlg",
      "dataset": values.dataset,
      "image": "train:5",
      "local_steps": 1,
      "batch_size": 4,
      "ssim": 0.5,
    }

  values = tiny(tmp_path / "s", study_clients="2,500", **few)
  run = study.run(values, late)
  found = study_tables.read(run)
  # Accuracy is the study's own, of a hundred clients and two seeds, and so are
  # the runs that must be alike with and without an adversary.
  twin = found.results.twins[0]
  assert twin["watched"] == twin["unwatched"] == "none 0 100"
  assert len(found.results.training) == 2 * 3
  assert {a.get("num_clients") for a in found.results.attacks} == {
    *(None, 2, 100, 500)
  }
  head, _, *rows = study_tables.settings_markdown(found).splitlines()
  assert head.endswith(
    "| batch of 1 | trained weights, 2 clients | trained weights, 100 clients"
    " | trained weights, 500 clients |"
  )
  assert rows[0].endswith("| 2.0 / 2.0 | 3.0 / 3.0 | 15.0 / 15.0 |")
  assert rows[-3].endswith("| 7.0 | 7.0 | 7.0 |")
  assert "(2, 500 attacked as well)" in html.write(run).read_text()
  claim = {c["key"]: c for c in found.summary["claims"]}["i"]
  assert "trained weights (500 clients), 1 step of 4" in claim["words"]


@pytest.mark.parametrize(
  "given, said",
  [
    ({"study_clients": "500"}, "=500 adds training that is attacked"),
    ({"study_clients": "0,5", "attack_rounds": "2"}, "names 0. Expected"),
    ({"study_clients": "5,100", "attack_rounds": "2"}, "names 100. Expected"),
  ],
)
def test_numbers_of_clients_that_make_no_study(tmp_path, given, said):
  with pytest.raises(errors.UserError, match=said):
    tiny(tmp_path, **given)


def test_what_a_cell_in_training_would_refuse_is_refused_at_once(tmp_path):
  # R-GAP takes the single images of the attack cells, not clients of four.
  values = tiny(
    tmp_path / "s",
    attack="rgap",
    model="cnn6",
    attack_rounds="1,2",
    batch_size=4,
    client_examples=4,
  )
  with pytest.raises(errors.UserError, match="rgap"):
    study.run(values, pretend)
  assert not (tmp_path / "s").exists()


def test_curves_are_means_over_the_seeds(pretended):
  results = study_tables.read(pretended).results
  assert results.training[0]["accuracies"] == [[2, 0.5], [4, 0.9]]
  assert evidence.curve(results, "mnist_sample", "paper") == [
    (2, pytest.approx(0.55)),
    (4, pytest.approx(0.9)),
  ]
  text = (pretended / "report.html").read_text()
  assert 'id="curves"' in text and "paper 90.0%" in text
  assert (pretended / "figures" / "accuracy_mnist_sample.png").is_file()


def test_keys_of_encryption_are_drawn(tmp_path):
  costs = str(config.FLAGS_DIR.parents[1] / "results/encryption/costs.json")
  run = study.run(tiny(tmp_path / "s", study_encryption=costs), pretend)
  text = html.write(run).read_text()
  assert "Keys on the wire" in text
  image = np.asarray(Image.open(run / "figures" / "encryption.png"))
  # Lines of several schemes, each in its colour.
  assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50


def test_one_setting_has_no_table_of_its_own(tmp_path):
  run = study.run(tiny(tmp_path / "s"), pretend)
  assert 'id="throughout"' not in html.write(run).read_text()
  bare = study.run(tiny(tmp_path / "b", attack=""), pretend)
  assert not list(study_tables.by_setting(study_tables.read(bare)))


def test_costs_stand_beside_what_they_buy(pretended):
  text = study_tables.markdown(pretended)
  heading = next(line for line in text.splitlines() if "Downlink" in line)
  assert "Strongest attack, dB" in heading and "Accuracy" in heading
  (row,) = (
    line
    for line in text.splitlines()
    if line.startswith("| paper | ") and "1,234" in line
  )
  for cell in (
    "4,321",
    "250",
    "2.00",
    "12.5",
    "3.5 s, 5 MB for 70",
    "2.5, not against the server",
  ):
    assert f" {cell} |" in row
  assert row.endswith(" 10.5 |")
  html_text = (pretended / "report.html").read_text()
  assert 'id="costs"' in html_text and "3.5 s, 5 MB for 70" in html_text


def test_a_browser_shows_the_page(pretended, tmp_path):
  browser.check(pretended / "report.html", tmp_path)


def test_the_page_has_every_part_and_loads_nothing(pretended):
  text = (pretended / "report.html").read_text()
  bare = re.sub(r'src="data:[^"]*"', "", text)
  for loader in ("http:", "https:", "//", "url(", "@import", "<script"):
    assert loader not in re.sub(r"/\*.*?\*/", "", bare)
  assert "default-src 'none'" in text
  order = ("answer", "claims", "frontier", "images", "curves", "methods")
  places = [bare.index(f'id="{p}"') for p in order]
  assert places == sorted(places)
  for key in "abcdefghi":
    assert f'data-claim="{key}"' in bare
  for name in DEFENSES:
    assert f'data-defense="{name}"' in bare
  assert "mean training image" in bare and "no attack" in bare
  assert "protected" not in bare.lower()
  assert text.count("<img") == 1 + 2 + 1
  names = {p.name for p in (pretended / "figures").iterdir()}
  assert names == {
    *("frontier.png", "accuracy_mnist_sample.png"),
    "wall_mnist_sample_blind_0.png",
    "wall_mnist_sample_adaptive_0.png",
  }


def test_the_table_for_the_terminal_names_the_strongest_attack(pretended):
  text = study_tables.markdown(pretended)
  assert "| (a) Undefended" in text and "| dlg, adaptive |" in text
  assert "_mean training image_" in text


@pytest.mark.parametrize(
  "change, message",
  [
    ({"study_batches": "3"}, "do not make whole updates"),
    ({"study_datasets": "minst"}, "unknown dataset"),
    ({"study_datasets": ""}, "is empty"),
    ({"defense": "none,dp_gaussian(epsilon=3)"}, "noise_multiplier"),
    ({"attack_rounds": "7"}, "rounds go from 1"),
  ],
)
def test_a_mistake_shows_before_anything_is_written(tmp_path, change, message):
  with pytest.raises(errors.UserError, match=message):
    tiny(tmp_path / "s", **change)
  assert not (tmp_path / "s").exists()


def test_costs_of_encryption_are_checked(tmp_path):
  path = tmp_path / "costs.json"
  path.write_text('[{"scheme": "shared"}]')
  for name in (path, tmp_path / "none.json"):
    with pytest.raises(errors.UserError, match="study_encryption"):
      study.run(tiny(tmp_path / "s", study_encryption=str(name)), pretend)
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  "name",
  [
    "smoke",
    "laptop",
    "baselines",
    "frontier",
    "private",
    "mixup",
    "settings",
    "full",
  ],
)
def test_the_flag_files_are_studies(name):
  with flagsaver.flagsaver():
    path = config.FLAGS_DIR / f"study_{name}.flags"
    flags.FLAGS(["main", f"--flagfile={path}"])
    values = config.from_flags(flags.FLAGS)
  assert values.task == "study" and study_grid.cells(values)


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path):
  run = main.run(tiny(tmp_path / "s", attack_rounds="2"))
  summary = json.loads((run / "summary.json").read_text())
  assert summary["cells"] == 2 * 3 + 1 + 2 + 1
  assert (run / "report.html").stat().st_size > 10_000
  twins = json.loads((run / "evidence.json").read_text())["twins"]
  assert twins[0]["watched"] == twins[0]["unwatched"]
  lines = (run / "attacks.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert {a["weights"] for a in found} == {"initial", "trained"}
  # Cells are runs like any other, with pages of their own where wanted.
  assert html.write(run / "cells" / found[0]["cell"]).is_file()
  # In processes beside one another they come to the same bits.
  more = tiny(tmp_path / "p", attack_rounds="2", study_processes=2)
  beside = main.run(more)

  def measured(run, name):
    lines = (run / name).read_text().splitlines()
    times = ("seconds", "compile_seconds", "peak_rss_mb")
    return [
      {k: v for k, v in json.loads(line).items() if k not in times}
      for line in lines
    ]

  for name in ("training.jsonl", "attacks.jsonl"):
    assert measured(beside, name) == measured(run, name)
  again = json.loads((beside / "evidence.json").read_text())
  assert again["twins"] == twins


def test_processes_share_a_processor_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(study.jax, "default_backend", lambda: "gpu")
  with pytest.raises(errors.UserError, match=r"--study_processes=2.*'gpu'"):
    study.run(tiny(tmp_path / "s", study_processes=2), pretend)
  assert not (tmp_path / "s").exists()


def test_cells_find_what_others_compiled(tmp_path, monkeypatch):
  place = tmp_path / "compiled"
  before = {
    name: getattr(jax.config, name)
    for name in (
      "jax_compilation_cache_dir",
      "jax_persistent_cache_min_compile_time_secs",
    )
  }

  def compiled():
    jax.jit(lambda x: x * 3 + 1).lower(jnp.zeros(7)).compile()
    return {path.name for path in place.glob("*")}

  try:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with study._programs_kept(place):
      assert not compiled()  # the user has a cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 30.0)
    jax.config.update("jax_compilation_cache_dir", None)
    with study._programs_kept(place):
      first = compiled()
      assert first and compiled() == first
    assert not place.exists()
    with pytest.raises(KeyboardInterrupt), study._programs_kept(place):
      compiled()
      raise KeyboardInterrupt
    assert place.exists()  # for the resumed study
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 30.0
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
