"""What a client computes: batches of its own examples, SGD or one gradient.

A client is described by (offset, size) into `Examples.order`. Its batches are
drawn inside the compiled program, so that a round needs nothing of the host but
the ids of its clients. Steps beyond a client's own are not executed at all
where clients run in a loop, and masked where they run side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mpqfl_jax import models, trees
from mpqfl_jax.types import (
  Array,
  ClientResult,
  Examples,
  Key,
  Model,
  Params,
  PyTree,
  Update,
)


class Schedule(NamedTuple):
  """How a client goes through its examples.

  Attributes:
    batch_size: examples a step; an epoch's last batch may hold fewer.
    max_examples: the largest client's number of examples.
    epochs: passes over the client's examples.
    steps: number of steps instead of epochs; epochs follow one another.
    poisson: whether a step's batch is drawn by a coin for each example, with
      `batch_size` of them on average, instead of from a permutation.
  """

  batch_size: int
  max_examples: int
  epochs: int = 1
  steps: int | None = None
  poisson: bool = False

  def num_steps(self, size: Array) -> Array:
    """Steps that a client of `size` examples takes, 0 for an empty one."""
    if self.steps is not None:
      return jnp.where(size > 0, self.steps, 0)
    return self.epochs * self._steps_per_epoch(size)

  def _steps_per_epoch(self, size: Array) -> Array:
    return -(-size // self.batch_size)

  @property
  def _room(self) -> int:
    """`max_examples`, rounded up to a power of two.

    What is beyond changes no batch. Populations of other seeds, whose largest
    clients differ, so share one program, and a cache of programs serves them.
    """
    return 1 << (self.max_examples - 1).bit_length()

  def _permutation(self, key: Key, epoch: Array, size: Array) -> Array:
    """[room] int32: the epoch's order of its examples."""
    draw = jax.random.uniform(jax.random.fold_in(key, epoch), (self._room,))
    slot = jnp.arange(self._room)
    return jnp.argsort(jnp.where(slot < size, draw, 2.0))

  def expected(self, size: Array) -> Array:
    """Examples of a Poisson batch on average, [] float32."""
    return jnp.minimum(size, self.batch_size).astype(jnp.float32)

  def _coins(self, key: Key, step: Array, size: Array) -> tuple[Array, Array]:
    """A Poisson batch: slots, those drawn first, and which of them were."""
    slot = jnp.arange(self.max_examples)
    rate = self.expected(size) / jnp.maximum(size, 1)
    coins = jax.random.uniform(jax.random.fold_in(key, step), slot.shape)
    drawn = (slot < size) & (coins < rate)
    first = jnp.argsort(~drawn)
    return first, drawn[first]

  def fold(
    self,
    fn: Callable,
    carry: PyTree,
    key: Key,
    offset: Array,
    size: Array,
    order: Array,
  ) -> PyTree:
    """Folds `fn(carry, step, rows[batch], mask[batch])` over the batches.

    A Poisson batch is as long as the largest client, those drawn first.

    Args:
      fn: returns the new carry.
      carry: the first one.
      key: the client's key for its batches.
      offset: [] int32, where its part of `order` starts.
      size: [] int32, its number of examples.
      order: [examples] int32.

    Returns:
      The last carry.
    """
    per_epoch = jnp.maximum(self._steps_per_epoch(size), 1)

    def body(step, state):
      permutation, carry = state
      if self.poisson:
        slot, drawn = self._coins(key, step, size)
        rows = order[offset + jnp.where(drawn, slot, 0)]
        return permutation, fn(carry, step, rows, drawn.astype(jnp.float32))
      epoch, batch = step // per_epoch, step % per_epoch
      permutation = lax.cond(
        batch == 0,
        lambda: self._permutation(key, epoch, size),
        lambda: permutation,
      )
      slot = batch * self.batch_size + jnp.arange(self.batch_size)
      mask = slot < size
      rows = order[offset + permutation[jnp.where(mask, slot, 0)]]
      return permutation, fn(carry, step, rows, mask.astype(jnp.float32))

    start = (jnp.zeros(self._room, jnp.int32), carry)
    return lax.fori_loop(0, self.num_steps(size), body, start)[1]

  def rows(
    self, key: Key, offset: Array, size: Array, order: Array, steps: int
  ) -> tuple[Array, Array]:
    """The batches that `fold` visits: rows and mask, [steps, batch] each."""
    shape = (steps, self.batch_size)

    def record(carry, step, rows, mask):
      return carry[0].at[step].set(rows), carry[1].at[step].set(mask)

    empty = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    return self.fold(record, empty, key, offset, size, order)


def images(examples: Examples, rows: Array) -> Array:
  """The rows' images as float32 in [0, 1]."""
  return examples.x[rows].astype(jnp.float32) / 255.0


