"""The one frozen config that the flags become, and what is wrong with it."""

from collections.abc import Mapping
import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

from absl import flags

from experiments import folder
from experiments.flag_definitions import DATASETS, KNOWLEDGE
from mpqfl_jax import attacks as attacks_lib
from mpqfl_jax import (
  distributed,
  errors,
  federated,
  models,
  own_images,
  partition,
  specs,
)

FLAGS_DIR = pathlib.Path(__file__).parent / "flags"


@dataclasses.dataclass(frozen=True)
class Config:
  """Every flag, resolved and checked; fields are named as the flags are."""

  task: str
  output_dir: str
  overwrite: bool
  resume: bool
  dry_run: bool
  checkpoint_every: int
  writers: tuple[str, ...]
  seed: int
  dataset: str
  data_dir: str | None
  partition: str
  size_sigma: float
  dirichlet_alpha: float
  model: str
  num_clients: int
  client_examples: int | None
  cohort_size: int
  scaling_clients: tuple[int, ...]
  client_sampling: str
  rounds: int
  local_epochs: int
  local_steps: int | None
  batch_size: int
  client_lr: float
  client_lr_schedule: str
  algorithm: str
  server_optimizer: str
  server_lr: float
  server_lr_schedule: str
  prox_mu: float
  aggregator: str
  dropout: float
  straggler_deadline: float | None
  straggler_sigma: float
  downlink: str
  client_state: str
  eval_every: int
  defense: tuple[str, ...]
  delta: float
  attack: tuple[str, ...]
  attack_knowledge: tuple[str, ...]
  attack_rounds: tuple[int, ...]
  attack_clients: int
  attack_images: str
  attack_restarts: int | None
  labels_known: bool
  guard_bytes: int | None
  guard_error: float
  study_datasets: tuple[str, ...]
  study_seeds: tuple[int, ...]
  study_batches: tuple[int, ...]
  study_local_steps: tuple[int, ...]
  study_clients: tuple[int, ...]
  study_encryption: str | None
  study_processes: int
  plan: str
  devices: int | None
  coordinator_address: str | None
  num_processes: int | None
  process_id: int | None


def from_flags(values: flags.FlagValues) -> Config:
  """The config that the command line asks for.

  With `--resume`, flags that are not given are those of the run that is there.

  Raises:
    UserError: a value that no run can have, before anything is touched.
  """
  names = [field.name for field in dataclasses.fields(Config)]
  given = {name: values[name].value for name in names if values[name].present}
  defaults = {name: values[name].value for name in names}
  return _resolve(defaults | _begun_with(given) | given)


