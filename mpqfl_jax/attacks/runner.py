"""Runs an attack on many observations as one compiled loop.

Work is a queue of items, one for each observation and restart. The device holds
a few of them at a time, in lanes: each device runs `width` lanes. All lanes
advance together by a chunk of iterations without the host; then items that have
finished leave, and waiting ones take their lanes. So memory is set by the
number of lanes and not by the number of images, searches that end early cost
nothing more, and what is done is never lost. An item's result depends on its
own key and observation only: not on the lane, the chunk, or the other items.
"""

from collections.abc import Sequence
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import auto as tqdm

from mpqfl_jax import errors, exact
from mpqfl_jax.attacks import core
from mpqfl_jax.types import Array, Key, Observation, PyTree

_AXIS = "lanes"


class Reconstruction(NamedTuple):
  """What an attack brought back, one row an observation.

  Attributes:
    x: [n, images, height, width, channels] float32 in [0, 1].
    labels: [n, images] int32.
    objective: [n] float32, the lowest objective over iterations and restarts;
      infinite where no iteration gave a number.
    iterations: [n] int32, steps taken, summed over restarts.
    seconds: wall time of the search, compilation and preparation excluded.
    compile_seconds: wall time spent on compilation, 0 where a former run of the
      same attack on the same shapes left its program, and where it was not
      measured apart.
  """

  x: np.ndarray
  labels: np.ndarray
  objective: np.ndarray
  iterations: np.ndarray
  seconds: float
  compile_seconds: float


class Interrupted(KeyboardInterrupt):
  """An interrupted run; `partial` holds what was found until then."""

  def __init__(self, partial: Reconstruction):
    super().__init__("attack interrupted")
    self.partial = partial


class _Lane(NamedTuple):
  state: PyTree
  iteration: Array
  active: Array
  objective: Array
  x: Array
  labels: Array


def _start(attack: core.Attack, key: Key, observation: Observation) -> _Lane:
  state = attack.init(key, observation)
  x, labels = attack.extract(state)
  return _Lane(
    state, jnp.int32(0), jnp.bool_(True), jnp.float32(jnp.inf), x, labels
  )


def _iterate(attack: core.Attack, lane: _Lane, observation: Observation):
  state, loss = attack.step(lane.state, observation)
  # False for NaN. An idle lane keeps stepping under `vmap`, to no effect.
  better = lane.active & (loss < lane.objective)
  x, labels = attack.extract(lane.state)
  iteration = lane.iteration + lane.active
  return _Lane(
    state,
    iteration,
    lane.active & (iteration < attack.iterations) & ~attack.finished(state),
    jnp.where(better, loss, lane.objective),
    jnp.where(better, x, lane.x),
    jnp.where(better, labels, lane.labels),
  )


class _Program(NamedTuple):
  start: Any
  advance: Any
  sharding: jax.sharding.Sharding
  compiled: dict


@functools.lru_cache(maxsize=32)
def _program(
  attack: core.Attack, devices: tuple[jax.Device, ...], width: int, chunk: int
) -> _Program:
  """The two compiled functions of an attack; kept for the next run."""
  mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,))
  spec = jax.sharding.PartitionSpec(_AXIS)

  def each(fn):
    # One lane is run as it is: `vmap` turns branches into selections.
    if width > 1:
      return jax.vmap(fn)

    def single(*args):
      out = fn(*jax.tree.map(lambda a: a[0], args))
      return jax.tree.map(lambda a: a[None], out)

    return single

  def start(lanes, fresh, keys, observations):
    new = each(functools.partial(_start, attack))(keys, observations)
    new = new._replace(active=fresh)

    def pick(old, new):
      return jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return new if lanes is None else jax.tree.map(pick, lanes, new)

  def advance(lanes, observations):
    iterate = each(functools.partial(_iterate, attack))

    def cond(carry):
      i, lanes = carry
      return (i < chunk) & jnp.any(lanes.active)

    def body(carry):
      i, lanes = carry
      return i + 1, iterate(lanes, observations)

    return jax.lax.while_loop(cond, body, (0, lanes))[1]

  def shard(fn, arguments, donate):
    return jax.jit(
      jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec,) * arguments,
        out_specs=spec,
        check_vma=False,
      ),
      donate_argnums=donate,
    )

  return _Program(
    shard(start, 4, (0,)),
    shard(advance, 2, (0,)),
    jax.sharding.NamedSharding(mesh, spec),
    {},
  )


