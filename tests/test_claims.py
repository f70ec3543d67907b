"""Claims, ablation and Pareto set on hand-made tables of known verdict."""

import numpy as np
import pytest
import scipy.stats

from mpqfl_jax.report import ablation, claims, evidence, frontier

SET = "mnist_sample"
GUESS = {"mean_image": {"psnr_db_median": 12.0, "ssim_median": 0.1}}


def trained(defense, accuracies, size=1000.0, epsilon=None):
  return [
    {
      "dataset": SET,
      "seed": seed,
      "defense": defense,
      "test_accuracy": accuracy,
      "uplink_bytes_per_client": size,
      "uplink_bytes_per_client_float32": 8000,
      "epsilon": epsilon,
      "final_params_sha256": "00",
    }
    for seed, accuracy in enumerate(accuracies)
  ]


def attacked(defense, psnr, attack="dlg", knowledge="blind", **kw):
  base = {"weights": "initial", "local_steps": 1, "batch_size": 1, "round": 0}
  return [
    {
      **base,
      "dataset": SET,
      "defense": defense,
      "attack": attack,
      "knowledge": knowledge,
      "image": f"test:{i}",
      "seed": 0,
      "psnr_db": value,
      **kw,
    }
    for i, value in enumerate(psnr)
  ]


def results(training=(), attacks=(), **kw):
  return evidence.Results(
    [line for group in training for line in group],
    [line for group in attacks for line in group],
    kw.pop("references", {SET: GUESS}),
    **kw,
  )


GOOD, BAD = [40.0] * 30, [12.5] * 30
SAME = [{"dataset": SET, "watched": "ab", "unwatched": "ab"}]
OTHER = [{"dataset": SET, "watched": "ab", "unwatched": "cd"}]


@pytest.mark.parametrize(
  "psnr, twins, verdict, said",
  [
    (GOOD, SAME, "holds", "same bits"),
    (GOOD, OTHER, "fails", "other weights"),
    (GOOD, [], "open", "not tested"),
    ([40.0], SAME, "holds", "1 of 1"),
    ([40.0] + [10.0] * 9, SAME, "open", "Too few"),
    ([10.0] * 200, SAME, "fails", "0 of 200"),
  ],
)
def test_undefended_updates_leak(psnr, twins, verdict, said):
  claim = claims.leaks(results(attacks=[attacked("none", psnr)], twins=twins))
  assert claim.verdict == verdict and said in claim.words


def test_nothing_attacked_is_open():
  claim = claims.leaks(results([trained("none", [0.9])]))
  assert claim.verdict == "open" and claim.value is None


def blind(paper, attacks=("dlg", "inverting_gradients", "rgap"), none=GOOD):
  return results(
    attacks=[
      lines
      for a in attacks
      for lines in (attacked("none", none, a), attacked("paper", paper, a))
    ]
  )


@pytest.mark.parametrize(
  "found, verdict, said",
  [
    (blind(BAD), "holds", "None of these attacks knows the codec"),
    (blind(BAD, ("dlg", "rgap")), "open", "Not tried: Inverting Gradients"),
    (blind(GOOD), "fails", "30 of 30"),
    (blind([16.0] * 30), "fails", "leaks in part"),
    (blind(BAD[:4]), "open", "too few images"),
    (blind(BAD, none=BAD), "open", "no such attack is shown to work"),
    (blind(BAD, ()), "open", "No mixed scheme"),
  ],
)
def test_mixed_scheme_against_blind_attacks(found, verdict, said):
  claim = claims.stops_blind(found)
  assert claim.verdict == verdict and said in claim.words
  assert "protect" not in claim.words


def test_one_attack_that_gets_through_is_enough():
  found = results(
    attacks=[
      attacked("none", GOOD),
      attacked("none", GOOD, "rgap"),
      attacked("paper", BAD),
      attacked("paper", GOOD, "rgap"),
    ]
  )
  claim = claims.stops_blind(found)
  assert claim.verdict == "fails" and claim.value == 1.0


def test_blind_attacks_say_nothing_of_an_adaptive_one():
  assert claims.stops_adaptive(blind(BAD)).verdict == "open"
  for psnr, verdict in ((GOOD, "fails"), (BAD, "holds")):
    found = results(
      attacks=[
        attacked("none", GOOD, "map", "adaptive"),
        attacked("paper", psnr, "map", "adaptive"),
      ]
    )
    assert claims.stops_adaptive(found).verdict == verdict


def test_the_rate_has_wilsons_interval():
  found = blind(GOOD[:10] + BAD[:20], ("dlg",))
  claim = claims.stops_blind(found)
  ends = scipy.stats.binomtest(10, 30).proportion_ci(method="wilson")
  assert (claim.low, claim.high) == pytest.approx(ends)


