"""Tests of examples/train_classifier.py and examples/finetuning.py.

Run them with `python -m pytest examples/tests/test_train_classifier.py`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLORS, TINY, paint, save_tiny
from PIL import Image

import dinoreg

pytest.importorskip("tqdm")

import finetuning
import labeled
import train_classifier

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of three colors, in subfolders."""
    for name, color in COLORS.items():
        for i in range(10):
            paint(tmp_path / "images" / name / f"{i}.png", color, i)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    return save_tiny(TINY, tmp_path / "model.safetensors")


EXACT = "donot_use_mm_for_euclid_dist"  # small distances, too


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """Train on a folder, for fewer steps, and write mine.safetensors."""
    output = tmp_path / "mine.safetensors"
    monkeypatch.setattr(train_classifier, "HEAD_STEPS", 300)

    def train(folder, model, *options):
        return call(train_classifier.main, folder, "--model", model, "--output", output, *options)

    return train


def accuracies(stdout: str) -> dict[str, float]:
    """The percentages that are printed, by what has them."""
    rows = (line.split("%  ") for line in stdout.splitlines() if "%  " in line)
    return {kind: float(percent) for percent, kind in rows}


@pytest.mark.parametrize("layers", [1, 4])
def test_training_a_head_serves_the_folders_classes(train, folder, tmp_path, capsys, layers):
    model, output = (
        save_tiny(replace(TINY, depth=4), tmp_path / "model.safetensors"),
        tmp_path / "mine.safetensors",
    )
    result = train(folder, model, "--layers", layers)
    assert result.returncode == 0, result.stderr
    header, *lines, written = result.stdout.splitlines()
    assert header == f"accuracy on the 6 test images held out from {folder}:"
    assert all(" 100.0%  " in line for line in lines[1:]) and "taken for" not in result.stdout
    assert written == f"{output} written: python -m dinoreg IMAGE --model {output}"

    trained = dinoreg.load(output)
    assert trained.labels == ["blue", "green", "red"] and trained.layers == layers
    for key, tensor in dinoreg.load(model).state_dict().items():  # the backbone is as it was
        assert torch.equal(tensor, trained.backbone.state_dict()[key])
    red = paint(tmp_path / "unseen.png", COLORS["red"], 77)
    assert dinoreg.main([str(red), "--weights", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "red"


def test_training_a_head_twice_computes_features_once(train, monkeypatch, folder, model, tmp_path):
    seen, train_head = [], train_classifier.train_head
    monkeypatch.setattr(
        train_classifier,
        "train_head",
        lambda *arguments: seen.append(arguments) or train_head(*arguments),
    )
    output = tmp_path / "mine.safetensors"
    assert "30 computed, 0 from the cache" in train(folder, model).stderr
    first = dinoreg.load(output).state_dict()
    first = {key: tensor.clone() for key, tensor in first.items()}
    classifier = dinoreg.LinearClassifier(dinoreg.load(model), 3)
    with torch.inference_mode():
        x = torch.stack([dinoreg.preprocess(path, 16) for path in dinoreg.find_images([folder])])
        expected = classifier.linear_input(x)
    _, train_x, train_y, val_x, val_y = seen[0]
    for features, classes in [(train_x, train_y), (val_x, val_y)]:
        distances, nearest = torch.cdist(features, expected, compute_mode=EXACT).min(dim=1)
        assert distances.max() < 1e-3 and torch.equal(nearest // 10, classes)

    assert "0 computed, 30 from the cache" in train(folder, model).stderr
    second = dinoreg.load(output).state_dict()
    # The same seeds, the same head.
    assert all(torch.equal(first[key], second[key]) for key in first)
    paint(folder / "red" / "0.png", COLORS["red"], 60)
    assert "1 computed, 29 from the cache" in train(folder, model).stderr
    assert "30 computed" in train(folder, model, "--size", 20).stderr
    assert dinoreg.load(output).transform == dinoreg.Transform().at_size(20)
    save_tiny(TINY, model, 1)
    assert "30 computed" in train(folder, model).stderr
    assert "30 computed, 0 from the cache (no cache)" in train(folder, model, "--no-cache").stderr


def test_the_head_is_not_chosen_on_the_images_of_its_accuracy(train, monkeypatch, folder, model):
    seen, train_head = [], train_classifier.train_head
    monkeypatch.setattr(
        train_classifier,
        "train_head",
        lambda *arguments: seen.append(arguments) or train_head(*arguments),
    )
    assert "the 6 test images" in train(folder, model).stdout
    _, x, y, val_x, val_y = seen[0]
    assert y.bincount().tolist() == [6, 6, 6] and val_y.bincount().tolist() == [2, 2, 2]
    with torch.inference_mode():
        images = torch.stack(
            [dinoreg.preprocess(path, 16) for path in dinoreg.find_images([folder])]
        )
        features = dinoreg.LinearClassifier(dinoreg.load(model), 3).linear_input(images)
    used = [
        torch.cdist(part, features, compute_mode=EXACT).argmin(dim=1).tolist()
        for part in (x, val_x)
    ]
    assert len({*used[0], *used[1]}) == 24  # the other six are test images


def test_training_with_a_folder_of_test_images(train, folder, model, tmp_path):
    for i in range(4):  # three of the twelve are wrong
        paint(tmp_path / "test" / "red" / f"{i}.png", COLORS["red"], 70 + i)
        paint(tmp_path / "test" / "green" / f"{i}.png", COLORS["green"], 70 + i)
        paint(tmp_path / "test" / "blue" / f"{i}.png", COLORS["green" if i else "blue"], 70 + i)
    for options in ([], ["--knn"]):
        result = train(folder, model, "--test", tmp_path / "test", *options)
        assert result.returncode == 0, result.stderr
        assert f"accuracy on the 12 test images in {tmp_path / 'test'}:" in result.stdout
        kinds = accuracies(result.stdout)
        assert kinds["always blue"] == 33.3 and len(kinds) == 3
        assert [*kinds.values()][1:] == [75, 75]
        assert "   3 x  blue taken for green" in result.stdout
    (tmp_path / "test" / "blue").rename(tmp_path / "test" / "white")
    result = train(folder, model, "--test", tmp_path / "test")
    assert result.returncode == 2 and "'white' is not" in result.stderr


def test_the_accuracy_of_pixels_and_of_the_most_frequent_class(train, folder, model):
    for i in range(10):  # more red ones, and classes that pixels do not tell apart
        paint(folder / "red" / f"more{i}.png", COLORS["red"], 20 + i)
    kinds = accuracies(train(folder, model, "--knn").stdout)
    assert kinds["k-NN of 16 x 16 pixels"] == 100 and kinds["always red"] == 50
    for i in range(10):
        (folder / "blue" / f"{i}.png").write_bytes((folder / "green" / f"{i}.png").read_bytes())
    kinds = accuracies(train(folder, model, "--knn").stdout)
    assert 50 <= kinds["k-NN of 16 x 16 pixels"] < 100 and kinds["always red"] == 50


def test_the_accuracies_without_training_are_the_same_in_all_modes(train, folder, model):
    for color in COLORS:  # of noise, so that some votes are wrong
        for i in range(10):
            paint(folder / color / f"{i}.png", (128, 128, 128), len(color) * 100 + i)
    outputs = [train(folder, model, *options).stdout for options in ([], ["--knn"])]
    assert outputs[0].splitlines()[:3] == outputs[1].splitlines()[:3]
    assert 0 < accuracies(outputs[0])["k-NN of 16 x 16 pixels"] < 100


def test_training_leaves_out_bad_images(train, folder, model):
    (folder / "red" / "bad.jpg").write_text("no image")
    for computed in (31, 1):  # tried and reported again when the others come from the cache
        result = train(folder, model)
        assert result.returncode == 1, result.stderr
        assert f"31 images: {computed} computed" in result.stderr
        assert "bad.jpg: cannot identify" in result.stderr and "Traceback" not in result.stderr
        assert "the 6 test images" in result.stdout
        assert min([*accuracies(result.stdout).values()][1:]) == 100


def test_knn_votes_and_writes_nothing(folder, model, tmp_path):
    for i in range(4):  # green ones among the red, of which some may be held out
        paint(folder / "red" / f"odd{i}.png", COLORS["green"], 5 + i)
    output = tmp_path / "mine.safetensors"
    command = [sys.executable, HERE / "train_classifier.py", folder, "--knn"]
    command += ["--model", model, "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)  # as its users run it
    assert result.returncode == 0, result.stderr
    assert "no file is written" in result.stdout and not output.exists()
    right = accuracies(result.stdout)["k-NN of CLS tokens"]
    wrong = [line.strip() for line in result.stdout.splitlines() if "taken for" in line]
    assert wrong in ([], ["1 x  red taken for green"], ["2 x  red taken for green"])
    assert right == round(100 * (1 - (int(wrong[0].split()[0]) if wrong else 0) / 6), 1)


def test_knn_is_the_official_weighted_vote():
    torch.manual_seed(0)
    train, classes, queries = torch.randn(60, 5), torch.arange(60) % 3, torch.randn(1100, 5)
    for k in (1, 20, 100):
        expected = []
        for query in queries.double().numpy():
            rows = train.double().numpy()
            cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
            nearest = np.argsort(-cosines)[:k]
            weights = np.exp(cosines[nearest] / 0.07)
            expected.append(
                np.argmax([weights[classes.numpy()[nearest] == i].sum() for i in range(3)])
            )
        votes = labeled.vote(train, F.one_hot(classes).float(), queries, k)
        assert (votes.argmax(dim=1).numpy() == expected).mean() > 0.998


def test_the_best_of_several_heads_is_kept_as_if_each_had_its_own_optimizer(monkeypatch):
    monkeypatch.setattr(train_classifier, "HEAD_STEPS", 40)
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.eye(3, 32)[y] + 0.3 * torch.randn(90, 32)
    train_x, train_y, val_x, val_y = x[:60], y[:60], x[60:], y[60:]
    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(replace(TINY, embed_dim=16)), 3)
    torch.manual_seed(1)
    rate = train_classifier.train_head(model, train_x, train_y, val_x, val_y)

    torch.manual_seed(1)  # the same start and the same batches
    heads = torch.nn.Linear(32, 13 * 3)
    torch.nn.init.normal_(heads.weight, std=0.01)
    batches = [torch.randint(60, (128,)) for _ in range(40)]
    results = []
    for i, candidate in enumerate(train_classifier.LEARNING_RATES):
        head = torch.nn.Linear(32, 3)
        head.weight.data, head.bias.data = (
            heads.weight.data[3 * i : 3 * i + 3].clone(),
            torch.zeros(3),
        )
        optimizer = torch.optim.SGD(head.parameters(), lr=candidate * 128 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(head(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
            schedule.step()
        logits = head(val_x)
        right, loss = (
            (logits.argmax(dim=1) == val_y).sum().item(),
            F.cross_entropy(logits, val_y).item(),
        )
        results.append(((right, -loss), candidate, head))
    (right, _), expected_rate, head = max(results, key=lambda result: result[0])
    assert rate == expected_rate and right > results[0][0][0]
    torch.testing.assert_close(model.linear_head.weight, head.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.linear_head.bias, head.bias, atol=1e-5, rtol=1e-4)


def test_each_held_out_part_has_a_fifth_of_each_class():
    split, held_out = train_classifier.split, [train_classifier.VAL, train_classifier.TEST]
    classes = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    parts = split(["a", "b", "c"], classes, held_out)
    counts = [[(parts[classes == i] == part).sum().item() for i in range(3)] for part in range(3)]
    assert counts == [[30, 6, 1], [10, 2, 1], [10, 2, 1]]  # TRAIN, VAL, TEST
    assert torch.equal(parts, split(["a", "b", "c"], classes, held_out))
    parts = split(["a", "b", "c"], classes[:-1], held_out[1:])
    assert parts.bincount().tolist() == [62 - 13, 0, 13]
    with pytest.raises(ValueError, match="c: a class needs 3 or more"):
        split(["a", "b", "c"], classes[:-1], held_out)


def test_confusions_are_listed(capsys):
    y, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 2])
    train_classifier.report("it", y, predicted, ["a", "b", "c"])
    assert capsys.readouterr().out.splitlines() == [
        "   50.0%  it",
        "         2 x  a taken for b",
        "         1 x  b taken for a",
    ]


def test_random_crops_are_parts_of_the_image(tmp_path):
    def crop(path, numbers, flip, transform=None):
        transform = transform or dinoreg.Transform().at_size(28)
        return finetuning.random_crop(path, numbers, flip, transform)

    # Dark on the left, bright on the right.
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    left, right = (
        crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, x, 0.9]), True) for x in (0.0, 1.0)
    )
    mirrored = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), True)
    kept = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), False)
    assert left.shape == (3, 28, 28) and left.mean() < right.mean() - 1
    assert torch.equal(mirrored, left.flip(2)) and torch.equal(kept, left)
    whole = crop(tmp_path / "ramp.png", torch.tensor([1, 0.5, 0.0, 0.0, 0.9]), True)
    assert whole.max() - whole.min() > 1.3 * (left.max() - left.min())
    wide = dinoreg.Transform(resize=(28, 56), crop=None)
    whole = crop(tmp_path / "ramp.png", torch.tensor([1, 0.5, 0, 0, 0.9]), True, wide)
    assert whole.shape == (3, 28, 56)


