"""python -m experiments.main --flagfile=experiments/flags/NAME.flags"""

import dataclasses
import os
import sys

from absl import app, flags
import jax

from experiments import config as config_lib
from mpqfl_jax import errors


def main(argv: list[str]) -> int:
  """Runs one task. Returns the exit status: 2 for a user's mistake."""
  try:
    if len(argv) > 1:
      raise errors.UserError(
        f"unexpected argument {argv[1]!r}. Expected flags only, such as"
        " --dataset=mnist_sample."
      )
    config = config_lib.from_flags(flags.FLAGS)
    _run(config)
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      f"interrupted; every finished round is in {config.output_dir}",
      file=sys.stderr,
    )
    return 130
  return 0


def _run(config: config_lib.Config) -> None:
  # Before JAX looks for its devices: on a CPU, one device a core.
  jax.config.update("jax_num_cpu_devices", config.devices or os.cpu_count())

  from experiments import attack, folder, setting, train
  from mpqfl_jax.report import html, tables

  built = setting.build(config)
  if config.task == "attack":
    attack.check(config, built)
  run_dir = folder.create(config.output_dir, config.overwrite)
  folder.write_json(
    run_dir / "config.json",
    {
      **dataclasses.asdict(config),
      "plan_resolved": built.plan._asdict(),
      "dataset_source": built.data.source,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(built.template)),
      "command": sys.argv[1:],
      **folder.environment(),
    },
  )
  task = {"train": train.run, "attack": attack.run}[config.task]
  summary = task(config, built, run_dir)
  folder.write_json(run_dir / "summary.json", summary)
  page = html.write(run_dir)
  print(tables.markdown(summary))
  print(f"\nThe report is {page}")


def _parse(argv: list[str]) -> list[str]:
  """absl's parser, with its errors as one line and status 2."""
  try:
    return app.parse_flags_with_usage(argv)
  except flags.Error as e:
    print(f"error: {e}. Try --helpshort.", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
