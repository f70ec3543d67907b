"""Rules, policies, policy files and tables."""

import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config
from mpqfl_jax import choice, models, policy, precision, quantize
from mpqfl_jax.errors import UserError
from mpqfl_jax.policy import QuantRule

PARAMS = {
  f"conv{i}": {"bias": jnp.zeros(4), "kernel": jnp.zeros((3, 3, 4, 4))}
  for i in (1, 2, 10)
} | {"dense1": {"bias": jnp.zeros(10), "kernel": jnp.zeros((36, 10))}}


def rules_of(codec, key=0, update=None):
  update = precision_update() if update is None else update
  payload, _ = codec.encode(jax.random.key(key), update, codec.init(PARAMS))
  return {record.path: record.rule for record in codec.records(payload)}


def precision_update():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), PARAMS
  )


def test_layers_count_numbers_as_numbers():
  assert policy.layers(PARAMS) == ["conv1", "conv2", "conv10", "dense1"]


def test_paper_takes_turns():
  rules = rules_of(precision.make("paper", PARAMS))
  turns = {
    "conv1": "float16 nearest",
    "conv2": "int8 affine nearest",
    "conv10": "int8 symmetric nearest",
    "dense1": "int4 affine nearest",
  }
  assert rules == {
    f"{layer}/{leaf}": rule
    for layer, rule in turns.items()
    for leaf in ("bias", "kernel")
  }


def test_mixed_random_draws_from_given_bits():
  codec = precision.make("mixed_random", PARAMS, bits=(2, 4))
  payload, _ = codec.encode(
    jax.random.key(1), precision_update(), codec.init(PARAMS)
  )
  rules = " ".join(record.rule for record in codec.records(payload))
  assert "int2" in rules and "int4" in rules
  assert "float16" not in rules and "int8" not in rules
  with pytest.raises(UserError, match=r"bits=\(2,4,6\)"):
    precision.make("mixed_random", PARAMS, bits=4)


@pytest.mark.parametrize("name", ["precision", "mode", "both"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_policies_of_the_ablation_have_the_bytes_of_int4(name, shape):
  net = models.make("lenet_zhu", shape, 10, np.zeros(1), np.ones(1), "xla")
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(net.init, jax.random.key(0)),
  )

  def size(spec):
    codec = precision.make(spec, zeros)
    payload, _ = codec.encode(jax.random.key(0), zeros, codec.init(zeros))
    return len(codec.pack(payload))

  policy = config.FLAGS_DIR.parent / "policies" / f"mixed_{name}.toml"
  assert 0.95 < size(str(policy)) / size("int4") < 1.005


def test_mixed_random_draws_evenly_and_anew():
  codec = precision.make("mixed_random", PARAMS)
  encode = jax.jit(codec.encode)
  update = precision_update()
  picks = np.array(
    [
      [
        int(part["choice"])
        for part in encode(jax.random.key(round_), update, codec.init(PARAMS))[
          0
        ]
      ]
      for round_ in range(400)
    ]
  )
  assert encode._cache_size() == 1
  assert len({tuple(row) for row in picks}) > 390
  # 3200 draws from four: chi-square at one in a million is 30.7.
  counts = np.bincount(picks.reshape(-1), minlength=4)
  assert ((counts - 800) ** 2 / 800).sum() < 30.7
  for leaf in range(picks.shape[1]):
    assert np.bincount(picks[:, leaf], minlength=4).min() > 55
  # No leaf follows another.
  for a in range(7):
    joint = np.histogram2d(picks[:, a], picks[:, a + 1], bins=4)[0]
    assert ((joint - 25) ** 2 / 25).sum() < 60


def test_first_match_wins():
  codec = precision.from_rules(
    "mine",
    [
      QuantRule("*/bias", "float16"),
      QuantRule("conv1", "int2", {"mode": "affine"}),
      QuantRule("conv*", "int8", {"granularity": "channel"}),
      QuantRule("*", "topk", {"ratio": 0.1}),
    ],
    PARAMS,
  )
  assert rules_of(codec) == {
    "conv1/bias": "float16 nearest",
    "conv1/kernel": "int2 affine nearest",
    "conv10/bias": "float16 nearest",
    "conv10/kernel": "int8 symmetric nearest per channel",
    "conv2/bias": "float16 nearest",
    "conv2/kernel": "int8 symmetric nearest per channel",
    "dense1/bias": "float16 nearest",
    "dense1/kernel": "topk ratio=0.1",
  }


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("conv*", "int8")], "no rule matches 'dense1/bias'"),
    ([("conv9", "int8"), ("*", "int8")], "rule 1 .*'conv9'.* no parameter"),
    ([("*", "int8"), ("conv1", "int4")], "rule 2 .*'conv1'"),
    ([("*", "int12")], "unknown precision 'int12'"),
    ([("*", "flaot16")], "Did you mean 'float16'"),
  ],
)
def test_bad_rules(rules, message):
  with pytest.raises(UserError, match=message):
    precision.from_rules("mine", [QuantRule(*rule) for rule in rules], PARAMS)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("int88", {}, "Did you mean 'int8'"),
    ("int8", {"mod": "affine"}, "Did you mean 'mode'"),
    ("int8", {"mode": "afine"}, "expected one of symmetric, affine"),
    ("paper", {"mode": "affine"}, "unknown option of paper"),
    ("mixed_random", {"rounding": "dither"}, "rounding"),
    ("topk", {"error_feedback": 3}, "error_feedback"),
    ("randomk", {"ratio": 1e-8}, "at least 2"),
    ("missing.toml", {}, "the policy file missing.toml: No such file"),
    ("missing.toml", {"mode": "affine"}, "takes no options"),
  ],
)
def test_bad_names_and_options(name, options, message):
  with pytest.raises(UserError, match=message):
    precision.make(name, PARAMS, **options)