# (params, examples, offset [], size [], key, learning rate [], drift) ->
# ClientResult; the drift is added to every gradient where it is not None.
LocalTraining = Callable[
  [Params, Examples, Array, Array, Key, Array, Update | None], ClientResult
]
# learning rate -> the client's optimiser
Optimizer = Callable[[Array], optax.GradientTransformation]


# (params, examples, rows[batch], mask[batch], examples to divide by [], key) ->
# (mean loss, gradient)
BatchGradient = Callable[
  [Params, Examples, Array, Array, Array, Key], tuple[Array, Params]
]


def step_key(batches: Key, number: Array | int) -> Key:
  """The key of a client's gradient in its step `number`, from 0.

  Args:
    batches: the client's key for its batches in the round.
    number: of the step, through all epochs.
  """
  # Beyond the keys of permutations and coins.
  return jax.random.fold_in(jax.random.fold_in(batches, 2**32 - 1), number)


def mean_gradient(model: Model) -> BatchGradient:
  """The gradient of the mean cross-entropy over a batch."""

  def mean_loss(params, examples, rows, mask, count):
    losses = models.cross_entropy(
      model, params, images(examples, rows), examples.y[rows]
    )
    return jnp.sum(mask * losses) / count

  def gradient(params, examples, rows, mask, count, key):
    del key
    return jax.value_and_grad(mean_loss)(params, examples, rows, mask, count)

  return gradient


def sgd(
  model: Model,
  optimizer: Optimizer,
  schedule: Schedule,
  prox_mu: float = 0.0,
  gradient: BatchGradient | None = None,
) -> LocalTraining:
  """Local training: FedAvg's client update, FedProx's or SCAFFOLD's.

  Source: McMahan et al. 2017, algorithm 1, ClientUpdate; with `prox_mu`, Li et
  al. 2020 (FedProx), equation 2; with a drift, the server's control variate
  less the client's, Karimireddy et al. 2020 (SCAFFOLD), equation 3.

  Args:
    model: the classifier.
    optimizer: learning rate -> the client's optimiser, such as `optax.sgd`;
      its state starts afresh each round.
    schedule: epochs or steps, and the batch size.
    prox_mu: weight of the proximal term, mu / 2 times the squared distance to
      the global model.
    gradient: of a batch; that of the mean loss where None.

  Returns:
    A LocalTraining.
  """
  batch_gradient = gradient or mean_gradient(model)

  def train(params, examples, offset, size, key, learning_rate, drift=None):
    rule = optimizer(learning_rate)

    def step(carry, number, rows, mask):
      local, state, loss, count = carry
      value, grad = batch_gradient(
        local,
        examples,
        rows,
        mask,
        schedule.expected(size) if schedule.poisson else jnp.sum(mask),
        step_key(key, number),
      )
      if prox_mu:
        pull = trees.scale(prox_mu, trees.subtract(local, params))
        grad = trees.add(grad, pull)
      if drift is not None:
        grad = trees.add(grad, drift)
      change, state = rule.update(grad, state, local)
      local = optax.apply_updates(local, change)
      seen = jnp.sum(mask)
      return local, state, loss + seen * value, count + seen

    zero = jnp.float32(0)
    start = (params, rule.init(params), zero, zero)
    local, _, loss, count = schedule.fold(
      step, start, key, offset, size, examples.order
    )
    update = trees.subtract(params, local)
    steps = schedule.num_steps(size)
    return ClientResult(update, loss / jnp.maximum(count, 1), steps)

  return train


def gradient(model: Model, schedule: Schedule) -> LocalTraining:
  """One gradient over all of the client's examples: FedSGD.

  The update is the learning rate times the mean gradient, as if the client had
  taken one step, so that both algorithms share a server.

  Source: McMahan et al. 2017, section 2, FederatedSGD.

  Args:
    model: the classifier.
    schedule: one epoch; its batches only bound the memory.

  Returns:
    A LocalTraining that takes no drift.
  """
  schedule = schedule._replace(epochs=1, steps=None)

  def train(params, examples, offset, size, key, learning_rate, drift=None):
    if drift is not None:
      raise ValueError("one gradient does not drift")

    def batch_sum(params, rows, mask):
      losses = models.cross_entropy(
        model, params, images(examples, rows), examples.y[rows]
      )
      return jnp.sum(mask * losses)

    def step(carry, _, rows, mask):
      total, loss = carry
      value, grad = jax.value_and_grad(batch_sum)(params, rows, mask)
      return trees.add(total, grad), loss + value

    start = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    total, loss = schedule.fold(step, start, key, offset, size, examples.order)
    count = jnp.maximum(size, 1).astype(jnp.float32)
    update = trees.scale(learning_rate / count, total)
    return ClientResult(update, loss / count, schedule.num_steps(size))

  return train
