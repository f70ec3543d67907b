"""The flags of the command line, in the groups that `--help` shows."""

from absl import flags

from mpqfl_jax import (
  aggregate,
  client_state,
  datasets,
  federated,
  models,
  partition,
  schedules,
)
from mpqfl_jax import attacks as attacks_lib

TASKS = ("train", "attack", "leakage", "costs", "study", "scaling")
ALGORITHMS = ("fed_avg", "fed_sgd", "fed_prox", "scaffold")
SAMPLINGS = ("uniform", "poisson")
KNOWLEDGE = ("blind", "adaptive")
DATASETS = (*datasets.SAMPLES, *datasets.FULL_SETS)


def _names(*defined: flags.FlagHolder) -> tuple[str, ...]:
  return tuple(holder.name for holder in defined)


# heading -> names of flags
GROUPS: dict[str, tuple[str, ...]] = {
  "The run": _names(
    flags.DEFINE_enum(
      "task",
      "train",
      TASKS,
      "train: a federated run, attacked where"
      " --attack is set; attack: invert the updates of given images; leakage:"
      " predict what that attack will reach, and find a policy that leaks"
      " least; costs: seconds, bytes and keys of each defence; study: a grid of"
      " training, attacks and costs, one table of claims;"
      " scaling: what a round costs against the number of its clients.",
    ),
    flags.DEFINE_string("output_dir", "runs/default", "The run's folder."),
    flags.DEFINE_bool(
      "overwrite", False, "Replace the run that is in --output_dir."
    ),
    flags.DEFINE_bool(
      "resume",
      False,
      "Go on with the run in --output_dir, if one is there; flags that are not"
      " given are those that it began with.",
    ),
    flags.DEFINE_bool(
      "dry_run",
      False,
      "Print the config, what each defence sends, and costs measured in two"
      " rounds; write nothing.",
    ),
    flags.DEFINE_integer("seed", 0, "Everything random derives from it.", 0),
    flags.DEFINE_integer(
      "checkpoint_every",
      10,
      "Rounds between checkpoints; 0: at the end only.",
      0,
    ),
    flags.DEFINE_integer(
      "eval_every", 1, "Rounds from one test to the next.", 1
    ),
    flags.DEFINE_string(
      "writers",
      "",
      "Comma-separated, beside metrics.jsonl: tensorboard, wandb.",
    ),
  ),
  "Data and clients": _names(
    flags.DEFINE_string(
      "dataset",
      "mnist_sample",
      ", ".join(DATASETS)
      + "; or images of your own: FILE.npz, or a folder with"
      " train/CLASS/NAME.png and test/CLASS/NAME.png.",
    ),
    flags.DEFINE_string("data_dir", None, "TFDS folder of a full set."),
    flags.DEFINE_string(
      "partition",
      "iid",
      f"How clients share the training set: {', '.join(partition.PARTITIONS)}.",
    ),
    flags.DEFINE_float(
      "size_sigma",
      0.0,
      "Deviation of the log of clients' sizes"
      " (iid, dirichlet); 0 makes them equal.",
      0.0,
    ),
    flags.DEFINE_float(
      "dirichlet_alpha", 0.3, "Concentration of the labels.", 0.0
    ),
    flags.DEFINE_integer("num_clients", 100, "Clients in the population.", 1),
    flags.DEFINE_integer(
      "client_examples",
      None,
      "Examples of a client, on average. Clients share examples where the set"
      " is too small for all. Default: the set is divided once.",
      1,
    ),
    flags.DEFINE_integer(
      "cohort_size", 10, "Clients that take part in a round.", 1
    ),
    flags.DEFINE_enum(
      "client_sampling",
      "uniform",
      SAMPLINGS,
      "uniform: so many clients without replacement; poisson: each client by a"
      " coin of its own, so many on average.",
    ),
    flags.DEFINE_float(
      "dropout", 0.0, "Probability that an update does not arrive.", 0.0, 1.0
    ),
    flags.DEFINE_float(
      "straggler_deadline",
      None,
      "Batches that a client of median speed manages before the server stops"
      " waiting for updates. Default: it waits for all.",
      0.0,
    ),
    flags.DEFINE_float(
      "straggler_sigma",
      0.5,
      "Deviation of the log of clients' slowness (straggler_deadline).",
      0.0,
    ),
  ),
  "Training": _names(
    flags.DEFINE_string("model", "lenet_zhu", f"{', '.join(models.MODELS)}."),
    flags.DEFINE_enum(
      "algorithm",
      "fed_avg",
      ALGORITHMS,
      "Local SGD; one gradient over a client's data; local SGD near the global"
      " model; local SGD with control variates.",
    ),
    flags.DEFINE_integer("rounds", 20, "Rounds of training.", 1),
    flags.DEFINE_integer(
      "local_epochs", 1, "A client's passes over its data.", 1
    ),
    flags.DEFINE_integer("local_steps", None, "Steps instead of epochs.", 1),
    flags.DEFINE_integer("batch_size", 10, "Images in a client's step.", 1),
    flags.DEFINE_float("client_lr", 0.1, "The client's SGD step size.", 0.0),
    flags.DEFINE_string(
      "client_lr_schedule",
      "constant",
      f"--client_lr by round: {', '.join(schedules.SCHEDULES)}, with"
      " (warmup=rounds,key=value,...).",
    ),
    flags.DEFINE_float(
      "prox_mu", 0.01, "Weight of FedProx's proximal term (fed_prox).", 0.0
    ),
    flags.DEFINE_string(
      "server_optimizer",
      "sgd",
      f"Applied to the mean update: {', '.join(federated.SERVER_OPTIMIZERS)}.",
    ),
    flags.DEFINE_float("server_lr", 1.0, "The server's step size.", 0.0),
    flags.DEFINE_string(
      "server_lr_schedule",
      "constant",
      f"--server_lr by round: {', '.join(schedules.SCHEDULES)}, with"
      " (warmup=rounds,key=value,...).",
    ),
    flags.DEFINE_string(
      "aggregator",
      "mean",
      f"{', '.join(aggregate.AGGREGATORS)}, with (key=value,...).",
    ),
  ),
  "Defences": _names(
    flags.DEFINE_string(
      "defense",
      "none",
      "Comma-separated, run side by side from"
      " the same seed: name, name(key=value,...), or a policy file.",
    ),
    flags.DEFINE_string(
      "downlink", "none", "Codec of the broadcast model, as in --defense."
    ),
    flags.DEFINE_float(
      "delta", 1e-5, "Delta of every (epsilon, delta).", 0.0, 1.0
    ),
    flags.DEFINE_enum(
      "client_state",
      "auto",
      client_state.WHERE,
      "Where clients' states (scaffold, error feedback, static ranges) are"
      " kept.",
    ),
  ),
  "Attacks": _names(
    flags.DEFINE_string(
      "attack",
      "",
      f"Comma-separated: {', '.join(attacks_lib.ATTACKS)}, with"
      " (key=value,...).",
    ),
    flags.DEFINE_string(
      "attack_knowledge",
      "blind",
      "blind, adaptive, or both: whether the attacker knows the codec.",
    ),
    flags.DEFINE_string(
      "attack_rounds", "1", "Rounds whose updates are attacked."
    ),
    flags.DEFINE_integer(
      "attack_clients",
      2,
      "Updates attacked in such a round: those of the fewest images.",
      1,
    ),
    flags.DEFINE_string(
      "attack_images",
      "test:0-3",
      "What --task=attack inverts, and --task=leakage predicts:"
      " split:first-last, both included, such as test:0-7, or train:5 for one.",
    ),
    flags.DEFINE_integer(
      "attack_restarts",
      None,
      "Starting points of a search, of which the best counts. Default: each"
      " attack's own, as list attacks shows.",
      1,
    ),
    flags.DEFINE_bool(
      "labels_known", False, "Whether the attacker has the labels."
    ),
  ),
  "The task leakage": _names(
    flags.DEFINE_integer(
      "guard_bytes",
      None,
      "--task=leakage also searches, for a few minutes, the policy of least"
      " predicted leakage in so many bytes an update, everything included.",
      1,
    ),
    flags.DEFINE_float(
      "guard_error",
      0.1,
      "The largest squared error of its updates, over their squared norm.",
      0.0,
      1.0,
    ),
  ),
  "The task study": _names(
    flags.DEFINE_string(
      "study_datasets", "mnist_sample", "Data sets of --task=study."
    ),
    flags.DEFINE_string(
      "study_seeds",
      "0,1,2",
      "Seeds of its training runs; updates are attacked under the first.",
    ),
    flags.DEFINE_string(
      "study_batches", "1", "Images in a step of the updates that it attacks."
    ),
    flags.DEFINE_string(
      "study_local_steps", "1", "Local steps of these updates."
    ),
    flags.DEFINE_string(
      "study_clients",
      "",
      "Further numbers of clients, whose training under the first seed is"
      " attacked in the later rounds of --attack_rounds as well. Of fewer than"
      " --cohort_size, all take part in a round.",
    ),
    flags.DEFINE_string(
      "study_encryption",
      None,
      "Costs that python -m benchmarks.encryption wrote with --json, which"
      " --task=scaling shows, too.",
    ),
    flags.DEFINE_integer(
      "study_processes",
      1,
      "Runs of the grid beside one another, each in a process with its share of"
      " the CPU's cores. --devices, where given, is for each.",
      1,
    ),
  ),
  "The task scaling": _names(
    flags.DEFINE_string(
      "scaling_clients",
      "10,100,1000",
      "Clients in a round that --task=scaling measures, and clients for which"
      " --task=costs makes keys.",
    ),
  ),
  "Devices and hosts": _names(
    flags.DEFINE_string(
      "plan",
      "auto",
      "How a cohort is executed: auto, loop, vmap, chunk(size=8). All but auto"
      " take a form of convolution other than the backend's fastest, as"
      " loop(conv=xla).",
    ),
    flags.DEFINE_integer(
      "devices",
      None,
      "Devices used of each process; default all, on a CPU one a core.",
      1,
    ),
    flags.DEFINE_string(
      "coordinator_address",
      None,
      "Several processes: host:port of process 0, the same for all; auto on a"
      " TPU slice, under Slurm or Open MPI.",
    ),
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", 1),
    flags.DEFINE_integer("process_id", None, "This process, from 0.", 0),
    flags.DEFINE_integer(
      "join_seconds", 120, "How long a process waits for the others.", 1
    ),
  ),
}
