"""Gradient inversion: what a server reads out of one client's update.

attack = attacks.make("dlg", model)
found = attacks.run(attack, observations, jax.random.key(0))
"""

from collections.abc import Callable
import inspect

import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.attacks import (
  analytic,
  core,
  deep_image_prior,
  dlg,
  imprint,
  inverting_gradients,
  learning_to_invert,
  rgap,
)
from mpqfl_jax.attacks import map as map_attack
from mpqfl_jax.attacks.core import AnyAttack, Attack, Direct, Work, simulate
from mpqfl_jax.attacks.runner import (
  Interrupted,
  Reconstruction,
  default_width,
  run,
)
from mpqfl_jax.types import Model

__all__ = [
  "ATTACKS",
  "MALICIOUS",
  "AnyAttack",
  "Attack",
  "Direct",
  "Interrupted",
  "Reconstruction",
  "Work",
  "default_width",
  "make",
  "run",
  "simulate",
]

# name -> (constructor, one line with its source)
ATTACKS: dict[str, tuple[Callable[..., AnyAttack], str]] = {
  "dlg": (dlg.dlg, "Deep Leakage from Gradients, Zhu et al. 2019"),
  "idlg": (dlg.idlg, "Improved DLG: label first, Zhao et al. 2020"),
  "inverting_gradients": (
    inverting_gradients.inverting_gradients,
    "cosine distance and total variation, after Geiping et al. 2020",
  ),
  "tag": (
    inverting_gradients.tag,
    "squared and absolute distance, Deng et al. 2021",
  ),
  "gradinversion": (
    inverting_gradients.gradinversion,
    "group consistency over starts, Yin et al. 2021",
  ),
  "deep_image_prior": (
    deep_image_prior.deep_image_prior,
    "weights of an untrained generator, Jeong et al. 2021",
  ),
  "analytic": (
    analytic.analytic,
    "quotients of a dense first layer, Phong et al. 2018",
  ),
  "rgap": (
    rgap.rgap,
    "recursive closed form, layer by layer, Zhu and Blaschko 2021",
  ),
  "learning_to_invert": (
    learning_to_invert.learning_to_invert,
    "a network trained on auxiliary images, Wu et al. 2023",
  ),
  "imprint": (
    imprint.imprint,
    "a malicious server's module in the model, Fowl et al. 2022",
  ),
  "map": (
    map_attack.maximum_a_posteriori,
    "likelihood of the payload and image prior, as Balunovic et al. 2022",
  ),
}

# Attacks of a server that changes the model, a stronger adversary than the
# honest-but-curious one of all others.
MALICIOUS = frozenset({"imprint"})


def make(
  name: str,
  model: Model,
  *,
  steps: int = 1,
  batch: int = 1,
  epochs: int = 1,
  auxiliary: np.ndarray | None = None,
  **params,
) -> AnyAttack:
  """Builds an attack by name.

  Args:
    name: one of `ATTACKS`.
    model: the classifier under attack; on a CPU `conv="slices"` is the fastest
      form for its second derivatives.
    steps: local steps of the observed clients in an epoch.
    batch: images in a step.
    epochs: passes over these steps.
    auxiliary: [images, height, width, channels] uint8, images of the training
      split that are disjoint from the attacked ones; ignored by attacks that
      have no use for them.
    **params: settings of the attack, by its constructor's keyword arguments.

  Raises:
    UserError: no such attack or setting.
  """
  if name not in ATTACKS:
    raise errors.unknown_name("attack", name, ATTACKS)
  constructor = ATTACKS[name][0]
  known = [
    p.name
    for p in inspect.signature(constructor).parameters.values()
    if p.kind is p.KEYWORD_ONLY
  ]
  if "auxiliary" in known:
    params["auxiliary"] = auxiliary
    known.remove("auxiliary")
  for param in params.keys() - {"auxiliary"}:
    if not known:
      raise errors.UserError(
        f"attack {name!r} takes no settings; {param!r} was given."
      )
    if param not in known:
      raise errors.unknown_name(f"setting of attack {name!r}:", param, known)
  return constructor(model, core.Work(steps, batch, epochs), **params)