@pytest.mark.parametrize(
  "paper, verdict",
  [
    ([0.899, 0.911, 0.919], "holds"),
    ([0.85, 0.86, 0.87], "fails"),
    ([0.88, 0.92, 0.90], "open"),
    ([0.899, 0.911], "open"),
  ],
)
def test_accuracy_is_judged_over_paired_seeds(paper, verdict):
  none = [0.90, 0.91, 0.92]
  claim = claims.costs_little(
    results([trained("none", none), trained("paper", paper)])
  )
  assert claim.verdict == verdict
  drop = 100 * (np.array(none[: len(paper)]) - paper)
  test = scipy.stats.ttest_1samp(drop, 0).confidence_interval()
  assert claim.value == pytest.approx(drop.mean())
  assert (claim.low, claim.high) == pytest.approx((test.low, test.high))


NOISE = "dp_gaussian(noise_multiplier=0.1)"


@pytest.mark.parametrize(
  "accuracy, psnr, verdict, said",
  [
    ([0.80, 0.81, 0.82], BAD, "holds", "not shown to stop"),
    ([0.93, 0.94, 0.95], BAD, "fails", ""),
    ([0.80, 0.81, 0.82], GOOD, "open", "No noise"),
    ([0.80], BAD, "open", "3 seeds"),
  ],
)
def test_noise_costs_more(accuracy, psnr, verdict, said):
  claim = claims.noise_costs_more(
    results(
      [trained("paper", [0.90, 0.91, 0.92]), trained(NOISE, accuracy)],
      [attacked("none", GOOD), attacked("paper", GOOD), attacked(NOISE, psnr)],
    )
  )
  assert claim.verdict == verdict and said in claim.words


def cost(scheme, power, clients=(2, 10, 50, 200), **kw):
  return [
    {
      "scheme": scheme,
      "clients": n,
      "key_seconds_total": 0.1 * n**power,
      "key_bytes": 1000 * n,
      **kw,
    }
    for n in clients
  ]


@pytest.mark.parametrize(
  "rows, verdict",
  [
    (cost("per_client", 1.0), "holds"),
    (cost("shared", 0.0), "fails"),
    (cost("per_client", 1.0) + cost("shared", 0.0), "fails"),
    (cost("per_client", 1.0, (2, 10)), "open"),
    (cost("per_client", 1.0, source="modelled"), "open"),
    (None, "open"),
  ],
)
def test_encryption_grows(rows, verdict):
  claim = claims.encryption_grows(results(encryption=rows))
  assert claim.verdict == verdict


def pruned(outcomes):
  training, attacks = [trained("none", [0.9])], [attacked("none", GOOD)]
  for ratio, (accuracy, psnr) in outcomes.items():
    name = f"prune(ratio={ratio})"
    training.append(trained(name, [accuracy]))
    attacks.append(attacked(name, psnr))
  return results(training, attacks)


@pytest.mark.parametrize(
  "outcomes, verdict",
  [
    ({0.5: (0.9, GOOD), 0.9: (0.899, BAD), 0.99: (0.7, BAD)}, "holds"),
    ({0.5: (0.9, GOOD), 0.9: (0.895, BAD), 0.99: (0.894, BAD)}, "fails"),
    ({0.5: (0.9, GOOD), 0.9: (0.895, BAD[:3]), 0.99: (0.7, BAD)}, "open"),
    # Too dear, whether it stops the attacks or not.
    ({0.5: (0.9, GOOD), 0.9: (0.85, BAD[:3]), 0.99: (0.7, BAD)}, "holds"),
    ({0.5: (0.9, GOOD), 0.9: (0.89, BAD)}, "open"),
  ],
)
def test_pruning_is_delicate(outcomes, verdict):
  assert claims.pruning_is_delicate(pruned(outcomes)).verdict == verdict


LATE = {"weights": "trained", "round": 20}
STEPS, BATCH = {"local_steps": 4}, {"batch_size": 8}


def throughout(*settings, none=GOOD):
  found = []
  for psnr, kw in settings:
    found += [attacked("none", none, **kw), attacked("paper", psnr, **kw)]
  return claims.holds_throughout(results(attacks=found))


def test_later_training_and_larger_batches():
  same = [(BAD, kw) for kw in ({}, LATE, STEPS, BATCH)]
  assert throughout(*same).verdict == "holds"
  part = throughout(*same[:2])
  assert part.verdict == "open" and "local steps, batch" in part.words
  # All at once says nothing of each.
  mixed = throughout((BAD, {}), (BAD, LATE | STEPS | BATCH))
  assert mixed.verdict == "open" and "trained weights, local" in mixed.words
  assert throughout(*same[:2], (GOOD, BATCH)).verdict == "fails"


