"""The command line.

python -m experiments.main --flagfile=experiments/flags/NAME.flags
python -m experiments.main list            what flags can name
python -m experiments.main list attacks    one of the tables
"""

from mpqfl_jax import host

if __name__ == "__main__":
  host.restart()  # the allocator's settings, which go with a process

from collections.abc import Callable
import dataclasses
import json
import pathlib
import signal
import sys
import traceback
from typing import Any, NamedTuple

from absl import app, flags, logging
import jax

from experiments import (
  adversary,
  attack,
  catalogue,
  config,
  costs,
  dry_run,
  folder,
  leakage,
  scaling,
  setting,
  study,
  train,
  writers,
)
from experiments import help as help_page
from mpqfl_jax import datasets, distributed, errors, exact
from mpqfl_jax.report import findings, html, records, study_tables, tables
from mpqfl_jax.report import costs as costs_report
from mpqfl_jax.report import leakage as leakage_report
from mpqfl_jax.report import scaling as scaling_report


class _Task(NamedTuple):
  """A task that is one run.

  Attributes:
    run: (config, built, run_dir) -> what `summary.json` holds.
    check: (config, built) -> None; raises UserError, before the folder is made.
  """

  run: Callable[[config.Config, setting.Setting, pathlib.Path], dict[str, Any]]
  check: Callable[[config.Config, setting.Setting], None]


def _attackable(shapes: Callable) -> Callable:
  """Refuses attacks that cannot do what they will be asked to."""
  return lambda values, built: adversary.check(
    values, built, shapes(values, built)
  )


_TASKS = {
  "train": _Task(train.run, _attackable(train.attacked_shapes)),
  "attack": _Task(attack.run, _attackable(attack.attacked_shapes)),
  "leakage": _Task(leakage.run, leakage.check),
  "costs": _Task(costs.run, lambda values, built: None),
  "scaling": _Task(scaling.run, _attackable(train.attacked_shapes)),
}


def main(argv: list[str]) -> int:
  """Runs the task that the flags ask for.

  Returns:
    The exit status: 2 for a user's mistake, 130 after an interrupt.
  """
  host.tune()
  # Before JAX looks for its devices: on a CPU, one device a core.
  jax.config.update("jax_num_cpu_devices", config.cpu_devices(flags.FLAGS))
  if flags.FLAGS.coordinator_address is not None:
    return _execute_together(argv)
  return execute(argv)


def execute(argv: list[str]) -> int:
  """Runs the task on the devices that JAX has; see `main`."""
  try:
    if argv[1:2] == ["list"]:
      _page(catalogue.text(argv[2:]))
      return 0
    run(_config(argv))
  except (errors.UserError, KeyboardInterrupt) as e:
    status, line = _explain(e)
    print(line, file=sys.stderr)
    return status
  return 0


def _execute_together(argv: list[str]) -> int:
  """As `execute`, in one of several processes."""
  group = None
  try:
    values = _config(argv)
    group = distributed.join(
      values.coordinator_address,
      values.num_processes,
      values.process_id,
      flags.FLAGS.join_seconds,
      "Start all processes again with --resume to go on from the newest"
      f" checkpoint in {values.output_dir}.",
    )
    run(values)
    group.finish()
  except (errors.UserError, KeyboardInterrupt) as e:
    status, line = _explain(e)
    print(line, file=sys.stderr)
    distributed.leave(group, status, line.removeprefix("error: "))
  except Exception as e:
    if isinstance(e, jax.errors.JaxRuntimeError) and group is not None:
      group.wait_for_verdict()
    traceback.print_exc()
    distributed.leave(group, 1, " ".join(f"{type(e).__name__}: {e}".split()))
  return 0


def _page(text: str) -> None:
  """Prints what may go into a pipe whose reader stops early, as head does."""
  if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  print(text)


def _config(argv: list[str]) -> config.Config:
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}. Expected flags only, such as"
      " --dataset=mnist_sample."
    )
  return config.from_flags(flags.FLAGS)


