"""Models by name, with random weights and an input."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge._census import zoo
from bridge.weights import write_safetensors
from tests.bridge.census import models

HERE = "tests.bridge.census.models"


@pytest.fixture
def library(monkeypatch):
    """A library called timm, with two models."""
    fake = types.ModuleType("fake")
    fake.list_models = lambda: ["mobilenet_s", "mobilenet_l"]
    fake.create_model = lambda name, pretrained: models.small()
    monkeypatch.setitem(sys.modules, "fake", fake)
    monkeypatch.setitem(zoo.LIBRARIES, "timm", "fake")
    return fake


def made(name, **options):
    return zoo.make(name, **{"size": 16, "batch": 1, "seed": 0} | options)


def test_globs_are_expanded_and_each_model_is_named_once(library):
    found = zoo.expand(["timm:mobilenet_s", "timm:mobile*", f"{HERE}:small", "timm:mobilenet_l.some_weights"])
    assert found == ["timm:mobilenet_s", "timm:mobilenet_l", f"{HERE}:small", "timm:mobilenet_l.some_weights"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm:mobilenets", "timm has no such model; did you mean mobilenet_s"),
        ("timm:zzz", "timm has no such model$"),
        ("timm:resnet*", "none of the 2 models of timm matches it"),
        ("mobilenet_s", "expected timm:NAME, torchvision:NAME, transformers:FOLDER or package.module:factory"),
        ("timm:", "expected timm:NAME"),
    ],
)
def test_an_unknown_name_is_refused_before_the_work(name, message, library):
    with pytest.raises(ValueError, match=message):
        zoo.expand([name])


@pytest.mark.parametrize(
    "name, message",
    [
        ("tim:mobilenet_s", "'tim' cannot be imported: .*did you mean timm"),
        (f"{HERE}:smal", "has no function 'smal'; did you mean small"),
        (f"{HERE}:number", "returned a int, expected a torch.nn.Module, or one and its inputs"),
        ("transformers:nowhere", "expected a folder with a config.json; a name on the Hugging Face Hub needs"),
    ],
)
def test_what_is_no_model_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        made(name)


def test_a_library_that_fails_to_load_is_one_line_with_causes(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nat')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(zoo.LIBRARIES, "torchvision", "half_installed")
    with pytest.raises(ValueError, match=r"nms does not exist\. Likely causes.*another build of PyTorch") as caught:
        zoo.expand(["torchvision:mobilenet_v2"])
    assert "\n" not in str(caught.value)


def test_weights_and_input_come_from_the_seed_and_hide_nothing(library, seed):
    first, again, other = (made("timm:mobilenet_s", seed=each) for each in (seed, seed, seed + 1))
    assert np.array_equal(first.inputs, again.inputs) and first.inputs.shape == (1, 3, 16, 16)
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])
        assert not torch.equal(tensor, other.module.state_dict()[name])
    assert not first.module.training


def test_statistics_are_drawn_and_counters_and_constants_kept(seed):
    module = nn.Sequential(nn.BatchNorm2d(8))
    module.register_buffer("constant", torch.arange(3.0))
    zoo.draw_weights(module, np.random.default_rng(seed))
    norm = module[0]
    assert all(len(each.unique()) == 8 for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    assert norm.running_var.min() >= 0.5 and norm.running_var.max() <= 2
    assert module.constant.tolist() == [0, 1, 2] and norm.num_batches_tracked == 0


def test_a_users_function_gives_its_own_weights_and_inputs():
    subject = made(f"{HERE}:image")
    assert subject.inputs.shape == (1, 3, 16, 16) and subject.inputs.eq(1).all()
    assert made(f"{HERE}:small", size=20, batch=2).inputs.shape == (2, 3, 20, 20)


def test_random_numbers_of_the_process_are_left_alone(library):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    made("timm:mobilenet_s")
    assert torch.equal(torch.rand(3), expected)


def test_weights_of_a_file_are_loaded_whole(tmp_path, library):
    held = bridge.load_weights(models.small())
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, held)
    loaded = bridge.load_weights(made("timm:mobilenet_s", weights=path).module)
    assert all(np.array_equal(loaded[name], array) for name, array in held.items())
    missing = held.pop("3.weight")
    write_safetensors(path, held | {"4.weight": missing})
    with pytest.raises(ValueError, match=r"(?s)which does not fit.*Missing.*3\.weight.*Unexpected.*4\.weight"):
        made("timm:mobilenet_s", weights=path)


def test_a_model_takes_the_size_that_it_is_fixed_to(library):
    fixed = models.small()
    fixed.default_cfg = {"input_size": (3, 32, 32), "fixed_input_size": True}
    library.create_model = lambda name, pretrained: fixed
    assert made("timm:mobilenet_s", size=None).inputs.shape == (1, 3, 32, 32)
    fixed.default_cfg["fixed_input_size"] = False
    assert made("timm:mobilenet_s", size=None).inputs.shape == (1, 3, 224, 224)


def test_a_folder_of_transformers_is_made_offline(tmp_path, seed):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `models`)")
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, image_size=32)
    config.save_pretrained(tmp_path / "bare")
    subject = made(f"transformers:{tmp_path / 'bare'}", size=None, seed=seed)
    assert subject.inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert all(each.verdict.passes for each in bridge.census(*subject))
    subject.module.save_pretrained(tmp_path / "whole")
    held = bridge.load_weights(subject.module)
    loaded = bridge.load_weights(made(f"transformers:{tmp_path / 'whole'}", seed=seed + 1).module)
    assert loaded.keys() == held.keys()
    assert all(np.array_equal(loaded[name], array) for name, array in held.items())