def test_finetuning_trains_the_backbone(train, folder, model, tmp_path):
    result = train(folder, model, "--finetune", "--epochs", 3)
    assert result.returncode == 0, result.stderr
    assert accuracies(result.stdout)["fine-tuned, 3 epochs"] == 100
    assert "fine-tuning: 6 steps, about 0 min" in result.stdout
    before, after = dinoreg.load(model).state_dict(), dinoreg.load(tmp_path / "mine.safetensors")
    assert after.labels == ["blue", "green", "red"] and after.backbone.config.drop_path_rate == 0.1
    moved = {
        i: (after.backbone.blocks[i].mlp.fc1.weight - before[f"blocks.{i}.mlp.fc1.weight"])
        .abs()
        .mean()
        .item()
        for i in range(3)
    }
    assert 0 < moved[0] < moved[1] < moved[2]  # the early blocks less


def test_earlier_layers_have_lower_learning_rates():
    groups = finetuning.parameter_groups
    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(TINY), 3)
    found = {id(p): group for group in groups(model, lr=1.0, decay=0.5) for p in group["params"]}
    assert found.keys() == {id(p) for p in model.parameters()}
    for parameter, lr, weight_decay in [
        (model.linear_head.weight, 1, 0.05),
        (model.linear_head.bias, 1, 0),
        (model.backbone.norm.weight, 1, 0),
        (model.backbone.blocks[2].attn.qkv.weight, 1 / 2, 0.05),
        (model.backbone.blocks[0].ls1.gamma, 1 / 8, 0),
        (model.backbone.patch_embed.proj.weight, 1 / 16, 0.05),
        (model.backbone.pos_embed, 1 / 16, 0),
        (model.backbone.register_tokens, 1 / 16, 0),
    ]:
        group = found[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)


