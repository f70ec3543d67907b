"""What `--help` prints: flags in groups, and commands to start from."""

from collections.abc import Iterator
import re
import textwrap

from absl import flags

from experiments.flag_definitions import GROUPS

EXAMPLES = (
  (
    "train under three defences and attack the first round",
    "--dataset=mnist_sample --rounds=20 --num_clients=300 --size_sigma=1.8"
    " --cohort_size=30 --batch_size=4 --client_lr=0.3"
    " --defense=none,paper,int2 '--attack=dlg(iterations=300)'"
    " --output_dir=runs/first",
  ),
  (
    "attack given images, by an attacker who knows the codec",
    "--task=attack --attack=map --attack_knowledge=adaptive --batch_size=1"
    " --attack_images=test:0-7 --defense=int4 --output_dir=runs/attack",
  ),
  (
    "predict what leaks, and search a policy that leaks least (minutes)",
    "--task=leakage --batch_size=1 --defense=none,int4 --guard_bytes=6900"
    " --output_dir=runs/leakage",
  ),
  (
    "what each defence costs in seconds, bytes and keys",
    "--task=costs --defense=none,int4,dp_gaussian,he --output_dir=runs/costs",
  ),
  (
    "what a round costs against its clients",
    "--flagfile=experiments/flags/scaling.flags",
  ),
  (
    "what a run would do, send and cost",
    "--flagfile=experiments/flags/quickstart.flags --dry_run",
  ),
)

_COMMAND = "python -m experiments.main"
_WIDTH = 79

# What Python and absl say of a value -> what it should have been.
_WORDS = (
  (r"invalid literal for int\(\) with base 10: .*", "expected a whole number"),
  (r"could not convert string to float: .*", "expected a number"),
  (r"\('Non-boolean argument to boolean flag', .*", "expected true or false"),
  (
    r"ERROR:: Unable to open flagfile: \[Errno \d+\] (.*): '(.*)'",
    r"cannot open --flagfile=\2: \1. Expected a file such as"
    " experiments/flags/quickstart.flags",
  ),
)


def wanted(argv: list[str]) -> bool:
  """Whether the command line asks for help (`--helpfull` is absl's own)."""
  asks = ("-h", "-help", "--help", "-helpshort", "--helpshort")
  return argv[1:2] == ["help"] or any(word in asks for word in argv[1:])


def mistake(e: flags.Error) -> str:
  """absl's error as one line of whole sentences."""
  line = " ".join(str(e).split())
  for pattern, words in _WORDS:
    line = re.sub(pattern, words, line)
  return f"{line.rstrip('.')}. --help lists the flags."


def text(values: flags.FlagValues) -> str:
  """The page."""
  return "\n".join(_lines(values))


def _lines(values: flags.FlagValues) -> Iterator[str]:
  yield f"{_COMMAND} [--flagfile=FILE] [--NAME=VALUE ...]"
  yield f"{_COMMAND} list [WORD ...]    what flags can name"
  yield ""
  for what, line in EXAMPLES:
    yield f"# {what}"
    yield from textwrap.wrap(
      f"{_COMMAND} {line}",
      _WIDTH - 2,
      subsequent_indent="    ",
      break_long_words=False,
      break_on_hyphens=False,
    )
  for heading, names in GROUPS.items():
    yield ""
    yield heading
    for name in names:
      flag = values[name]
      default = "" if flag.default in (None, "") else f" [{_shown(flag)}]"
      yield f"  --{name}{default}"
      for line in textwrap.wrap(flag.help, _WIDTH - 6):
        yield f"      {line}"


def _shown(flag: flags.Flag) -> str:
  if isinstance(flag.default, bool):
    return "true" if flag.default else "false"
  return str(flag.default)
