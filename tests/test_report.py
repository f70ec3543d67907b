"""The report, on runs made up of real images and invented results."""

import base64
from html import parser as html_parser
import io
import itertools
import json
import pathlib
import re

from matplotlib import text as mpl_text
import numpy as np
from PIL import Image
import pytest
import scipy.ndimage
import scipy.optimize

from mpqfl_jax import datasets, errors, metrics
from mpqfl_jax.report import (
  figures,
  findings,
  grid,
  html,
  records,
  style,
  tables,
)
from tests import browser

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
  count=8,
  seed=0,
):
  """Writes a run's folder: real images, blurred and noised, as attacks.

  Args:
    folder: where.
    images: [n, height, width, channels] in [0, 1], the first `count` attacked.
    labels: [n].
    defenses: as `DEFENSES`.
    knowledge: which regimes to keep.
    task: `train` or `attack`.
    rounds: how many rounds of training.
    count: how many images are attacked.
    seed: of everything invented.

  Returns:
    The summary.
  """
  rng = np.random.default_rng(seed)
  folder = pathlib.Path(folder)
  (folder / "reconstructions").mkdir(parents=True)
  original = images[:count].astype(np.float32)
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
      level = noise * rng.uniform(0.6, 1.6, (count, 1, 1, 1))
      guess = scipy.ndimage.gaussian_filter(original, (0, blur, blur, 0))
      guess = guess + level * rng.normal(size=guess.shape)
      guess = np.clip(guess, 0, 1).astype(np.float32)
      recovered = np.where(rng.uniform(size=count) < 0.9, labels[:count], 3)
      slug = re.sub(r"[^a-z0-9]+", "_", name).strip("_")
      np.savez(
        folder / "reconstructions" / f"{attack}_{regime}_{slug}_round0.npz",
        attack=attack,
        knowledge=regime,
        defense=name,
        round=0,
        original=original,
        reconstruction=guess,
        label=labels[:count],
        recovered_label=recovered,
        client=np.arange(count),
      )
      psnr = metrics.psnr_db(original, guess)
      ssim = metrics.ssim(original, guess)
      found = metrics.reidentified(original, guess, images[count:])
      cells.setdefault(attack, {})[regime] = metrics.summarize(psnr, ssim)
      for i in range(count):
        attack_lines.append(
          {
            "defense": name,
            "attack": attack,
            "knowledge": regime,
            "dataset": "mnist_sample",
            "model": "lenet_zhu",
            "image": i,
            "client": i,
            "round": 1,
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
          "round": r + 1,
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
      original, images[count:].mean(axis=0), np.random.default_rng(1)
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


class _Page(html_parser.HTMLParser):
  """Tags with their attributes, and the text of table cells by row."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.rows = {}
    self._row = self._cell = None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    if tag == "tr":
      self._row = self.rows.setdefault(attrs.get("data-defense"), [])
    elif tag in ("td", "th"):
      self._cell = []
      self._row.append(self._cell)
    elif tag == "small" and self._cell is not None:
      self._cell.append("|")

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self._cell = None

  def handle_data(self, data):
    if self._cell is not None:
      self._cell.append(data)


def _cells(page, defense):
  return [
    [part.strip() for part in "".join(cell).split("|")]
    for cell in page.rows[defense]
  ]


def _images(name="mnist_sample"):
  data = datasets.load(name)
  return data.x_test[:200] / 255.0, data.y_test[:200]


@pytest.fixture(scope="module")
def images():
  return _images()


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
  """(folder, summary, text of the page) of a run with everything in it."""
  folder = tmp_path_factory.mktemp("run") / "run"
  summary = fake_run(folder, *images)
  path = html.write(folder)
  return folder, summary, path.read_text(encoding="utf-8")


def _small(folder, images, **kw):
  """A quick run: three images, few rounds."""
  fake_run(folder, *images, **{"count": 3, "rounds": 3, **kw})
  return records.read(folder)


def _attacked(*, blur, noise, regimes=("blind",), attack="dlg"):
  return (0.9, 1000, None, {(attack, k): (blur, noise) for k in regimes})


CLEAR = {"blur": 0.0, "noise": 0.01}
HIDDEN = {"blur": 9.0, "noise": 0.9}


# The page


def test_the_page_loads_nothing_from_elsewhere(run):
  text = run[2]
  for tag, attrs in _Page(text).tags:
    assert tag not in ("script", "link", "iframe", "object", "embed", "base")
    assert "href" not in attrs and "srcset" not in attrs
    assert not any(name.startswith("on") for name in attrs)
    if "src" in attrs:
      assert attrs["src"].startswith("data:image/png;base64,")
  bare = re.sub(r'src="data:[^"]*"', "", text)
  for loader in ("http:", "https:", "//", "url(", "@import"):
    assert loader not in re.sub(r"/\*.*?\*/", "", bare)
  assert "default-src 'none'" in text


def test_every_figure_is_embedded_whole_and_described(run):
  folder, summary, text = run
  found = [attrs for tag, attrs in _Page(text).tags if tag == "img"]
  files = {p.read_bytes() for p in folder.glob("figures/*.png")}
  assert len(found) == len(files) == 5
  for attrs in found:
    raw = base64.b64decode(attrs["src"].split(",", 1)[1])
    assert raw in files
    picture = Image.open(io.BytesIO(raw))
    assert picture.info["dpi"][0] >= 150
    # Sharp on a screen of double density.
    assert picture.width == pytest.approx(2 * int(attrs["width"]), abs=1)
    for name in summary["defenses"]:
      assert name in attrs["alt"]


def test_the_headings_are_in_order(run):
  levels = [
    int(t[1]) for t, _ in _Page(run[2]).tags if re.fullmatch("h[1-6]", t)
  ]
  assert levels[0] == 1 and levels.count(1) == 1
  assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_the_table_has_the_numbers_of_the_summary(run):
  _, summary, text = run
  page = _Page(text)
  names = list(summary["defenses"])
  assert [n for n in page.rows if n is not None] == names
  base = summary["defenses"]["none"]["test_accuracy"]
  for name, entry in summary["defenses"].items():
    _, accuracy, uplink, epsilon, attack, psnr, ssim, success = _cells(
      page, name
    )
    assert float(accuracy[0]) == pytest.approx(
      100 * entry["test_accuracy"], abs=0.051
    )
    if name != "none":
      assert float(accuracy[1].replace(tables.MINUS, "-")) == pytest.approx(
        100 * (entry["test_accuracy"] - base), abs=0.051
      )
    size = entry["uplink_bytes_per_client"]
    assert int(uplink[0].replace(",", "")) == size
    if size < 50_000:
      factor = summary["uplink_bytes_per_client_float32"] / size
      assert float(uplink[1].split(tables.TIMES)[0]) == pytest.approx(
        factor, rel=0.01
      )
    if entry["epsilon"] is None:
      assert epsilon == ["no proof"]
    else:
      assert float(epsilon[0]) == pytest.approx(entry["epsilon"], rel=0.005)
    cell = entry["attacks"][attack[0]][attack[1]]
    assert cell["psnr_db_median"] == max(
      c["psnr_db_median"] for k in entry["attacks"].values() for c in k.values()
    )
    assert float(psnr[0]) == pytest.approx(cell["psnr_db_median"], abs=0.051)
    assert float(psnr[1]) == pytest.approx(cell["psnr_db_max"], abs=0.051)
    assert float(ssim[0]) == pytest.approx(cell["ssim_median"], abs=0.0051)
    assert float(success[0]) == pytest.approx(
      100 * cell["success_rate"], abs=0.051
    )
    count, total = map(int, success[1].split(" of "))
    assert count / total == cell["success_rate"]


def test_the_references_stand_in_the_table(run):
  _, summary, text = run
  cells = ["".join(c).strip() for c in _Page(text).rows[None]]
  for name, values in summary["references"].items():
    at = cells.index(tables.REFERENCE_NAMES[name])
    row = cells[at : at + 8]
    assert "no attack" in row
    assert f"{values['psnr_db_median']:.1f}" in row
    assert f"{values['ssim_median']:.2f}" in row


def test_the_settings_and_the_configuration_are_printed(run):
  text = run[2]
  for words in (
    "honest-but-curious",
    "batch of 1",
    "1 local step;",
    "initial weights",
    "labels known",
    "labels inferred",
    "within 300 iterations, 2 restarts",
    "0123456789abcdef",
    "versions.jax",
  ):
    assert words in text


def test_names_are_escaped(images, tmp_path):
  defenses = {
    "none": _attacked(**CLEAR),
    "<b>policy.json": _attacked(**HIDDEN),
  }
  _small(tmp_path / "run", images, defenses=defenses)
  text = html.write(tmp_path / "run").read_text()
  assert "<b>" not in text
  assert "&lt;b&gt;policy.json" in text


def test_an_attack_task_has_neither_accuracy_nor_rounds(images, tmp_path):
  r = _small(tmp_path / "run", images, task="attack")
  text = html.write(tmp_path / "run").read_text()
  assert "Test accuracy" not in text and "test accuracy" not in text
  assert "Test accuracy" not in tables.markdown(r.summary)
  names = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
  assert names == {"psnr.png", "grid_1_dlg_round0.png", "grid_2_map_round0.png"}


def test_a_run_without_attacks_tells_only_costs(images, tmp_path):
  r = _small(tmp_path / "run", images, knowledge=())
  assert {v.label for v in findings.verdicts(r)} == {"Not attacked"}
  text = html.write(tmp_path / "run").read_text()
  assert "only the costs are known" in text
  assert "PSNR" not in text and "Every attack" not in text
  names = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
  assert names == {"accuracy.png", "tradeoff.png"}


def test_null_fields_are_printed_as_missing(images, tmp_path):
  folder = tmp_path / "run"
  _small(folder, images)
  summary = json.loads((folder / "summary.json").read_text())
  entry = summary["defenses"]["prune"]
  entry["test_accuracy"] = entry["uplink_bytes_per_client"] = None
  for cell in (c for k in entry["attacks"].values() for c in k.values()):
    cell.update(dict.fromkeys(cell))
  summary["references"] = None
  (folder / "summary.json").write_text(json.dumps(summary))
  lines = (folder / "attacks.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  optional = ("psnr_db", "ssim", "seconds", "label_correct", "reidentified")
  for line in lines:
    if line["defense"] == "prune":
      line.update(dict.fromkeys(optional))
  (folder / "attacks.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  text = html.write(folder).read_text()
  row = _cells(_Page(text), "prune")
  gone = tables.MISSING
  assert [c[0] for c in row[1:]] == [gone, gone, "no proof", *[gone] * 4]
  assert "None" not in text and "nan" not in re.sub(r'"data:[^"]*"', "", text)


# What is said


def _say(images, tmp_path, **defenses):
  r = _small(tmp_path / "run", images, defenses=defenses)
  return r, {v.defense: v for v in findings.verdicts(r)}


def test_a_defence_that_only_blind_attacks_met_is_never_called_safe(
  images, tmp_path
):
  r, said = _say(
    images, tmp_path, none=_attacked(**CLEAR), paper=_attacked(**HIDDEN)
  )
  assert said["paper"].label == "Stopped this blind attack (dlg)"
  assert "No attack that knows the codec was tried." in said["paper"].privacy
  assert "0 of 3 images" in said["paper"].privacy
  assert any(
    "stopped this blind attack (dlg)" in s for s in findings.headline(r)
  )
  text = html.write(tmp_path / "run").read_text().lower()
  for word in ("protected", "secure", "is safe"):
    assert word not in text
  assert "no adversary here knows the codec" in text


def test_an_adaptive_attack_shows_what_a_blind_one_hides(images, tmp_path):
  r, said = _say(
    images,
    tmp_path,
    none=_attacked(**CLEAR),
    paper=(
      0.9,
      1000,
      None,
      {("dlg", "blind"): (9.0, 0.9), ("dlg", "adaptive"): (0.0, 0.02)},
    ),
  )
  assert said["paper"].status == "leaks"
  assert "dlg (adaptive) rebuilt 3 of 3 images" in said["paper"].privacy
  assert "Blind attacks alone rebuilt none" in said["paper"].privacy
  assert any("1 of 1 defence let an attack" in s for s in findings.headline(r))


def test_attacks_of_both_kinds_that_fail_are_named_as_tried(images, tmp_path):
  both = ("blind", "adaptive")
  _, said = _say(
    images,
    tmp_path,
    none=_attacked(**CLEAR),
    paper=_attacked(**HIDDEN, regimes=both),
  )
  assert said["paper"].label == "Stopped the attacks tried"
  assert "may still succeed" in said["paper"].privacy


@pytest.mark.parametrize("known", [False, True])
def test_labels_that_were_read_are_told_where_no_image_was(
  images, tmp_path, known
):
  folder = tmp_path / "run"
  defenses = {"none": _attacked(**CLEAR), "paper": _attacked(**HIDDEN)}
  _small(folder, images, defenses=defenses)
  _mark(
    folder,
    "paper",
    lambda i, line: {"label_correct": i != 1, "labels_known": known},
  )
  said = {v.defense: v for v in findings.verdicts(records.read(folder))}
  words = "Labels were read all the same: 2 of 3 by dlg (blind)."
  assert said["paper"].status == "stopped"
  assert (words in said["paper"].privacy) != known


def test_an_attack_that_never_works_proves_nothing(images, tmp_path):
  r, said = _say(
    images, tmp_path, none=_attacked(**HIDDEN), paper=_attacked(**HIDDEN)
  )
  assert said["paper"].status == "open"
  assert "fail on undefended updates too" in said["paper"].privacy
  first, second, *_ = findings.headline(r)
  assert "No image was rebuilt" in first
  # Of undefended updates nothing is said beside themselves.
  assert "undefended updates too" not in first
  assert second == "1 of 1 defence not shown to stop anything: paper."


def test_a_working_attack_must_have_been_tried_on_the_defence(images, tmp_path):
  _, said = _say(
    images,
    tmp_path,
    none=(
      0.9,
      1000,
      None,
      {("dlg", "blind"): (0.0, 0.01), ("rgap", "blind"): (9.0, 0.9)},
    ),
    paper=_attacked(**HIDDEN, attack="rgap"),
  )
  assert said["paper"].status == "open"


def test_without_an_undefended_run_nothing_is_stopped(images, tmp_path):
  r, said = _say(images, tmp_path, paper=_attacked(**HIDDEN))
  assert said["paper"].status == "open"
  assert "no undefended client" in findings.headline(r)[0]


def test_beating_the_references_is_a_leak_in_part(images, tmp_path):
  _, said = _say(
    images,
    tmp_path,
    none=_attacked(**CLEAR),
    paper=_attacked(blur=0.5, noise=0.16),
  )
  assert said["paper"].status == "partly"
  assert "beats the best guess" in said["paper"].privacy
  assert "3 of 3 reconstructions" in said["paper"].privacy


def _mark(folder, defense, change):
  """Changes lines of `attacks.jsonl` about a defence: (number, line) -> new."""
  path = folder / "attacks.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  own = [line for line in lines if line["defense"] == defense]
  for i, line in enumerate(own):
    line.update(change(i, line))
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
  ("gain", "updates", "status"),
  [(0.5, 10, "partly"), (0.1, 2, "stopped"), (-0.5, 10, "stopped")],
)
def test_a_small_gain_on_every_update_is_a_leak_and_on_two_is_luck(
  images, tmp_path, gain, updates, status
):
  folder = tmp_path / "run"
  defenses = {"none": _attacked(**CLEAR), "paper": _attacked(**HIDDEN)}
  _small(folder, images, defenses=defenses, count=10)
  _mark(
    folder,
    "paper",
    lambda i, line: {
      "guess_psnr_db": line["psnr_db"] - gain,
      "client": i % updates,
      "reidentified": False,
    },
  )
  said = {v.defense: v for v in findings.verdicts(records.read(folder))}
  assert said["paper"].status == status
  words = "beats every guess without an attack on 10 of 10 updates"
  assert (words in said["paper"].privacy) == (status == "partly")
  if updates == 2:
    assert "0 of 10 images of 2 updates" in said["paper"].privacy


def test_blind_attacks_rebuilt_none_only_where_none_did(images, tmp_path):
  def attacks(blind):
    return {
      ("dlg", "blind"): blind,
      ("tag", "blind"): (9.0, 0.9),
      ("dlg", "adaptive"): (0.0, 0.002),
    }

  _, said = _say(
    images,
    tmp_path,
    none=(0.9, 1000, None, attacks((0.0, 0.01))),
    paper=(0.9, 1000, None, attacks((9.0, 0.9))),
  )
  assert said["none"].status == said["paper"].status == "leaks"
  assert "Blind attacks alone rebuilt none" not in said["none"].privacy
  assert "Blind attacks alone rebuilt none" in said["paper"].privacy


def test_rounds_are_told_apart(images, tmp_path):
  """A median over early and late weights is the score of neither."""
  folder = tmp_path / "run"
  _small(folder, images, defenses={"none": _attacked(**CLEAR)}, count=4)
  _mark(
    folder,
    "none",
    lambda i, line: {
      "round": 1 if i < 2 else 45,
      "psnr_db": 60.0 if i < 2 else 12.0,
    },
  )
  summary = json.loads((folder / "summary.json").read_text())
  found = summary["defenses"]["none"]["attacks"]["dlg"]["blind"]
  found["rounds"] = {
    "1": {**found, "psnr_db_median": 60.0, "success_rate": 1.0},
    "45": {**found, "psnr_db_median": 12.0, "success_rate": 0.0},
  }
  (folder / "summary.json").write_text(json.dumps(summary))
  run = records.read(folder)
  (row,) = tables.rows(run.summary)
  assert row.attack == "dlg, blind, round 1" and row.psnr == "60.0"
  text = findings.headline(run)[0]
  assert "dlg (blind, round 1) rebuilt 2 of 2 images" in text
  page = html.write(folder).read_text()
  assert "blind, round 1<" in page and "blind, round 45<" in page
  assert "dlg, blind, round 1 on none 60.0 dB" in page
  assert "dlg, blind, round 45 on none 12.0 dB" in page


def test_a_run_that_learnt_nothing_says_so(images, tmp_path):
  folder = tmp_path / "run"
  _small(folder, images, defenses={"none": _attacked(**CLEAR)})
  summary = json.loads((folder / "summary.json").read_text())
  summary["defenses"]["paper"] = dict(summary["defenses"]["none"])
  for chance, said in ((0.11, False), (0.89, True)):
    summary["chance_accuracy"] = chance
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join(findings._prices(summary, {"none": "", "paper": "p"}))
    assert ("nothing was learnt" in text) == said


@pytest.mark.parametrize(
  ("found", "status", "words"),
  [
    (0, "stopped", "no better than a guess"),
    (1, "stopped", "1 of 3 reconstructions by dlg (blind) lies nearest"),
    (2, "partly", "2 of 3 reconstructions by dlg (blind) lie nearer"),
  ],
)
def test_finding_two_originals_again_is_a_leak(
  images, tmp_path, found, status, words
):
  folder = tmp_path / "run"
  defenses = {"none": _attacked(**CLEAR), "paper": _attacked(**HIDDEN)}
  _small(folder, images, defenses=defenses)
  _mark(folder, "paper", lambda i, line: {"reidentified": i < found})
  said = {v.defense: v for v in findings.verdicts(records.read(folder))}
  assert said["paper"].status == status
  assert words in said["paper"].privacy


def test_the_headline_gives_prices_of_the_summary(run):
  folder, _, _ = run
  text = " ".join(findings.headline(records.read(folder)))
  assert "An undefended update gives private images away" in text
  assert "reaches 96.8% test accuracy" in text
  assert f"reaches 89.4% ({tables.MINUS}7.4 points)" in text
  # 53,440 / 3,412
  assert f"int2 sends 15.7{tables.TIMES} less" in text


@pytest.mark.parametrize(
  ("uplink", "float32", "text"),
  [
    (100, 100, "same"),
    (25, 100, "4.00x less"),
    (1000, 100, "10.0x more"),
    (1, 12345, "12,345x less"),
    (1000, 9999, "10.0x less"),
    (None, 100, None),
    (100, None, None),
  ],
)
def test_ratios(uplink, float32, text):
  expected = text.replace("x", tables.TIMES) if text else tables.MISSING
  assert tables.ratio(uplink, float32) == expected


def test_markdown_is_the_same_table(run):
  _, summary, _ = run
  lines = tables.markdown(summary).splitlines()
  cells = [[c.strip() for c in line[1:-1].split("|")] for line in lines]
  assert len({len(row) for row in cells}) == 1
  head, rule, *body = cells
  assert head[0] == "Defence" and set("".join(rule)) == {"-", ":"}
  table = tables.rows(summary)
  assert [row[0] for row in body[: len(table)]] == list(summary["defenses"])
  for row, line in zip(table, body, strict=False):
    assert list(row) == line
  assert [row[0] for row in body[len(table) :]] == [
    f"_{n}_" for n in tables.REFERENCE_NAMES.values()
  ]


# What is refused


def _user_error(folder, match):
  with pytest.raises(errors.UserError, match=match):
    html.write(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
  _user_error(tmp_path, "config.json")
  (tmp_path / "config.json").write_text("{}")
  _user_error(tmp_path, "summary.json")
  (tmp_path / "summary.json").write_text("{")
  _user_error(tmp_path, "not JSON")
  (tmp_path / "summary.json").write_text("{}")
  _user_error(tmp_path, "no defenses")


def test_a_broken_line_is_named(images, tmp_path):
  _small(tmp_path / "run", images)
  with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
    f.write("{\n")
  _user_error(tmp_path / "run", "metrics.jsonl, line 19")


def test_reconstructions_without_their_names_are_refused(images, tmp_path):
  _small(tmp_path / "run", images)
  path = next((tmp_path / "run" / "reconstructions").glob("*.npz"))
  np.savez(path, original=np.zeros((1, 28, 28, 1)))
  _user_error(tmp_path / "run", "lacks .*knowledge")


def test_files_of_different_runs_are_refused(images, tmp_path):
  _small(tmp_path / "run", images)
  (tmp_path / "run" / "attacks.jsonl").write_text("")
  _user_error(tmp_path / "run", "not of one run")


# Figures


NAMES = [
  "none", "float16", "bfloat16", "float8", "int8", "int4", "int2", "paper",
  "mixed_random", "sign", "ternary", "qsgd", "prune(fraction=0.9)",
  "prune(fraction=0.99)", "topk", "dp_gaussian(noise_multiplier=0.1,clip=1)",
  "dp_gaussian(noise_multiplier=1,clip=1)", "dp_laplace", "he",
]  # fmt: skip


def test_no_two_defences_look_alike():
  looks = style.styles(NAMES)
  assert len({(s.color, s.marker) for s in looks.values()}) == len(NAMES)
  assert len({s.label for s in looks.values()}) == len(NAMES)
  assert [n for n, s in looks.items() if s.color == looks["none"].color] == [
    "none"
  ]
  assert looks["dp_gaussian(noise_multiplier=1,clip=1)"].label == (
    "dp_gaussian 1"
  )
  assert looks["prune(fraction=0.9)"].label == "prune 0.9"


def test_a_switch_goes_by_its_own_name():
  looks = style.styles(["he", "he(attacker_holds_key=true)"])
  assert [s.label for s in looks.values()] == ["he", "he attacker_holds_key"]


def test_the_main_defences_look_the_same_in_every_run():
  few = style.styles(["paper", "none"])
  many = style.styles(NAMES)
  assert all(few[n] == many[n] for n in few)


def test_a_single_variant_goes_by_its_family_name():
  assert style.styles(["prune(fraction=0.9)"])["prune(fraction=0.9)"].label == (
    "prune"
  )


@pytest.mark.parametrize("seed", range(5))
def test_spread_is_the_least_squares_solution(seed):
  rng = np.random.default_rng(seed)
  wanted, gap = rng.uniform(0, 5, 6), 1.0
  order = np.argsort(wanted)
  best = scipy.optimize.minimize(
    lambda z: np.sum((z - wanted) ** 2),
    x0=wanted,
    method="SLSQP",
    constraints=[
      {"type": "ineq", "fun": lambda z, a=a, b=b: z[b] - z[a] - gap}
      for a, b in itertools.pairwise(order)
    ],
    options={"ftol": 1e-12},
  )
  got = np.array(style.spread(list(wanted), gap))
  np.testing.assert_allclose(got, best.x, atol=1e-4)


def test_labels_of_points_do_not_overlap():
  fig = style.new_figure(8, 4)
  ax = fig.add_subplot()
  points = [(1, 1), (1.05, 1.02), (1.1, 0.98), (5, 5), (9, 1), (8.9, 1.05)]
  ax.set_xlim(0, 10)
  ax.set_ylim(0, 6)
  fig.canvas.draw()
  fig.set_layout_engine("none")
  looks = list(style.styles(NAMES[: len(points)]).values())
  style.label_points(ax, points, looks)
  renderer = fig.canvas.get_renderer()
  boxes = [mpl_text.Text.get_window_extent(t, renderer) for t in ax.texts]
  assert len(boxes) == len(points)
  frame = ax.get_window_extent(renderer)
  for a, b in itertools.combinations(boxes, 2):
    assert not a.overlaps(b)
  for box in boxes:
    assert frame.contains(*box.min) and frame.contains(*box.max)


def test_the_grid_shows_every_pixel_as_a_square(images, tmp_path):
  r = _small(tmp_path / "run", images)
  group = grid.groups(r.reconstructions)[0]
  known = style.styles(r.summary["defenses"])
  drawn = grid.draw(group, known, "setting")
  drawn.figure.canvas.draw()
  pixels = np.asarray(drawn.figure.canvas.buffer_rgba())[..., 0]
  side = 28 * 5
  for s in (group[0].original, group[0].reconstruction):
    wanted = np.kron(np.round(255 * s[1, :, :, 0]), np.ones((5, 5)))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side))
    # The corners of the digit's pixels find the place, the rest proves it; off
    # by one level where a colour map rounds.
    near = np.abs(windows[..., ::35, ::35] - wanted[::35, ::35]).max((-1, -2))
    places = np.argwhere(near <= 1)
    worst = [np.abs(windows[y, x] - wanted).max() for y, x in places]
    assert worst and min(worst) <= 1


def test_names_do_not_reach_into_the_images(images, tmp_path):
  r = _small(tmp_path / "run", images, count=8)
  known = style.styles(r.summary["defenses"])
  drawn = grid.draw(grid.groups(r.reconstructions)[0], known, "setting")
  (ax,) = drawn.figure.axes
  renderer = drawn.figure.canvas.get_renderer()
  pictures = [i.get_window_extent(renderer) for i in ax.images]
  labels = {style.wrapped(look.label) for look in known.values()}
  names = [t for t in ax.texts if t.get_text() in labels]
  assert len(names) == len(known) and len(pictures) > 8
  for text in names:
    box = text.get_window_extent(renderer)
    assert not any(box.overlaps(p) for p in pictures), text.get_text()


def test_grids_keep_images_and_rounds_apart(images):
  def made(**kw):
    x = images[0][:2].astype(np.float32)
    base = {
      "attack": "dlg",
      "knowledge": "blind",
      "defense": "none",
      "round": 1,
      "original": x,
      "reconstruction": x,
      "label": images[1][:2],
      "recovered_label": images[1][:2],
      "client": np.arange(2),
    }
    return records.Reconstructions(**{**base, **kw})

  sets = [
    made(),
    made(defense="paper"),
    made(knowledge="adaptive"),
    made(round=5),
    made(attack="rgap"),
    made(original=images[0][2:4].astype(np.float32)),
  ]
  assert [len(g) for g in grid.groups(sets)] == [3, 1, 1, 1]
  # Twenty rows would be too tall for one grid.
  tall = [
    made(defense=str(d), knowledge=k)
    for d in range(10)
    for k in ("blind", "adaptive")
  ]
  split = grid.groups(tall)
  assert [len(g) for g in split] == [10, 10]
  assert all(len({s.knowledge for s in g}) == 1 for g in split)


def test_colour_images_and_a_single_image_are_drawn(tmp_path):
  r = _small(
    tmp_path / "run", _images("cifar10_sample"), count=1, task="attack"
  )
  drawn = figures.write(r)
  assert len(drawn["grids"]) == 2
  assert not drawn["tradeoff"] and not drawn["accuracy"]


# Legibility


def _luminance(color):
  parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
  ]
  return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _contrast(a, b):
  """WCAG 2.2, relative luminance and contrast ratio."""
  low, high = sorted((_luminance(a), _luminance(b)))
  return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_in_light_and_dark():
  assert _contrast("#000000", "#ffffff") == pytest.approx(21)
  text = (pathlib.Path(html.__file__).parent / "style.html").read_text()
  schemes = re.findall(r":root \{(.*?)\}", text, re.S)
  assert len(schemes) == 2
  for scheme in schemes:
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
    pairs = [
      (a, b) for a in ("ink", "soft") for b in ("page", "sheet", "stripe")
    ]
    pairs += [(s, f"{s}-bg") for s in ("leaks", "partly", "stopped", "open")]
    for a, b in pairs:
      assert _contrast(colors[a], colors[b]) >= 4.5, (a, b)


def test_a_browser_shows_the_page(run, tmp_path):
  browser.check(run[0] / "report.html", tmp_path)


def test_a_browser_finds_what_is_wrong_with_a_page(tmp_path):
  page = tmp_path / "page.html"
  page.write_text(
    "<body style='background:#fff'><p style='color:#999'>faint</p>"
    "<p style='color:#777; font-size:24px'>large enough</p>"
    "<p style='width:900px; font-size:9px'>wide</p>"
    "<div style='overflow-x:auto'><p style='width:900px'>scrolls</p></div>"
    "<img src='data:image/png;base64,AAAA'><img alt='far' src='http://[::1]/'>"
    "<script>console.log('seen')</script>"
  )
  shot = tmp_path / "shot.png"
  found = browser.look(page, width=400, scheme="light", shot=shot)
  assert found["faint"] == ["p.: faint"] and found["wide"] == ["p.: wide"]
  assert (found["broken"], found["undescribed"]) == (2, 1)
  assert found["smallest"] == 9 and not found["dark"]
  assert found["requests"] == ["http://[::1]/"]
  assert [line.split(": ")[1] for line in found["console"]] == ["seen"]
  with pytest.raises(RuntimeError, match="exit 2"):
    browser.look(
      tmp_path / "none.html", width=400, scheme="light", shot=tmp_path / "none"
    )


def test_a_rounded_zero_has_no_sign():
  assert tables.fixed(-0.004, 2) == "0.00"
  assert tables.fixed(-0.006, 2) == "-0.01"
  assert tables.fixed(54.75, 1) == "54.8"
