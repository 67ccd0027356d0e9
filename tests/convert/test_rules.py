"""Rules: what a pattern means, and the changes against formulas of their own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rendseg.convert import ConversionError
from rendseg.convert.rules import FOLD, KEY, MERGE, QUERY, TRANSPOSE, VALUE, apply, matched, renamed, split


@pytest.mark.parametrize(
    "theirs, ours, name, wanted",
    [
        ("a.{i}.*", "b{i+2}.*", "a.0.conv.weight", "b2.conv.weight"),
        ("a.{i}", "b{5-i}", "a.3", "b2"),
        ("a.{i}", "b{5-i}", "a.6", None),
        ("a{i+2}", "b.{i}", "a1", None),
        ("a{i+2}", "b.{i}", "a4", "b.2"),
        ("r{s}_{i}.*", "r.{i}.{s}.*", "r1_20.w", "r.20.1.w"),
        ("a.*", "b.*", "xa.w", None),
        ("a.w", "b.w", "axw", None),
        ("*._tmp", "x", "q.w._tmp", "x"),
    ],
)
def test_patterns(theirs, ours, name, wanted):
    found = renamed([(theirs, ours)], name)
    assert (found and found[0]) == wanted
    if wanted is not None and "*" in ours:
        assert renamed([(ours, theirs)], wanted)[0] == name


def test_the_first_rule_that_fits_is_taken():
    assert renamed([("a.norm.*", "n.*"), ("a.*", "c.*")], "a.norm.w")[0] == "n.w"
    assert matched("a.{i}", "a.1234567") is None


def test_swin_merges_cells_in_the_other_order():
    x = torch.randn(2, 3, 4, 6)  # N C H W
    weight = torch.randn(5, 12)
    theirs = F.linear(F.unfold(x, 2, stride=2).transpose(1, 2), weight)
    cells = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    ours = torch.cat(cells, 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(ours, MERGE.there(weight)), theirs)
    assert torch.equal(MERGE.back(MERGE.there(weight)), weight)


def test_a_bias_before_a_norm_is_folded_into_its_mean():
    x, w, b = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1), torch.randn(5)
    mean, var = torch.randn(5), torch.rand(5) + 0.5
    state = {"c.weight": w, "c.bias": b, "n.running_mean": mean, "n.running_var": var}
    rules = [("c.weight", "m.weight"), ("c.bias", "m.mean", FOLD), ("n.running_mean", "m.mean"), ("n.*", "m.*")]
    ours = apply(rules, (), state, "file").tensors
    wanted = F.batch_norm(F.conv2d(x, w, b), mean, var)
    torch.testing.assert_close(F.batch_norm(F.conv2d(x, ours["m.weight"]), ours["m.mean"], var), wanted)


def test_joined_and_transposed_tensors_come_back():
    rules = [(f"{n}.*", "qkv.*", c) for n, c in (("q", QUERY), ("k", KEY), ("v", VALUE))] + [("l", "l", TRANSPOSE)]
    state = {"q.w": torch.zeros(2, 3), "k.w": torch.ones(2, 3), "v.w": torch.full((2, 3), 2.0), "l": torch.rand(2, 5)}
    ours = apply(rules, (), state, "file")
    assert ours.tensors["qkv.w"][:, 0].tolist() == [0, 0, 1, 1, 2, 2] and ours.tensors["l"].shape == (5, 2)
    back = split(rules, ours.tensors, "file")
    assert not back.left and all(torch.equal(back.tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.bad_input
def test_what_does_not_fit_is_named():
    left = apply([("a", "b")], ["d.*"], {"a": torch.zeros(1), "c": torch.zeros(1), "d.x": torch.zeros(1)}, "file")
    assert left.left == ["c"] and left.dead == ["d.x"]
    with pytest.raises(ConversionError, match="a part of qkv.w is missing"):
        apply([("q.*", "qkv.*", QUERY)], (), {"q.w": torch.zeros(2, 3)}, "file")
    with pytest.raises(ConversionError, match="two tensors are b"):
        apply([("a", "b"), ("c", "b")], (), {"a": torch.zeros(1), "c": torch.zeros(1)}, "file")
    with pytest.raises(ConversionError, match="unexpected shape"):
        apply([("a", "b", MERGE)], (), {"a": torch.zeros(7)}, "file")
