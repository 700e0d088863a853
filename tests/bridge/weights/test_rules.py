"""Rules: patterns that work both ways, and never two answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.weights import ARCHITECTURES, KINDS, Rule
from bridge.weights.architectures import looks_like
from bridge.weights.layouts import LAYOUTS
from bridge.weights.rules import RuleBook

PATTERNS = [
    ("conv", "stem", "conv", "stem"),
    ("", "", "", ""),
    ("layer{i}.conv", "blocks.{i}", "layer3.conv", "blocks.3"),
    ("features.{i+1}.conv", "blocks.{i}.conv", "features.1.conv", "blocks.0.conv"),
    ("layers.{i}", "blocks.{i+2}", "layers.0", "blocks.2"),
    ("{stage}.{b-1}", "s{stage}.b{b}", "1.2", "s1.b3"),
    ("{name}.weight_v", "{name}.v", "encoder.weight_v", "encoder.v"),
    ("a.b", "c", "a.b", "c"),
]


@pytest.mark.parametrize("torch, flax, torch_path, flax_path", PATTERNS)
def test_a_rule_works_both_ways(torch, flax, torch_path, flax_path):
    rule = Rule(torch, flax, "conv")
    assert (rule.to_flax(torch_path), rule.to_torch(flax_path)) == (flax_path, torch_path)


@pytest.mark.parametrize(
    "torch, path",
    [
        ("a.b", "axb"),
        ("layer{i}", "layer1.2"),
        ("{i+1}", "0"),
        ("{i+1}", "x"),
        ("{i}", ""),
        ("conv", "conv2"),
        ("conv", "a.conv"),
        ("{i+1}", "\u00b2"),
    ],
)
def test_a_rule_is_silent_about_other_paths(torch, path):
    assert Rule(torch, torch.replace("+1", ""), "conv").to_flax(path) is None


@given(st.integers(0, 10**6), st.integers(-9, 9))
def test_a_shift_is_undone_by_the_way_back(number, shift):
    rule = Rule(f"x.{{i{shift:+}}}.y", "z.{i}", "conv")
    path = rule.to_torch(f"z.{number}")
    assert path == (f"x.{number + shift}.y" if number + shift >= 0 else None)
    assert path is None or rule.to_flax(path) == f"z.{number}"


@pytest.mark.parametrize(
    "torch, flax, kind, message",
    [
        ("a", "b", "convolution", "`kind` is 'convolution', expected one of conv, linear"),
        ("a.{i}", "b", "conv", "expected the same places in braces in both"),
        ("a.{i}", "b.{j}", "conv", "expected the same places in braces in both"),
        ("a.{i}.{i}", "b.{i}", "conv", "occurs 3 times.*expected once in each"),
    ],
)
def test_a_rule_that_cannot_work_both_ways_is_refused(torch, flax, kind, message):
    with pytest.raises(ValueError, match=message):
        Rule(torch, flax, kind)


@pytest.mark.parametrize("kind", [*KINDS, "depthwise_transpose:2:flipped"])
def test_every_parameter_of_every_kind_finds_its_way_back(kind):
    book = RuleBook([Rule("net.{i+1}", "blocks.{i}", kind)])
    for leaf, entry in KINDS[kind].items():
        name = f"net.3.{leaf}".rstrip(".")
        (place,) = book.from_torch(name)
        if entry is None:
            assert place.flax is None
        else:
            (back,) = book.from_flax(place.flax)
            assert (back.torch, back.layout) == (name, place.layout)


def test_two_rules_that_agree_are_one_answer_and_two_that_do_not_are_two():
    agreeing = [Rule("a.{i}", "b.{i}", "conv"), Rule("a.1", "b.1", "conv")]
    assert [place.flax for place in RuleBook(agreeing).from_torch("a.1.weight")] == ["b.1.kernel"]
    opposed = [*agreeing, Rule("a.1", "c", "conv")]
    assert {place.flax for place in RuleBook(opposed).from_torch("a.1.weight")} == {"b.1.kernel", "c.kernel"}


def test_rules_that_agree_on_the_place_and_not_on_the_axes_are_two_answers():
    book = RuleBook([Rule("a", "b", "linear"), Rule("a", "b", "conv")])
    assert len(book.from_torch("a.weight")) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_rules_of_an_architecture_are_one_to_one(name):
    rules = ARCHITECTURES[name].rules()
    assert len({rule.torch for rule in rules}) == len({rule.flax for rule in rules}) == len(rules)


@pytest.mark.parametrize("name", [*LAYOUTS, "CM* -> *1(CM), M=2, flipped"])
@given(shape=st.lists(st.integers(0, 4), min_size=0, max_size=5))
def test_a_layout_is_undone_by_its_inverse(name, shape):
    layout = LAYOUTS[name]
    flax = layout.flax_shape(tuple(shape))
    assert flax is None or layout.fits_flax(flax)


@pytest.mark.parametrize(
    "names, family",
    [
        (["layer1.0.conv1.weight"], "a ResNet"),
        (["features.denseblock1.denselayer1.conv1.weight"], "a DenseNet"),
        (["features.0.weight", "classifier.6.weight"], "a VGG or AlexNet"),
        (["blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["stages.0.blocks.0.conv_dw.weight"], "a ConvNeXt"),
        (["stem.conv.kernel"], "a checkpoint of Flax"),
        (["x"], None),
        ([], None),
    ],
)
def test_a_foreign_checkpoint_is_told_by_its_names(names, family):
    assert looks_like(names) == family