def test_other_numbers_of_clients_decide_as_well():
  few, many = LATE | {"num_clients": 30}, LATE | {"num_clients": 3000}
  same = [(BAD, kw) for kw in ({}, few, STEPS, BATCH)]
  whole = throughout(*same)
  assert whole.verdict == "holds" and "clients" not in whole.words
  leaking = throughout(*same, (GOOD, many))
  assert leaking.verdict == "fails" and "few clients" in leaking.statement
  assert "trained weights (3,000 clients), 1 step of 1" in leaking.words
  # Other steps of other clients are not steps varied by themselves.
  two = (BAD, {}), (BAD, few), (BAD, many | STEPS), (BAD, BATCH)
  assert "local steps" in throughout(*two).words.split("by itself")[1]


def test_settings_in_words():
  late = [
    attacked("none", GOOD, weights="trained", round=r, num_clients=n)
    for r, n in ((2, 9), (8, 9), (8, 4000))
  ]

  def words(*groups):
    return [w for w, _ in evidence.settings(results(attacks=groups), SET)]

  base = attacked("none", GOOD)
  assert words(base, late[0]) == ["batch of 1", "trained weights"]
  assert words(base, *late[:2])[1:] == [
    "trained weights, round 2",
    "trained weights, round 8",
  ]
  assert words(*late[1:]) == [
    "trained weights, 9 clients",
    "trained weights, 4,000 clients",
  ]
  assert words(*late)[2] == "trained weights, round 8, 4,000 clients"
  found = results(attacks=[base, *late])
  kept = [
    evidence.lines(found, SET, "none", where=keep)
    for _, keep in evidence.settings(found, SET)
  ]
  assert [len(lines) for lines in kept] == [30] * 4


def test_one_setting_that_leaks_is_enough():
  places = ({}, LATE, STEPS, BATCH)
  for leaking in places:
    claim = throughout(*((GOOD if p is leaking else BAD, p) for p in places))
    assert claim.verdict == "fails" and claim.value == 1.0
  weak = throughout(*((BAD, kw) for kw in ({}, LATE, STEPS, BATCH)), none=BAD)
  assert weak.verdict == "open" and "not shown to work" in weak.words


RNG = np.random.default_rng(0)
UNIFORM = 25 + RNG.normal(0, 1, 30)


@pytest.mark.parametrize(
  "shift, size, accuracy, knowledge, verdict",
  [
    (4.0, 1000, 0.9, "adaptive", "holds"),
    (0.0, 1000, 0.9, "adaptive", "fails"),
    (-3.0, 1000, 0.9, "adaptive", "fails"),
    # The uniform code has more bytes: nothing to compare with.
    (4.0, 900, 0.9, "adaptive", "open"),
    # It has far fewer, so that the bytes are not equal.
    (4.0, 2000, 0.9, "adaptive", "open"),
    # It costs more accuracy than a point.
    (4.0, 1000, 0.93, "adaptive", "open"),
    (4.0, 1000, 0.9, "blind", "open"),
  ],
)
def test_mixing_against_the_best_uniform_code(
  shift, size, accuracy, knowledge, verdict
):
  mixed = "experiments/policies/mixed_both.toml"
  claim = ablation.mixing_helps(
    results(
      [trained("int4", [0.9]), trained(mixed, [accuracy], size)],
      [
        attacked("int4", UNIFORM, knowledge=knowledge),
        attacked(mixed, UNIFORM - shift, knowledge=knowledge),
      ],
    )
  )
  assert claim.verdict == verdict
  if verdict != "open":
    assert claim.value == pytest.approx(shift)


@pytest.mark.parametrize(
  "lost, verdict",
  [
    ([0.5, 0.6, 0.7], "holds"),
    ([1.0, 1.2, 1.9], "open"),  # more than a point, but not for sure
    ([2.0, 2.1, 2.2], "fails"),
  ],
)
def test_what_mixing_hides_for_accuracy_does_not_count(lost, verdict):
  mixed = "experiments/policies/noisy_front.toml"
  before = [0.9, 0.91, 0.92]
  after = [b - points / 100 for b, points in zip(before, lost, strict=True)]
  (row,) = ablation.compare(
    results(
      [trained("int2", before), trained(mixed, after)],
      [
        attacked("int2", UNIFORM, knowledge="adaptive"),
        attacked(mixed, UNIFORM - 3, knowledge="adaptive"),
      ],
    )
  )
  assert row.verdict == verdict and row.uniform == "int2"
  assert f"costs {np.mean(lost):.2f} points" in row.words