def _call(program: _Program, name: str, *args) -> tuple[Any, float]:
  """Calls a function of the program; also the seconds spent on compiling it."""
  shapes = jax.tree.map(lambda a: (a.shape, str(a.dtype)), args)
  leaves, structure = jax.tree.flatten(shapes)
  signature = (name, exact.chosen(), tuple(map(str, leaves)), structure)
  seconds = 0.0
  if signature not in program.compiled:
    begin = time.perf_counter()
    lowered = getattr(program, name).lower(*args)
    program.compiled[signature] = lowered.compile()
    seconds = time.perf_counter() - begin
  return program.compiled[signature](*args), seconds


def _on_host(observations: Observation) -> Observation:
  """The observations as host arrays, everything with a leading axis."""
  n = jax.tree.leaves(observations.update)[0].shape[0]
  bins = observations.bins
  if bins is not None:
    # Traced instead of static, so that one program serves every codec.
    flags = jax.tree.map(
      lambda flag: np.broadcast_to(np.asarray(flag), (n,)), bins.stochastic
    )
    observations = observations._replace(bins=bins._replace(stochastic=flags))
  return jax.tree.map(np.asarray, observations)


def _ask(
  attack: core.Direct,
  host: Observation,
  key: Key,
  restarts: int,
  channel: core.Channel | None,
  progress: bool | None,
) -> Reconstruction:
  """Asks a direct attack about every observation, one after the other."""
  n = jax.tree.leaves(host.update)[0].shape[0]
  best: list[core.Answer | None] = [None] * n
  steps = np.zeros(n, np.int32)
  begin = time.perf_counter()

  def result() -> Reconstruction:
    x, labels = known[0].x, known[0].labels
    nothing = core.Answer(0 * x, 0 * labels, np.inf, 0)
    answers = [nothing if a is None else a for a in best]
    return Reconstruction(
      np.stack([a.x for a in answers]),
      np.stack([a.labels for a in answers]),
      np.array([a.objective for a in answers], np.float32),
      steps,
      time.perf_counter() - begin,
      0.0,
    )

  known: list[core.Answer] = []
  bar = tqdm.tqdm(
    total=n * restarts,
    desc=attack.name,
    unit="update",
    disable=None if progress is None else not progress,
    leave=False,
  )
  try:
    with bar:
      for row in range(n):
        observation = jax.tree.map(lambda a: a[row], host)
        for restart in range(restarts):
          of_restart = jax.random.fold_in(key, restart)
          answer = attack.solve(
            observation,
            core.Help(of_restart, channel, bar.set_postfix_str),
          )
          known.append(answer)
          steps[row] += answer.iterations
          old = best[row]
          if old is None or answer.objective < old.objective:
            best[row] = answer
          bar.update()
  except KeyboardInterrupt:
    if known:
      raise Interrupted(result()) from None
    raise
  return result()


def default_width(device: jax.Device) -> int:
  """Lanes: one on a CPU, where a lockstep costs more than it gains, else 32."""
  return 1 if device.platform == "cpu" else 32


