"""What `--help` prints: flags in groups, and commands to start from."""

from collections.abc import Iterator
import textwrap

from absl import flags

from experiments.flag_definitions import GROUPS

EXAMPLES = (
  (
    "train under three defences and attack the first round",
    "--dataset=mnist_sample --defense=none,paper,int2 --attack=dlg"
    " --output_dir=runs/first",
  ),
  (
    "attack given images, by an attacker who knows the codec",
    "--task=attack --attack=map --attack_knowledge=adaptive --batch_size=1"
    " --attack_images=test:0-7 --defense=int4 --output_dir=runs/attack",
  ),
  (
    "predict what leaks, and write a policy that leaks least",
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


def wanted(argv: list[str]) -> bool:
  """Whether the command line asks for help (`--helpfull` is absl's own)."""
  asks = ("-h", "-help", "--help", "-helpshort", "--helpshort")
  return argv[1:2] == ["help"] or any(word in asks for word in argv[1:])


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
