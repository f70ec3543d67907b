"""python -m experiments.main --flagfile=experiments/flags/NAME.flags"""

import dataclasses
import os
import pathlib
import sys

from absl import app, flags, logging
import jax

from experiments import adversary, attack, config, folder, setting, train
from mpqfl_jax import errors, host
from mpqfl_jax.report import html, tables

_TASKS = {"train": train.run, "attack": attack.run}
_SHAPES = {"train": train.attacked_shapes, "attack": attack.attacked_shapes}


def main(argv: list[str]) -> int:
  """Runs the task that the flags ask for.

  Returns:
    The exit status: 2 for a user's mistake, 130 after an interrupt.
  """
  # Libraries report every checkpoint at the level of information.
  if flags.FLAGS["verbosity"].using_default_value:
    logging.set_verbosity(logging.WARNING)
  host.tune()
  # Before JAX looks for its devices: on a CPU, one device a core.
  jax.config.update(
    "jax_num_cpu_devices", flags.FLAGS.devices or os.cpu_count()
  )
  return execute(argv)


def execute(argv: list[str]) -> int:
  """Runs the task on the devices that JAX has; see `main`."""
  try:
    if len(argv) > 1:
      raise errors.UserError(
        f"unexpected argument {argv[1]!r}. Expected flags only, such as"
        " --dataset=mnist_sample."
      )
    run(config.from_flags(flags.FLAGS))
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(
      "interrupted: every finished round and reconstruction is in"
      f" {flags.FLAGS.output_dir}",
      file=sys.stderr,
    )
    return 130
  return 0


def run(values: config.Config) -> pathlib.Path:
  """Builds everything, makes the run's folder, runs, reports.

  Args:
    values: from `config.from_flags` or `config.make`.

  Returns:
    The run's folder.

  Raises:
    UserError: a mistake, found before the folder is made.
  """
  built = setting.build(values)
  adversary.check(values, built, _SHAPES[values.task](values, built))
  run_dir = folder.create(
    values.output_dir,
    {
      **dataclasses.asdict(values),
      "plan_resolved": built.plan._asdict(),
      # Sums are in another order on another number of devices.
      "mesh_devices": built.mesh.devices.size,
      "dataset_source": built.data.source,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(built.template)),
      "command": sys.argv[1:],
      **folder.environment(),
    },
    values.overwrite,
    values.resume,
  )
  summary = _TASKS[values.task](values, built, run_dir)
  folder.write_json(run_dir / "summary.json", summary)
  page = html.write(run_dir)
  print(f"{tables.markdown(summary)}\nThe report is {page}")
  return run_dir


def _parse(argv: list[str]) -> list[str]:
  """absl's parser, with its errors as one line and status 2."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    text = " ".join(str(e).split())
    print(f"error: {text} --helpshort lists the flags.", file=sys.stderr)
    sys.exit(2)


def _main() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  _main()
