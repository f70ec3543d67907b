"""The little language of flags."""

import pytest

from mpqfl_jax import errors, specs


@pytest.mark.parametrize(
  "text, items",
  [
    ("none", ["none"]),
    ("none, prune(ratio=0.9)", ["none", "prune(ratio=0.9)"]),
    ("a(x=1,y=2),b", ["a(x=1,y=2)", "b"]),
    ("", []),
    ("a,,b,", ["a", "b"]),
    ("a(x=(1,2)),b", ["a(x=(1,2))", "b"]),
  ],
)
def test_split(text, items):
  assert specs.split(text) == items


@pytest.mark.parametrize(
  "text, name, params",
  [
    ("none", "none", {}),
    ("prune(ratio=0.9)", "prune", {"ratio": 0.9}),
    ("qsgd(levels=4, norm=max)", "qsgd", {"levels": 4, "norm": "max"}),
    ("f(a=True,b='x y')", "f", {"a": True, "b": "x y"}),
    ("f(a=true,b=false,c=trued)", "f", {"a": True, "b": False, "c": "trued"}),
    ("policy/mine.toml", "policy/mine.toml", {}),
  ],
)
def test_parse(text, name, params):
  assert specs.parse(text) == (name, params)


@pytest.mark.parametrize(
  "text", ["f(", "f(a)", "f(a=)", "(a=1)", "f(a=1,a=2)", "f(1=2)", "f)a("]
)
def test_what_cannot_be_read_says_what_was_expected(text):
  with pytest.raises(errors.UserError, match="Expected"):
    specs.parse(text)


def test_call_names_wrong_and_missing_parameters():
  def build(first, ratio, levels=2):
    return first, ratio, levels

  assert specs.call("codec f", build, {"ratio": 1}, "x") == ("x", 1, 2)
  with pytest.raises(errors.UserError, match="Did you mean 'ratio'"):
    specs.call("codec f", build, {"ratios": 1}, "x")
  with pytest.raises(errors.UserError, match="needs ratio"):
    specs.call("codec f", build, {"levels": 1}, "x")
  with pytest.raises(errors.UserError, match="plan auto takes no parameters"):
    specs.call("plan auto", lambda: None, {"conv": "xla"})