def _explain(e: errors.UserError | KeyboardInterrupt) -> tuple[int, str]:
  """The exit status, and the one line for it."""
  if isinstance(e, errors.UserError):
    return 2, f"error: {e}"
  return 130, (
    "interrupted: every finished round and reconstruction is in"
    f" {flags.FLAGS.output_dir}; --resume --output_dir={flags.FLAGS.output_dir}"
    " goes on from the last checkpoint"
  )


@exact.products()
def run(values: config.Config) -> pathlib.Path | None:
  """Builds everything, makes the run's folder, runs, reports.

  Args:
    values: from `config.from_flags` or `config.make`.

  Returns:
    The run's folder; None after a dry run.

  Raises:
    UserError: a mistake, found before the folder is made.
  """
  if values.dry_run:
    built = setting.build(values)
    _TASKS[values.task].check(values, built)
    print(dry_run.text(values, built, measure))
    return None
  if values.task == "study":
    folder.check(values.output_dir, values.overwrite, values.resume)
    run_dir = study.run(values, measure)
    page = html.write(run_dir)
    print(f"{study_tables.markdown(run_dir)}\nThe report is {page}")
    return run_dir
  run_dir = measure(values)
  if distributed.is_main():
    summary = json.loads((run_dir / "summary.json").read_text())
    page = html.write(run_dir)
    if values.task == "leakage":
      table = leakage_report.markdown(summary)
    elif values.task == "costs":
      lines = folder.read_lines(run_dir / "costs.jsonl")
      table = costs_report.markdown(lines)
    elif values.task == "scaling":
      table = scaling_report.markdown(summary["scaling"])
    else:
      found = findings.headline(records.read(run_dir))
      table = "\n".join((tables.markdown(summary).rstrip("\n"), "", *found))
    print(f"{table}\nThe report is {page}")
  return run_dir


@exact.products()
def measure(
  values: config.Config, data: datasets.Dataset | None = None
) -> pathlib.Path:
  """As `run`, for any task but `study`, and without a report.

  Args:
    values: the config.
    data: the data set, where it is loaded already.
  """
  environment = folder.environment()
  distributed.agree(
    "config",
    {
      **dataclasses.asdict(values),
      "process_id": None,
      "output_dir": None,
      "data_dir": None,
      **environment["versions"],
      "commit": environment["commit"],
    },
  )
  if distributed.is_main():
    # Before noise is calibrated, which can take half a minute.
    folder.check(values.output_dir, values.overwrite, values.resume)
  built = setting.build(values, data)
  if jax.process_count() > 1:
    distributed.agree("data", setting.digests(built))
    plan = built.plan._replace(reason="")._asdict()
    distributed.agree("plan", plan | {"matmul_precision": exact.chosen()})
  _TASKS[values.task].check(values, built)
  writers.check(values.writers)
  run_dir = pathlib.Path(values.output_dir)
  if distributed.is_main():
    folder.create(
      values.output_dir,
      {
        **dataclasses.asdict(values),
        "plan_resolved": built.plan._asdict(),
        "matmul_precision": exact.chosen(),
        "client_state_resolved": {
          name: place._asdict() for name, place in built.places.items()
        },
        # Sums are in another order on another number of devices.
        "mesh_devices": built.mesh.devices.size,
        "dataset_source": built.data.source,
        "parameters": sum(
          leaf.size for leaf in jax.tree.leaves(built.template)
        ),
        "command": sys.argv[1:],
        **environment,
      },
      values.overwrite,
      values.resume,
    )
  summary = _TASKS[values.task].run(values, built, run_dir)
  if distributed.is_main():
    folder.write_json(run_dir / "summary.json", summary)
  return run_dir


def _parse(argv: list[str]) -> list[str]:
  """absl's parser, with help of our own, and errors as one line, status 2."""
  if help_page.wanted(argv):
    _page(help_page.text(flags.FLAGS))
    sys.exit(0)
  try:
    left = flags.FLAGS(argv)
  except flags.Error as e:
    print(f"error: {help_page.mistake(e)}", file=sys.stderr)
    sys.exit(2)
  # Libraries report every checkpoint at the level of information, which absl
  # sets after parsing where no other is given.
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
  return left


def _main() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  _main()