def cpu_devices(values: flags.FlagValues) -> int:
  """Devices that a CPU is to have: `--devices`, else one a core.

  JAX has to be told before it starts, and so before there is a config: what is
  wrong with the folder of a run that goes on, `from_flags` says. The runs of a
  study beside one another share the cores.
  """
  begun: flags.FlagValues | Config = values
  if values.resume:
    with contextlib.suppress(errors.UserError):
      begun = from_flags(values)
  processes = begun.study_processes if begun.task == "study" else 1
  return begun.devices or max(1, (os.cpu_count() or 1) // processes)


def _begun_with(given: Mapping[str, Any]) -> dict[str, Any]:
  """Flags of the run that is to go on, by name; nothing where there is none.

  Args:
    given: what the user gave, by flag name.

  Raises:
    UserError: what is there is no run, or nothing is there and nothing else was
      given, as after a slip in the folder's name.
  """
  if not given.get("resume"):
    return {}
  place = given.get("output_dir", flags.FLAGS["output_dir"].default)
  folder.check(place, resume=True)
  old = folder.stored(place)
  if old is None:
    if given.keys() <= {"resume", "output_dir"}:
      raise errors.UserError(
        f"there is no run in {place} to go on with. Give the --output_dir of a"
        " run, or the flags of a new one."
      )
    return {}
  # How the processes share the devices is not the run's, but the start's.
  together = ("coordinator_address", "num_processes", "process_id")
  own = {*together, "output_dir", "overwrite", "resume", "dry_run"}
  if any(given.get(name) or old.get(name) for name in together):
    own.add("devices")
  return {
    field.name: ",".join(map(str, value)) if isinstance(value, list) else value
    for field in dataclasses.fields(Config)
    if field.name in old.keys() - own
    for value in [old[field.name]]
  }


def _resolve(given: dict[str, Any]) -> Config:
  for name in (
    "defense",
    "attack",
    "attack_knowledge",
    "study_datasets",
    "writers",
  ):
    given[name] = tuple(specs.split(given[name]))
  for name in (
    "attack_rounds",
    "scaling_clients",
    "study_seeds",
    "study_batches",
    "study_local_steps",
  ):
    given[name] = _numbers(name, str(given[name]))
  more = str(given["study_clients"])
  given["study_clients"] = _numbers("study_clients", more) if more else ()
  config = Config(**given)
  check(config)
  return config


def make(**changes: Any) -> Config:
  """A config from Python: the flags' defaults with some values changed.

  With `resume=True`, what is not given is as in the run that is there.

  Args:
    **changes: values by flag name, as the command line would have them; lists
      may be tuples.

  Raises:
    UserError: no such flag, or a value that no run can have.
  """
  known = [field.name for field in dataclasses.fields(Config)]
  for name in changes:
    if name not in known:
      raise errors.unknown_name("flag", name, known)
  given = {
    name: ",".join(map(str, value)) if isinstance(value, tuple) else value
    for name, value in changes.items()
  }
  defaults = {name: flags.FLAGS[name].default for name in known}
  return _resolve(defaults | _begun_with(given) | given)


def check(config: Config) -> None:
  """Raises UserError where values cannot be had together."""
  known = (
    *(
      ("dataset", name, DATASETS)
      for name in (config.dataset, *config.study_datasets)
      if not own_images.is_path(name)
    ),
    ("model", config.model, models.MODELS),
    ("partition", config.partition, partition.PARTITIONS),
    ("server optimizer", config.server_optimizer, federated.SERVER_OPTIMIZERS),
    *(
      ("attack", specs.parse(a)[0], attacks_lib.ATTACKS) for a in config.attack
    ),
    *(("--attack_knowledge", k, KNOWLEDGE) for k in config.attack_knowledge),
  )
  for kind, name, table in known:
    if name not in table:
      raise errors.unknown_name(kind, name, table)
  if not config.defense:
    raise errors.UserError("--defense is empty. Expected, for instance, none.")
  for name in ("defense", "attack"):
    items = getattr(config, name)
    if len(set(items)) < len(items):
      raise errors.UserError(f"--{name} names the same one twice: {items}.")
  if not config.attack_knowledge:
    raise errors.UserError("--attack_knowledge is empty. Expected blind.")
  for name in ("client_lr", "server_lr"):
    if not getattr(config, name) > 0:
      raise errors.UserError(f"--{name} is 0. Expected a number above 0.")
  if not 0 < config.delta < 1:
    raise errors.UserError(
      f"--delta={config.delta}. Expected a number between 0 and 1, such as"
      " 1e-5."
    )
  names = {specs.parse(spec)[0] for spec in config.attack}
  malicious = sorted(names & attacks_lib.MALICIOUS)
  if malicious and (config.task != "attack" or len(config.attack) > 1):
    raise errors.UserError(
      f"--attack={','.join(config.attack)}: {malicious[0]} changes the model"
      " that clients get, which other attacks and training do not expect."
      f" Expected --task=attack with --attack={malicious[0]} alone."
    )
  if (
    "learning_to_invert" in names
    and "adaptive" in config.attack_knowledge
    and config.algorithm == "scaffold"
  ):
    raise errors.UserError(
      "--attack=learning_to_invert with --attack_knowledge=adaptive makes"
      " updates of its own under the defence, and knows no control variates."
      " Expected another --algorithm than scaffold."
    )
  if config.overwrite and config.resume:
    raise errors.UserError(
      "--overwrite and --resume contradict each other. Expected one of them."
    )
  distributed.check_flags(
    config.coordinator_address, config.num_processes, config.process_id
  )
  if config.task in ("train", "costs", "study"):
    if config.cohort_size > config.num_clients:
      raise errors.UserError(
        f"--cohort_size={config.cohort_size} is larger than"
        f" --num_clients={config.num_clients}. Expected at most as many as"
        " there are clients."
      )
    late = [r for r in config.attack_rounds if not 1 <= r <= config.rounds]
    if config.attack and late:
      raise errors.UserError(
        f"--attack_rounds names round {late[0]}, but rounds go from 1 to"
        f" --rounds={config.rounds}. Name rounds of those, such as"
        f" --attack_rounds=1,{config.rounds}, or train for more."
      )
  if config.task == "study":
    _check_study(config)
  if config.task != "train" and config.coordinator_address is not None:
    raise errors.UserError(
      f"--task={config.task} runs in one process. Expected no"
      " --coordinator_address, --num_processes and --process_id with it."
    )
  if config.task == "scaling":
    most, least = max(config.scaling_clients), min(config.scaling_clients)
    if not 1 <= least <= most <= config.num_clients:
      raise errors.UserError(
        f"--scaling_clients goes from {least} to {most}. Expected 1 to"
        f" --num_clients={config.num_clients}."
      )
    if config.attack:
      raise errors.UserError(
        "--task=scaling attacks nothing. Expected no --attack."
      )
  single = config.batch_size == 1 and config.local_steps in (None, 1)
  if config.task == "leakage" and not (
    single and config.local_epochs == 1 and config.algorithm == "fed_avg"
  ):
    raise errors.UserError(
      "--task=leakage predicts updates of one image and one step. Expected"
      " --batch_size=1, --local_epochs=1, no --local_steps and"
      " --algorithm=fed_avg."
    )
  if config.task in ("leakage", "costs") and config.attack:
    raise errors.UserError(
      f"--task={config.task} attacks nothing. Expected no --attack."
    )
  if config.task == "costs" and config.algorithm == "scaffold":
    raise errors.UserError(
      "--task=costs measures one message a client, and scaffold sends two."
      " Expected another --algorithm."
    )
  if config.dry_run and config.task not in ("train", "attack"):
    raise errors.UserError(
      f"--dry_run with --task={config.task}, which consists of other runs."
      " Expected --task=train or attack."
    )
  if config.dry_run and config.coordinator_address is not None:
    raise errors.UserError(
      "--dry_run measures one process. Expected no --coordinator_address,"
      " --num_processes and --process_id with it."
    )
  if config.task == "attack" and not config.attack:
    raise errors.UserError(
      "--task=attack needs --attack. Expected one or more of"
      f" {', '.join(attacks_lib.ATTACKS)}."
    )


def _check_study(config: Config) -> None:
  for name in ("study_datasets", "study_seeds", "study_batches"):
    if not getattr(config, name):
      raise errors.UserError(f"--{name} is empty. Expected one or more.")
  count = len(images(config.attack_images)[1])
  for steps in config.study_local_steps:
    for batch in config.study_batches:
      if not steps * batch or count % (steps * batch):
        raise errors.UserError(
          f"--attack_images={config.attack_images} are {count} images, which do"
          f" not make whole updates of {steps} steps of {batch}. Expected"
          " --study_batches and --study_local_steps whose products divide it."
        )
  if config.study_clients:
    if not config.attack or max(config.attack_rounds) < 2:
      told = ",".join(map(str, config.study_clients))
      raise errors.UserError(
        f"--study_clients={told} adds training that is attacked, but no round"
        " of training is. Expected --attack and, in --attack_rounds, a round"
        " after the first."
      )
    for clients in config.study_clients:
      if clients in (0, config.num_clients):
        raise errors.UserError(
          f"--study_clients names {clients}. Expected numbers of clients from 1"
          f" on, other than --num_clients={config.num_clients}."
        )
  for spec in config.defense:
    if "epsilon" in specs.parse(spec)[1]:
      raise errors.UserError(
        f"--defense={spec}: noise for a given epsilon differs between a whole"
        " run and the single updates that a study attacks. Expected"
        " noise_multiplier."
      )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
  if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
    raise errors.UserError(
      f"--{flag}={text}. Expected whole numbers, such as 1,20."
    )
  return tuple(sorted({int(part) for part in text.split(",")}))


def images(spec: str) -> tuple[str, range]:
  """Parses `--attack_images`.

  Args:
    spec: `train:0-7` or `test:5000-5007`, both ends included, or `test:3`.

  Returns:
    (split, range of rows).

  Raises:
    UserError: of another form, or an empty range.
  """
  match = re.fullmatch(r"(train|test):(\d+)(?:-(\d+))?", spec.strip())
  if match is None:
    raise errors.UserError(
      f"--attack_images={spec}. Expected a split and rows, such as test:0-7."
    )
  first = int(match[2])
  last = first if match[3] is None else int(match[3])
  if last < first:
    raise errors.UserError(
      f"--attack_images={spec} names no image. Expected first-last with first"
      " at most last."
    )
  return match[1], range(first, last + 1)