@exact.products()
def run(
  attack: core.AnyAttack,
  observations: Observation,
  key: Key,
  *,
  restarts: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  width: int | None = None,
  chunk: int = 100,
  channel: core.Channel | None = None,
  progress: bool | None = None,
) -> Reconstruction:
  """Attacks every observation and keeps the best by objective.

  The best is taken over all iterations and restarts, and never with the truth
  in hand. Products are those of float32 (`exact.products`).

  Args:
    attack: made by `attacks.make`; give the same object again to reuse its
      compiled program, whatever the defence.
    observations: every leaf with a leading axis n.
    key: observation i and restart r start from keys derived from i and r.
    restarts: starting points an observation; default the attack's own.
    devices: where it runs; default all.
    width: lanes on each device, vectorised; default `default_width`.
    chunk: iterations between two looks at the host.
    channel: the defence that the updates went through, for attacks that learn
      from updates of their own; give the same object again to reuse what was
      learned.
    progress: True or False shows or hides the progress bar; None shows it where
      the output is a terminal.

  Raises:
    UserError: the attack does not apply to these observations.
    Interrupted: on an interrupt from the keyboard, with what was found.
  """
  restarts = attack.restarts if restarts is None else restarts
  if restarts < 1:
    raise errors.UserError(f"restarts must be at least 1, not {restarts}")
  devices = tuple(jax.devices() if devices is None else devices)
  if width is None:
    width = default_width(devices[0])
  host = _on_host(observations)
  attack.check(jax.tree.map(lambda a: a[0], host))
  if isinstance(attack, core.Direct):
    return _ask(attack, host, key, restarts, channel, progress)
  host = host._replace(update=jax.device_get(core.told(host)))
  n = jax.tree.leaves(host.update)[0].shape[0]
  total = n * restarts
  lanes_count = min(len(devices) * width, total)
  if lanes_count < len(devices) * width:
    width = -(-lanes_count // len(devices))
    devices = devices[: -(-lanes_count // width)]
    lanes_count = len(devices) * width
  program = _program(attack, devices, width, chunk)

  def keys_of(items: np.ndarray) -> Key:
    def one(item):
      row = jax.random.fold_in(key, item // restarts)
      return jax.random.fold_in(row, item % restarts)

    return jax.vmap(one)(items)

  shape = (n, restarts)
  objective = np.full(shape, np.inf, np.float32)
  iterations = np.zeros(shape, np.int32)
  found: dict[str, np.ndarray] = {}

  def harvest(lanes: _Lane, items: np.ndarray, which: np.ndarray) -> None:
    x, labels = np.asarray(lanes.x), np.asarray(lanes.labels)
    if not found:
      found["x"] = np.zeros((n, *x.shape[1:]), x.dtype)
      found["labels"] = np.zeros((n, *labels.shape[1:]), labels.dtype)
      found["any"] = np.zeros(n, bool)
    value, steps = np.asarray(lanes.objective), np.asarray(lanes.iteration)
    for lane in np.flatnonzero(which):
      row, restart = divmod(int(items[lane]), restarts)
      if not found["any"][row] or value[lane] < objective[row].min():
        found["x"][row], found["labels"][row] = x[lane], labels[lane]
        found["any"][row] = True
      objective[row, restart] = value[lane]
      iterations[row, restart] = steps[lane]

  def result() -> Reconstruction:
    return Reconstruction(
      found["x"],
      found["labels"],
      objective.min(1),
      iterations.sum(1),
      time.perf_counter() - begin - compile_seconds,
      compile_seconds,
    )

  attack.prepare()
  begin, compile_seconds = time.perf_counter(), 0.0
  items = np.full(lanes_count, -1)
  waiting, lanes, shown = 0, None, 0
  bar = tqdm.tqdm(
    total=total * attack.iterations,
    desc=attack.name,
    unit="it",
    unit_scale=True,
    disable=None if progress is None else not progress,
    leave=False,
  )
  finished_steps = 0
  try:
    with bar:
      while True:
        free = np.flatnonzero(items < 0)[: total - waiting]
        if free.size:
          items[free] = np.arange(waiting, waiting + free.size)
          waiting += free.size
          fresh = np.zeros(lanes_count, bool)
          fresh[free] = True
          rows = np.maximum(items, 0) // restarts
          put = functools.partial(jax.device_put, device=program.sharding)
          observed = put(jax.tree.map(lambda a: a[rows], host))
          keys = put(keys_of(np.maximum(items, 0)))
          lanes, seconds = _call(
            program, "start", lanes, put(fresh), keys, observed
          )
          compile_seconds += seconds
        lanes, seconds = _call(program, "advance", lanes, observed)
        compile_seconds += seconds
        held = items >= 0
        done = held & ~np.asarray(lanes.active)
        if done.any():
          harvest(lanes, items, done)
          finished_steps += int(done.sum()) * attack.iterations
          items[done] = -1
        running = np.asarray(lanes.iteration)[items >= 0].sum()
        bar.update(finished_steps + int(running) - shown)
        shown = finished_steps + int(running)
        if waiting == total and (items < 0).all():
          return result()
  except KeyboardInterrupt:
    if lanes is not None:
      harvest(lanes, items, items >= 0)
      raise Interrupted(result()) from None
    raise