def test_shapes_do_for_parameters():
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS
  )
  update = precision_update()
  for name in ("paper", "mixed_random", "sign"):
    a = precision.make(name, PARAMS)
    b = precision.make(name, shapes)
    payload, _ = a.encode(jax.random.key(0), update, a.init(PARAMS))
    b.unpack(a.pack(payload))


def test_every_codec_says_what_it_is():
  for name, (what, build) in precision.CODECS.items():
    assert what and callable(build), name


def test_policy_file(tmp_path):
  path = tmp_path / "mine.toml"
  path.write_text(
    '[[rule]]\npath = "conv*"\nprecision = "int4"\nmode = "affine"\n'
    'granularity = "channel"\nrounding = "stochastic"\n\n'
    '[[rule]]\npath = "*"\nprecision = "topk"\nratio = 0.1\n'
  )
  rules = rules_of(precision.make(str(path), PARAMS))
  assert rules["conv1/kernel"] == "int4 affine stochastic per channel"
  assert rules["dense1/kernel"] == "topk ratio=0.1"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", r"expected \[\[rule\]\]"),
    ("[[rule]]\n", r'rule 1 has no path. Expected path = "conv\*"'),
    ('[[rule]]\npath = "*"\nprecision = 8\n', "precision is 8 and must be"),
    (
      '[[rule]]\npath = "*"\nprecison = "int4"\n',
      r"mine.toml, rule 1: unknown key 'precison'. Did you mean 'precision'\?",
    ),
    (
      '[[rule]]\npath = "conv1"\nprecision = "int8"\n'
      '[[rule]]\npath = "*"\nprecision = "int44"\n',
      r"mine.toml, rule 2: unknown precision 'int44'. Did you mean 'int4'\?",
    ),
    (
      '[[rule]]\npath = "*"\nprecision = "int4"\nmode = "afine"\n',
      "mine.toml, rule 1: mode='afine': expected one of",
    ),
    ('name = "x"\n[[rule]]\npath = "*"\nprecision = "int8"\n', "'name'"),
    ("[[rule\n", "mine.toml"),
    ("rule = [1]\n", "rule 1"),
    ('[[rule]]\npath = "*"\nprecision = "int8"\nbits = 3\n', "option of int8"),
  ],
)
def test_bad_policy_files(tmp_path, text, message):
  path = tmp_path / "mine.toml"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    precision.make(str(path), PARAMS)


def test_table_by_hand():
  params = {"conv1": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}}
  update = {
    "conv1": {
      "bias": jnp.zeros(2),
      "kernel": jnp.array([[7.0, 0.0], [0.0, 0.4]]),
    }
  }
  codec = precision.make("int4", params)
  # 0.4 is lost of an energy of 49.16: 10 log10(49.16 / 0.16) = 24.9 dB.
  lines = precision.table(codec, update, jax.random.key(0)).splitlines()
  rule = ["int4", "symmetric", "nearest"]
  assert [line.split() for line in lines] == [
    ["layer", "parameters", "rule", "bits", "bytes", "SNR", "dB"],
    ["conv1/bias", "2", *rule, "24.00", "6", "exact"],
    ["conv1/kernel", "4", *rule, "14.00", "7", "24.9"],
    ["message", "6", "33.33", "25", "24.9"],
  ]


@pytest.mark.parametrize("module", [precision, quantize])
def test_examples_in_the_docs(module):
  result = doctest.testmod(module)
  assert result.attempted > 2 and result.failed == 0


def test_choices_hold_what_a_byte_can_code():
  with pytest.raises(UserError, match="int16"):
    choice.menu([choice.Option("int16")])


def test_a_codec_as_an_optax_transformation():
  """One link of a chain gives what encoding and decoding by hand gives."""
  params = {"a": jnp.linspace(-1, 1, 40), "b": jnp.ones((3, 2))}
  random = precision.make("int3", params, rounding="stochastic")
  fed_back = precision.make("sign", params, error_feedback=True)
  key = jax.random.key(3)
  for codec in (random, fed_back):
    link = precision.transformation(codec, key)
    state, held = link.init(params), codec.init(params)
    step = jax.jit(link.update)
    for number in range(3):
      found, state = step(params, state)
      sent, held = codec.encode(jax.random.fold_in(key, number), params, held)
      chex.assert_trees_all_close(found, codec.decode(sent), rtol=1e-6)
    assert int(state.steps) == 3
