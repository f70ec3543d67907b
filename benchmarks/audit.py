"""Does a mechanism keep to its epsilon? A canary audit, and one that must fail.

    python -m benchmarks.audit --runs=40000
    python -m benchmarks.audit --defense="dp_pbm(theta=0.05,trials=16)"
    python -m benchmarks.audit --defense="dp_gaussian(noise_multiplier=2)" \
      --claim="dp_gaussian(noise_multiplier=4)"

Each row is a mechanism that runs, the epsilon that is claimed for one release,
and what an attacker who knows the canary proves about it (`mpqfl_jax.audit`).
The rows that follow each mechanism run it with about half the noise under the
same claim: an audit that does not catch those shows nothing. The exit status is
1 where an honest mechanism is caught, or a broken one is not.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import accounting, audit, defenses, errors
from mpqfl_jax.types import Examples, Model

# What runs -> the same with half the noise; less for dp_rqm, whose epsilon is a
# looser bound than the others'.
CASES = {
  "dp_gaussian(noise_multiplier=4)": "dp_gaussian(noise_multiplier=2)",
  "dp_laplace(noise_multiplier=3)": "dp_laplace(noise_multiplier=1.5)",
  "dp_pbm(theta=0.125,trials=4)": "dp_pbm(theta=0.25,trials=4)",
  "dp_rqm(margin=4,levels=4)": "dp_rqm(margin=0.75,levels=4)",
  "dp_central(noise_multiplier=2)": "dp_central(noise_multiplier=1)",
  "dp_central(noise_multiplier=1),poisson": (
    "dp_central(noise_multiplier=0.5),poisson"
  ),
  "dp_sgd(noise_multiplier=2)": "dp_sgd(noise_multiplier=1)",
  "dp_sgd(noise_multiplier=1,batches=poisson)": (
    "dp_sgd(noise_multiplier=0.5,batches=poisson)"
  ),
}
ENTRIES, EXAMPLES, BATCH, RATE = 16, 8, 4, 0.5


def claimed(spec: str, delta: float) -> float:
  """Epsilon that a mechanism claims for one release."""
  defense, protocol = _build(spec, delta)
  epsilon = defense.epsilon(protocol.ledger, delta)
  if epsilon is None:
    raise errors.UserError(
      f"--defense={spec} claims no epsilon. Expected one of"
      f" {', '.join(defenses.TRANSFORMING)}."
    )
  return epsilon


def measured(
  spec: str, runs: int, delta: float, confidence: float, seed: int = 0
) -> audit.Bound:
  """What the audit proves about a mechanism.

  Args:
    spec: of the defence; `,poisson` behind it samples clients so.
    runs: with the canary, and as many without.
    delta: of the claim.
    confidence: of the bound.
    seed: of the runs.
  """
  defense, protocol = _build(spec, delta)
  if defense.central is not None:
    canary = jnp.ones(ENTRIES)
    score = audit.of_release(defense.central, canary, protocol.sampling_rate)
  elif defense.sgd is not None:
    # An epoch is one batch of all examples, but for coins.
    rate = BATCH / EXAMPLES if defense.sgd.batches == "poisson" else None
    score = audit.of_gradient(*_client(), defense.sgd, rate)
  else:
    # A norm of 1 in one entry is the worst for Laplace noise and for coarse
    # levels, and as bad as any for Gaussian noise.
    canary = jnp.zeros(ENTRIES).at[0].set(10.0)
    score = audit.of_update(defense, canary)
  absent, present = audit.scores(score, runs, jax.random.key(seed))
  return audit.lower_bound(absent, present, delta, confidence)


def _build(
  spec: str, delta: float
) -> tuple[defenses.Defense, accounting.Protocol]:
  name, _, sampling = spec.rpartition(",poisson")
  protocol = accounting.one_update(delta, EXAMPLES, BATCH)
  if name and not sampling:
    spec, protocol = name, protocol._replace(sampling_rate=RATE)
  elif "poisson" not in spec:
    # One step over all examples.
    protocol = accounting.one_update(delta, EXAMPLES, EXAMPLES)
  else:
    schedule = protocol.schedule._replace(steps=1)
    protocol = protocol._replace(schedule=schedule)
  params = jax.ShapeDtypeStruct((ENTRIES,), jnp.float32)
  return defenses.make(spec, params, protocol), protocol


def _client() -> tuple[Model, Examples]:
  """A small classifier, for it takes a step in every run, and random images."""
  rng = np.random.default_rng(0)
  shape, width, classes = (8, 8, 1), 16, 4

  def init(key):
    keys = jax.random.split(key)
    return {
      "dense1": jax.random.normal(keys[0], (64, width)) / 8,
      "dense2": jax.random.normal(keys[1], (width, classes)) / 4,
    }

  def apply(params, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["dense1"])
    return hidden @ params["dense2"]

  model = Model("audited", init, apply, shape, classes, np.zeros(1), np.ones(1))
  return model, Examples(
    jnp.asarray(rng.integers(0, 256, (EXAMPLES, *shape)), jnp.uint8),
    jnp.asarray(rng.integers(0, classes, EXAMPLES), jnp.int32),
    jnp.arange(EXAMPLES, dtype=jnp.int32),
  )


def _cases(args: argparse.Namespace) -> list[tuple[str, str, bool]]:
  """(what runs, what is claimed, whether the claim is false)."""
  if args.defense:
    return [(args.defense, args.claim or args.defense, bool(args.claim))]
  honest = [(spec, spec, False) for spec in CASES]
  broken = [(half, spec, True) for spec, half in CASES.items()]
  return [row for pair in zip(honest, broken, strict=True) for row in pair]


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--defense", help="What runs; default: a table.")
  parser.add_argument("--claim", help="The defence whose epsilon it claims.")
  parser.add_argument("--runs", type=int, default=40_000)
  parser.add_argument("--delta", type=float, default=1e-2)
  parser.add_argument("--confidence", type=float, default=0.999)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", help="Also write the rows to this file.")
  return parser.parse_args()


def main() -> int:
  args = _parse()
  rows: list[dict[str, Any]] = []
  wrong = False
  for runs, claims, broken in _cases(args):
    epsilon = claimed(claims, args.delta)
    bound = measured(runs, args.runs, args.delta, args.confidence, args.seed)
    caught = bound.epsilon > epsilon
    wrong |= caught != broken
    rows.append(
      {
        "runs_as": runs,
        "claims_to_be": claims,
        "delta": args.delta,
        "epsilon_claimed": epsilon,
        "epsilon_lower_bound": bound.epsilon,
        "confidence": args.confidence,
        "runs": args.runs,
        "caught": caught,
      }
    )
    print(
      f"{runs:48} claims {epsilon:6.3f}  proven {bound.epsilon:6.3f}"
      f"  {'CAUGHT' if caught else 'kept'}"
    )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
  return int(wrong)


if __name__ == "__main__":
  try:
    sys.exit(main())
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
