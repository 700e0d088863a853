"""`jaxdw model`, and the images that it takes."""

import json

import numpy as np
import pytest
import typer.testing

from bridge import cli
from bridge.model.originals import DEVIATION, MEAN, architecture_of, random_images, read_image
from bridge.weights import write_safetensors
from tests.references import reference, torchvision

RUNNER = typer.testing.CliRunner()


def test_a_checkpoint_and_an_image_are_compared(tmp_path, seed, full):
    if not full:
        pytest.skip("a whole model: full runs only")
    torchvision()
    state = {n: t.numpy() for n, t in reference("torchvision.mobilenet_v2", classes=6, width=0.25).state_dict().items()}
    write_safetensors(tmp_path / "weights.safetensors", state)
    np.save(tmp_path / "image.npy", random_images(32, seed)[0])
    words = ["model", "mobilenet_v2", "--width", "0.25"]
    for option, name in (("--weights", "weights.safetensors"), ("--image", "image.npy"), ("--json", "out.json")):
        words += [option, str(tmp_path / name)]
    result = RUNNER.invoke(cli.app, [*words, "--html", str(tmp_path / "out.html")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["logits"]["classes"] == 6 and report["images"] == [1, 32, 32, 3]


def test_the_library_is_the_one_that_the_names_tell():
    assert architecture_of("mobilenet_v1").name == "timm.mobilenet_v1"
    weights = {"mobilenet_v2.conv_stem.first_conv.convolution.weight": np.zeros((8, 3, 3, 3), np.float32)}
    assert architecture_of("mobilenet_v2", weights).name == "transformers.mobilenet_v2"
    with pytest.raises(ValueError, match="`network` is 'resnet18', expected one of mobilenet_v2"):
        architecture_of("resnet18")


def test_bytes_are_normalized_and_floats_are_not(tmp_path):
    path = tmp_path / "image.npy"
    np.save(path, np.full((4, 5, 3), 255, np.uint8))
    white = (1 - MEAN) / DEVIATION
    assert read_image(path).shape == (1, 4, 5, 3) and (read_image(path) == white).all()
    floats = np.random.default_rng(0).random((2, 4, 5, 3), np.float32)
    np.save(path, floats)
    assert (read_image(path) == floats).all()


def test_a_picture_is_scaled_and_its_middle_cut_out(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[:, 256:] = 255
    image.fromarray(picture).save(tmp_path / "picture.png")
    found = read_image(tmp_path / "picture.png")
    assert found.shape == (1, 224, 224, 3)
    black, white = -MEAN / DEVIATION, (1 - MEAN) / DEVIATION
    assert (found[0, :, :112] == black).all() and (found[0, :, 112:] == white).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "it does not exist"),
        (np.zeros((4, 5)), r"of shape \(4, 5\), expected \(H, W, 3\)"),
        (np.zeros((4, 5, 3), np.int64), "of int64, expected floats, or uint8"),
    ],
)
def test_unusable_images_are_refused(tmp_path, content, said):
    path = tmp_path / "image.npy"
    if content is not None:
        np.save(path, content)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"`image` is .*{said}"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("narrow.png", (1, 65500), "of 1x65500, which is 256x16768000 where its shorter side is 256"),
        ("vectors.eps", (40, 50), "expected an .npy file or one of JPEG, PNG"),  # Pillow would start a program
        ("text.png", None, "expected an .npy file or one of JPEG, PNG"),
    ],
)
def test_unusable_pictures_are_refused(tmp_path, name, size, said):
    image = pytest.importorskip("PIL.Image")
    if size is None:
        (tmp_path / name).write_text("no picture")
    else:
        image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"`image` is .*{said}"):
        read_image(tmp_path / name)