def test_gains_are_told_setting_by_setting():
  mixed = "experiments/policies/noisy_front.toml"

  def found(images, **second):
    """Gains, with late rounds of so many images."""

    def tried(name, shift, many=30, **kw):
      psnr = (UNIFORM - shift)[:many]
      return attacked(name, psnr, knowledge="adaptive", **kw)

    late = {"weights": "trained", "round": 20}
    later = {"weights": "trained", "round": 50, "batch_size": 3} | second
    return list(
      ablation.gains(
        results(
          [trained("int2", [0.9]), trained(mixed, [0.9])],
          [
            tried("int2", 0.0),
            tried(mixed, 3.0),
            tried("int2", 0.0, batch_size=4),
            tried(mixed, 1.0, batch_size=4),
            tried("int2", 2.0, images, **late),
            tried("int2", 2.0, images, **later),
            tried(mixed, 1.5, images, **late),
            tried(mixed, 1.1, images, **later),
          ],
        )
      )
    )

  enough = found(30)
  assert [(g.setting, g.images) for g in enough] == [
    ("batch of 1", 30),
    ("batch of 4", 30),
    ("trained weights, round 20", 30),
    ("trained weights, round 50", 30),
  ]
  values = [g.gain.value for g in enough]
  assert values == pytest.approx([3.0, 1.0, -0.5, -0.9])
  assert all((g.defense, g.uniform) == (mixed, "int2") for g in enough)
  assert enough[0].own == pytest.approx(enough[0].other - 3.0)
  # Rounds of few images count together, and an image once.
  few = found(20)
  assert len(few) == 3
  assert few[2].setting == "trained weights, rounds 20 to 50"
  assert few[2].images == 20 and few[2].gain.value == pytest.approx(-0.7)
  assert found(20, seed=1)[2].images == 40


def test_noise_of_few_seeds_leaves_no_rival_out():
  mixed = "experiments/policies/noisy_front.toml"
  accuracy = [0.90, 0.91, 0.92, 0.93]

  def rival(drop):
    quiet = [a - d for a, d in zip(accuracy, drop, strict=True)]
    (row,) = ablation.compare(
      results(
        [
          trained(mixed, accuracy),
          trained("int3", accuracy),
          trained("int2", quiet),
        ],
        [
          attacked(mixed, UNIFORM - 3, knowledge="adaptive"),
          attacked("int3", UNIFORM, knowledge="adaptive"),
          attacked("int2", UNIFORM - 2, knowledge="adaptive"),
        ],
      )
    )
    return row

  # 1.5 points less on average, either way: not sure to be more than a point.
  unsure = rival([0.0, 0.03, 0.03, 0.0])
  assert unsure.uniform == "int2" and unsure.gain.value == pytest.approx(1)
  assert "costs 1.50 points less" in unsure.words
  assert rival([0.015, 0.016, 0.014, 0.015]).uniform == "int3"


def test_the_best_uniform_code_is_the_one_that_hides_most():
  rows = ablation.compare(
    results(
      [trained(n, [0.9]) for n in ("int4", "ternary", "paper")],
      [
        attacked("int4", UNIFORM, knowledge="adaptive"),
        attacked("ternary", UNIFORM - 9, knowledge="adaptive"),
        attacked("paper", UNIFORM - 4, knowledge="adaptive"),
      ],
    )
  )
  assert [(r.defense, r.uniform, r.verdict) for r in rows] == [
    ("paper", "ternary", "fails")
  ]
  assert rows[0].gain.value == pytest.approx(-5)


def test_the_sign_test_is_the_binomial_one():
  gains = np.array([1.0, 2.0, 0.0, 3.0, -1.0, 4.0, 5.0])
  # Five of six: twice the probability of five or six heads.
  assert evidence.sign_test(gains) == pytest.approx(2 * 7 / 64)


def test_the_bootstrap_interval_of_a_median_covers():
  rng = np.random.default_rng(1)
  hits = 0
  for _ in range(100):
    found = evidence.median(rng.normal(0, 1, 30))
    hits += found.low <= 0 <= found.high
  assert 88 <= hits <= 100


def test_the_pareto_set():
  # (accuracy, bytes, dB): b is worse than a in all, c trades, d is unknown.
  table = {
    "none": (0.90, 800, 40.0),
    "int8": (0.89, 900, 41.0),
    "int4": (0.88, 100, 25.0),
    "int2": (0.88, 100, 25.0),
  }
  found = frontier.points(
    results(
      [trained(n, [a], b) for n, (a, b, _) in table.items()],
      [attacked(n, [db]) for n, (*_, db) in table.items()]
      + [attacked("sign", [3.0])],
    )
  )
  assert {p.defense: p.pareto for p in found} == {
    "none": True,
    "int8": False,
    "int4": True,
    "int2": True,
    "sign": None,
  }


def test_judging_gives_all_nine_in_order():
  judged = claims.judge(results(), [ablation.mixing_helps])
  assert "".join(c.key for c in judged) == "abcdefghi"
  assert {c.verdict for c in judged} == {"open"}
  assert all(c.words for c in judged)
