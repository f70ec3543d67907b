"""Flags, and the one frozen config that they become."""

import dataclasses
import pathlib
import re
from typing import Any

from absl import flags

from mpqfl_jax import (
  aggregate,
  client_state,
  datasets,
  distributed,
  errors,
  federated,
  models,
  own_images,
  partition,
  schedules,
  specs,
)
from mpqfl_jax import attacks as attacks_lib

FLAGS_DIR = pathlib.Path(__file__).parent / "flags"
TASKS = ("train", "attack", "leakage", "study", "scaling")
ALGORITHMS = ("fed_avg", "fed_sgd", "fed_prox", "scaffold")
SAMPLINGS = ("uniform", "poisson")
KNOWLEDGE = ("blind", "adaptive")
DATASETS = (*datasets.SAMPLES, *datasets.FULL_SETS)


def _define() -> None:
  f = flags
  f.DEFINE_enum(
    "task",
    "train",
    TASKS,
    "train: a federated run, attacked where"
    " --attack is set; attack: invert the updates of given images; leakage:"
    " predict what that attack will reach, and find a policy that leaks least;"
    " study: a grid of training and attacks, one table of claims; scaling: what"
    " a round costs against the number of its clients.",
  )
  f.DEFINE_string("output_dir", "runs/default", "The run's folder.")
  f.DEFINE_bool("overwrite", False, "Replace the run that is in --output_dir.")
  f.DEFINE_bool(
    "resume", False, "Go on with the run in --output_dir, if one is there."
  )
  f.DEFINE_bool(
    "dry_run",
    False,
    "Print the config, what each defence sends, and costs measured in two"
    " rounds; write nothing.",
  )
  f.DEFINE_integer(
    "checkpoint_every", 10, "Rounds between checkpoints; 0: at the end only.", 0
  )
  f.DEFINE_string(
    "writers",
    "",
    "Comma-separated, beside metrics.jsonl: tensorboard, wandb.",
  )
  f.DEFINE_integer("seed", 0, "Everything random derives from it.", 0)

  f.DEFINE_string(
    "dataset",
    "mnist_sample",
    ", ".join(DATASETS) + "; or images of your own: FILE.npz, or a folder with"
    " train/CLASS/NAME.png and test/CLASS/NAME.png.",
  )
  f.DEFINE_string("data_dir", None, "TFDS folder of a full set.")
  f.DEFINE_string(
    "partition",
    "iid",
    f"How clients share the training set: {', '.join(partition.PARTITIONS)}.",
  )
  f.DEFINE_float(
    "size_sigma",
    0.0,
    "Deviation of the log of clients' sizes"
    " (iid, dirichlet); 0 makes them equal.",
    0.0,
  )
  f.DEFINE_float("dirichlet_alpha", 0.3, "Concentration of the labels.", 0.0)

  f.DEFINE_string("model", "lenet_zhu", f"{', '.join(models.MODELS)}.")
  f.DEFINE_integer("num_clients", 100, "Clients in the population.", 1)
  f.DEFINE_integer(
    "client_examples",
    None,
    "Examples of a client, on average. Clients share examples where the set is"
    " too small for all. Default: the set is divided once.",
    1,
  )
  f.DEFINE_integer("cohort_size", 10, "Clients that take part in a round.", 1)
  f.DEFINE_enum(
    "client_sampling",
    "uniform",
    SAMPLINGS,
    "uniform: so many clients without replacement; poisson: each client by a"
    " coin of its own, so many on average.",
  )
  f.DEFINE_string(
    "scaling_clients",
    "10,100,1000",
    "Clients in a round that --task=scaling measures.",
  )
  f.DEFINE_integer("rounds", 20, "Rounds of training.", 1)
  f.DEFINE_integer("local_epochs", 1, "A client's passes over its data.", 1)
  f.DEFINE_integer("local_steps", None, "Steps instead of epochs.", 1)
  f.DEFINE_integer("batch_size", 10, "Images in a client's step.", 1)
  f.DEFINE_float("client_lr", 0.1, "The client's SGD step size.", 0.0)
  f.DEFINE_enum(
    "algorithm",
    "fed_avg",
    ALGORITHMS,
    "Local SGD; one gradient over a client's data; local SGD near the global"
    " model; local SGD with control variates.",
  )
  f.DEFINE_string(
    "server_optimizer",
    "sgd",
    f"Applied to the mean update: {', '.join(federated.SERVER_OPTIMIZERS)}.",
  )
  f.DEFINE_float("server_lr", 1.0, "The server's step size.", 0.0)
  for side in ("client", "server"):
    f.DEFINE_string(
      f"{side}_lr_schedule",
      "constant",
      f"--{side}_lr by round: {', '.join(schedules.SCHEDULES)}, with"
      " (warmup=rounds,key=value,...).",
    )
  f.DEFINE_float(
    "prox_mu", 0.01, "Weight of FedProx's proximal term (fed_prox).", 0.0
  )
  f.DEFINE_string(
    "aggregator",
    "mean",
    f"{', '.join(aggregate.AGGREGATORS)}, with (key=value,...).",
  )
  f.DEFINE_float(
    "dropout", 0.0, "Probability that an update does not arrive.", 0.0, 1.0
  )
  f.DEFINE_float(
    "straggler_deadline",
    None,
    "Batches that a client of median speed manages before the server stops"
    " waiting for updates. Default: it waits for all.",
    0.0,
  )
  f.DEFINE_float(
    "straggler_sigma",
    0.5,
    "Deviation of the log of clients' slowness (straggler_deadline).",
    0.0,
  )
  f.DEFINE_string(
    "downlink", "none", "Codec of the broadcast model, as in --defense."
  )
  f.DEFINE_enum(
    "client_state",
    "auto",
    client_state.WHERE,
    "Where clients' states (scaffold, error feedback, static ranges) are kept.",
  )
  f.DEFINE_integer("eval_every", 1, "Rounds from one test to the next.", 1)

  f.DEFINE_string(
    "defense",
    "none",
    "Comma-separated, run side by side from"
    " the same seed: name, name(key=value,...), or a policy file.",
  )
  f.DEFINE_float("delta", 1e-5, "Delta of every (epsilon, delta).", 0.0, 1.0)

  f.DEFINE_string(
    "attack",
    "",
    f"Comma-separated: {', '.join(attacks_lib.ATTACKS)}, with (key=value,...).",
  )
  f.DEFINE_string(
    "attack_knowledge",
    "blind",
    "blind, adaptive, or both: whether the attacker knows the codec.",
  )
  f.DEFINE_string("attack_rounds", "1", "Rounds whose updates are attacked.")
  f.DEFINE_integer(
    "attack_clients",
    2,
    "Updates attacked in such a round: those of the fewest images.",
    1,
  )
  f.DEFINE_string("attack_images", "test:0-3", "What --task=attack inverts.")
  f.DEFINE_integer("attack_restarts", None, "Starting points.", 1)
  f.DEFINE_bool("labels_known", False, "Whether the attacker has the labels.")

  f.DEFINE_integer(
    "guard_bytes",
    None,
    "--task=leakage writes the policy of least predicted leakage in so many"
    " bytes an update, everything included.",
    1,
  )
  f.DEFINE_float(
    "guard_error",
    0.1,
    "The largest squared error of its updates, over their squared norm.",
    0.0,
    1.0,
  )

  f.DEFINE_string(
    "study_datasets", "mnist_sample", "Data sets of --task=study."
  )
  f.DEFINE_string(
    "study_seeds",
    "0,1,2",
    "Seeds of its training runs; updates are attacked under the first.",
  )
  f.DEFINE_string(
    "study_batches", "1", "Images in a step of the updates that it attacks."
  )
  f.DEFINE_string("study_local_steps", "1", "Local steps of these updates.")
  f.DEFINE_string(
    "study_encryption",
    None,
    "Costs that python -m benchmarks.encryption wrote with --json.",
  )

  f.DEFINE_string(
    "plan", "auto", "How a cohort is executed: auto, loop, vmap, chunk(size=8)."
  )
  f.DEFINE_integer(
    "devices",
    None,
    "Devices used of each process; default all, on a CPU one a core.",
    1,
  )
  f.DEFINE_string(
    "coordinator_address",
    None,
    "Several processes: host:port of process 0, the same for all; auto on a TPU"
    " slice, under Slurm or Open MPI.",
  )
  f.DEFINE_integer("num_processes", None, "Processes of the run.", 1)
  f.DEFINE_integer("process_id", None, "This process, from 0.", 0)
  f.DEFINE_integer(
    "join_seconds", 120, "How long a process waits for the others.", 1
  )


_define()


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
  study_encryption: str | None
  plan: str
  devices: int | None
  coordinator_address: str | None
  num_processes: int | None
  process_id: int | None


def from_flags(values: flags.FlagValues) -> Config:
  """The config that the command line asks for.

  Raises:
    UserError: a value that no run can have, before anything is touched.
  """
  given: dict[str, Any] = {
    field.name: values[field.name].value for field in dataclasses.fields(Config)
  }
  return _resolve(given)


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
  config = Config(**given)
  check(config)
  return config


def make(**changes: Any) -> Config:
  """A config from Python: the flags' defaults with some values changed.

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
  given = {name: flags.FLAGS[name].default for name in known} | {
    name: ",".join(map(str, value)) if isinstance(value, tuple) else value
    for name, value in changes.items()
  }
  return _resolve(given)


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
  if config.task in ("train", "study"):
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
        f" --rounds={config.rounds}."
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