def test_errors_of_training_are_one_line(train, folder, model, tmp_path):
    for name in (
        "empty",
        "single/red",
        "few/red",
        "few/blue",
        "test/red",
        "test/green",
        "test/blue",
    ):
        (tmp_path / name).mkdir(parents=True)
    paint(tmp_path / "single" / "red" / "0.png", COLORS["red"])
    for i in range(3):
        paint(tmp_path / "few" / "red" / f"{i}.png", COLORS["red"], i)
        paint(tmp_path / "bad" / "red" / f"{i}.png", COLORS["red"], i)
    for i in range(2):
        paint(tmp_path / "few" / "blue" / f"{i}.png", COLORS["blue"], i)
        paint(tmp_path / "bad" / "blue" / f"{i}.png", COLORS["blue"], i)
    (tmp_path / "bad" / "blue" / "2.png").write_text("no image")
    (tmp_path / "taken.safetensors").mkdir()
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "two or more subfolders are needed"),
        ([tmp_path / "single"], "two or more subfolders are needed"),
        ([tmp_path / "few"], "blue: a class needs 3 or more images that can be read; there are 2"),
        ([tmp_path / "bad"], "blue: a class needs 3 or more images that can be read; there are 2"),
        ([folder, "--test", tmp_path / "nowhere"], "no such folder"),
        ([folder, "--test", tmp_path / "single"], "1 subfolders, but the model has 3 classes"),
        ([folder, "--test", tmp_path / "test"], "no image in its subfolders can be read"),
        ([folder, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([folder, "--size", "15"], "15 x 15 pixels are not multiples of 4"),
        ([folder, "--layers", "4"], "--layers must be at most 3"),
        (
            [folder, "--output", tmp_path / "nowhere" / "x.safetensors"],
            "a folder that is writable",
        ),
        ([folder, "--output", "."], "must be a .safetensors file"),
        ([folder, "--output", ""], "must not be empty"),
        ([folder, "--output", tmp_path / "taken.safetensors"], "must be a .safetensors file"),
        ([folder, "--output", model], "is the file of the model"),
        ([folder, "--knn", "--finetune"], "not allowed with argument --knn"),
    ]:
        first, *options = arguments
        result = train(first, model, *options)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, (
            result.stderr
        )
        assert not (tmp_path / "mine.safetensors").exists()


def test_the_images_of_a_model_that_returns_nan_are_reported(train, folder, tmp_path):
    model = dinoreg.DinoVisionTransformer(TINY)
    model.norm.bias.data[0] = float("nan")
    model.transform = dinoreg.Transform().at_size(16)
    dinoreg.save(model, tmp_path / "nan.safetensors")
    result = train(folder, tmp_path / "nan.safetensors")
    lines = result.stderr.splitlines()
    *images, last = [line for line in lines if line.startswith("train_classifier: ")]
    assert result.returncode == 2 and len(images) == 30 and "there are 0" in last
    assert all("the model returns NaN or infinity" in line for line in images)


def test_a_loss_of_nan_ends_fine_tuning(folder):
    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(TINY), 3)
    model.backbone.transform = dinoreg.Transform().at_size(16)
    model.linear_head.bias.data[0] = float("nan")
    paths = dinoreg.find_images([folder])
    with pytest.raises(ValueError, match="the loss of fine-tuning is NaN"):
        finetuning.finetune(model, paths, torch.arange(30) // 10, epochs=1)


def test_devices_with_an_index(train, folder, model):
    options = ["--finetune", "--epochs", "1", "--device", "cpu:0"]
    result = train(folder, model, *options)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_class_names_that_cannot_be_printed(train, folder, model, tmp_path):
    """They are escaped in the output; the file has them as they are, and evaluate.py finds them."""
    for name, new in ((b"red", b"\xff"), (b"green", b"\x1b]0;x\x07")):
        os.rename(os.fsencode(folder) + b"/" + name, os.fsencode(folder) + b"/" + new)
    paint(folder / os.fsdecode(b"\xff") / "odd.png", COLORS["blue"])
    for options in ([], ["--knn"]):
        result = train(folder, model, *options)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr and "\udcff" not in result.stdout
        assert "always \\udcff" in result.stdout
    labels = dinoreg.load(tmp_path / "mine.safetensors").labels
    assert labels == ["\x1b]0;x\x07", "blue", "\udcff"]
    assert len(labeled.find_labeled(folder, labels)) == 31
