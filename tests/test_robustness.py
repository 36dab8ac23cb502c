"""Any input ends in a result or in one error message: unusual images, hostile files, models that a
file cannot hold, full disks, killed and concurrent processes, closed streams; fuzzing.

`DINOREG_FUZZ=100000 python -m pytest -k fuzz` mutates as many files.
"""

import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from PIL import Image
from torch import nn

import convert_weights
import dinoreg
from dinoreg import DinoVisionTransformer, LinearClassifier, Transform, preprocess
from test_dinoreg import (
    DIGIT_IMAGES,
    DIGITS,
    HERE,
    HUB_BACKBONE,
    HUB_CONFIG,
    HUB_HEADS,
    SMALL,
    TINY,
    assert_same,
    picture,
    pixels,
    randomise,
    randomised,
    rewrite,
    run,
    saved,
    tiny_classifier,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# Processes of a server that has imported this module, for pytest is not to be forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def start(function, *arguments) -> tuple[multiprocessing.Process, Connection]:
    """A process that calls a function, and what receives the result."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=call, args=(sender, function, arguments))
    process.start()
    sender.close()
    return process, receiver


def call(sender: Connection, function, arguments) -> None:
    sender.send(function(*arguments))


def in_a_process(function, *arguments):
    """The result of a function in another process. Raises EOFError if it dies."""
    process, receiver = start(function, *arguments)
    assert receiver.poll(120)
    result = receiver.recv()
    process.join(60)
    return result


# --------------------------------------------------------------------------------------------------
# Images of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 280), (280, 1))


def ramp(white: float, dtype: str) -> bytes:
    return levels(white).astype(dtype).tobytes()


def levels(white: float) -> np.ndarray:
    return RAMP if white == 1 else (RAMP * white).round()


def packed_12_bits() -> bytes:
    a, b = levels(4095).astype(np.uint32).reshape(280, -1, 2).transpose(2, 0, 1)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()


def tiff(data: bytes, bits: int, *tags: tuple[int, int]) -> bytes:
    """A gray TIFF file of 280 x 280 pixels with more tags: (number, value)."""
    values = {256: 280, 257: 280, 258: bits, 259: 1, 262: 1, 273: None, 277: 1, 278: 280}
    values |= {279: len(data), **dict(tags)}
    start = 8 + 2 + 12 * len(values) + 4
    content = b"II*\0" + struct.pack("<IH", 8, len(values))
    for number, value in sorted(values.items()):
        content += struct.pack("<HHII", number, 4, 1, start if value is None else value)
    return content + struct.pack("<I", 0) + data


SIGNED, FLOAT, WHITE_IS_ZERO = (339, 2), (339, 3), (262, 0)
BITS, MAX_SAMPLE_VALUE = 258, 281
DEEP_FILES = {
    "PNG of 16 bits": lambda: file_of(levels(65535).astype(np.uint16), "PNG"),
    "JPEG 2000 of 16 bits": lambda: file_of(levels(65535).astype(np.uint16), "JPEG2000"),
    "PGM of 16 bits": lambda: b"P5 280 280 65535\n" + ramp(65535, ">u2"),
    "PGM of 12 bits": lambda: b"P5 280 280 4095\n" + ramp(4095, ">u2"),
    "TIFF of 12 bits": lambda: tiff(packed_12_bits(), 12),
    "TIFF of 16 bits": lambda: tiff(ramp(65535, "<u2"), 16),
    "TIFF of 16 bits with a sign": lambda: tiff(ramp(32767, "<i2"), 16, SIGNED),
    "TIFF with 12 of 16 bits": lambda: tiff(ramp(4095, "<u2"), 16, (MAX_SAMPLE_VALUE, 4095)),
    "TIFF with 10 of 16 bits": lambda: tiff(ramp(1023, "<u2"), 16, (MAX_SAMPLE_VALUE, 1023)),
    "TIFF, 0 is white": lambda: tiff(
        (65535 - levels(65535)).astype("<u2").tobytes(), 16, WHITE_IS_ZERO
    ),
    "TIFF of 32 bits that states white": lambda: tiff(
        ramp(100000, "<u4"), 32, (MAX_SAMPLE_VALUE, 100000)
    ),
    "TIFF of floats that states white": lambda: tiff(
        ramp(1, "<f4"), 32, FLOAT, (MAX_SAMPLE_VALUE, 1)
    ),
}  # fmt: skip


def file_of(array: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("make", DEEP_FILES.values(), ids=DEEP_FILES)
def test_white_is_what_the_file_states(make):
    expected = pixels(Image.fromarray(levels(255).astype(np.uint8))).astype(int)
    assert np.abs(pixels(make()) - expected).max() <= 1


@pytest.mark.parametrize("make", DEEP_FILES.values(), ids=DEEP_FILES)
def test_deep_images_that_are_loaded(make):
    image = Image.open(io.BytesIO(make()))
    image.load()
    assert np.array_equal(pixels(image), pixels(make()))


def test_dark_images_of_16_bits_stay_dark():
    assert pixels(file_of(np.full((280, 280), 200, np.uint16), "PNG")).max() <= 1


UNKNOWN_WHITE = {
    "TIFF of 32 bits": lambda: tiff(ramp(2**32 - 1, "<u4"), 32),
    "TIFF of 32 bits with a sign": lambda: tiff(ramp(2**31 - 1, "<i4"), 32, SIGNED),
    "TIFF of floats": lambda: tiff(ramp(1, "<f4"), 32, FLOAT),
    "array of integers": lambda: Image.fromarray(levels(255).astype(np.int32)),
    "array of floats": lambda: Image.fromarray(RAMP.astype(np.float32)),
}


@pytest.mark.parametrize("make", UNKNOWN_WHITE.values(), ids=UNKNOWN_WHITE)
def test_numbers_of_32_bits_without_a_white_are_refused(make):
    with pytest.raises(ValueError, match="32-bit"):
        preprocess(make())


def test_16_bit_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 3
    array = levels(4000).astype(np.uint16)
    turned = file_of(array, "PNG", exif=exif)
    assert np.array_equal(pixels(turned), pixels(file_of(array[::-1, ::-1].copy(), "PNG")))


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_images_whose_pixels_are_cut_off(kind):
    file = io.BytesIO()
    picture(64, 64).save(file, kind)
    with pytest.raises((OSError, ValueError)):
        preprocess(file.getvalue()[: len(file.getvalue()) // 2], 28)


def test_a_png_file_with_a_hole():
    file = io.BytesIO()
    picture(64, 64).save(file, "png")
    data = bytearray(file.getvalue())
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff" * 200
    with pytest.raises((OSError, ValueError)):
        preprocess(bytes(data), 28)


@pytest.mark.parametrize("loaded", [False, True], ids=["", "loaded"])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_files_are_turned_once(bits, loaded):
    """Pillow turns them when it loads them."""
    white = 2**bits - 1
    data = np.ascontiguousarray(levels(white).T.astype(f"<u{bits // 8}")).tobytes()
    image = Image.open(io.BytesIO(tiff(data, bits, (274, 6))))
    if loaded:
        image.load()
    upright = pixels(Image.open(io.BytesIO(tiff(data, bits))).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(image), upright)


def planar_tiff(*planes: np.ndarray) -> bytes:
    """An RGB TIFF file of 16 bits whose channels lie one after the other."""
    (height, width), size = planes[0].shape, planes[0].size * 2
    start = 8 + 2 + 12 * 10 + 4 + 6 + 12 + 12
    arrays = struct.pack("<3H", 16, 16, 16)
    arrays += struct.pack("<6I", *(start + i * size for i in range(3)), size, size, size)
    place = start - len(arrays)
    tags = [(256, 1, width), (257, 1, height), (258, 3, place), (259, 1, 1), (262, 1, 2)]
    tags += [(273, 3, place + 6), (277, 1, 3), (278, 1, height), (279, 3, place + 18), (284, 1, 2)]
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for number, count, value in tags:
        content += struct.pack("<HHII", number, 3 if number == 258 else 4, count, value)
    data = b"".join(plane.astype("<u2").tobytes() for plane in planes)
    return content + struct.pack("<I", 0) + arrays + data


def test_16_bit_tiff_files_with_separate_planes():
    """Pillow (13) reads them wrongly: right, or refused."""
    expected = np.stack([levels(255), levels(200), levels(100)], -1).round().astype(np.uint8)
    data = planar_tiff(*(levels(white) * 257 for white in (255, 200, 100)))
    try:
        found = pixels(data)
    except ValueError:
        return
    assert np.abs(found.astype(int) - pixels(Image.fromarray(expected))).max() <= 1


# --------------------------------------------------------------------------------------------------
# Metadata of images

HALVES = Image.new("RGB", (40, 20), "white")
HALVES.paste((200, 30, 40), (0, 0, 20, 20))


def bytes_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with_exif(exif: bytes) -> bytes:
    data = bytes_of(HALVES, "PNG")
    return data[:33] + chunk(b"eXIf", exif) + data[33:]


def webp_with_exif(exif: bytes) -> bytes:
    """Pillow writes EXIF as it is given to it."""
    return bytes_of(HALVES, "WEBP", lossless=True, exif=exif)


def jpeg_with_exif(orientation: int, *tags: tuple[int, int, bytes]) -> bytes:
    """With an orientation and more tags: (number, type, value)."""
    content = b"II*\0" + struct.pack("<IH", 8, 1 + len(tags))
    for number, kind, value in [(274, 3, struct.pack("<H", orientation)), *tags]:
        content += struct.pack("<HHI", number, kind, 1) + value.ljust(4, b"\0")
    content = b"Exif\0\0" + content + bytes(4)
    data = bytes_of(HALVES, "JPEG", quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "data",
    [
        png_with_exif(b"\x00\x08\x00\x02\x01\x12\x00\x03"),
        png_with_exif(b""),
        png_with_exif(b"MM\0*\xff\xff\xff\xff"),
        webp_with_exif(bytes(20)),
        webp_with_exif(b"Exif\0\0II*\0" + b"\xff" * 8),
    ],
    ids=["PNG, no TIFF", "PNG, empty", "PNG, no offset", "WebP, zeros", "WebP, no offset"],
)
def test_unreadable_metadata_do_not_spoil_the_pixels(data):
    assert np.array_equal(pixels(data), pixels(HALVES))


@pytest.mark.parametrize(
    "tags",
    [
        [],
        [(296, 4, struct.pack("<I", 70000))],  # a ResolutionUnit that is no SHORT
        [(256, 9, struct.pack("<i", -5))],  # a negative ImageWidth
    ],
    ids=["", "ResolutionUnit of 70000", "ImageWidth of -5"],
)
def test_orientation_beside_metadata_that_cannot_be_written(tags):
    upright = Image.open(io.BytesIO(jpeg_with_exif(1))).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(pixels(jpeg_with_exif(6, *tags)), pixels(upright))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist(orientation):
    assert np.array_equal(pixels(jpeg_with_exif(orientation)), pixels(jpeg_with_exif(1)))


def png_of_16_bits(color_type: int, samples: np.ndarray, transparent: bytes) -> bytes:
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP_GRAY = np.full((40, 40), 30000)
DEEP_GRAY[:, :20] = 1000
DEEP_COLOR = np.stack([DEEP_GRAY, DEEP_GRAY // 2, DEEP_GRAY // 3], axis=-1)
TRANSPARENT_FILES = {
    "gray": png_of_16_bits(0, DEEP_GRAY, struct.pack(">H", 1000)),
    "color": png_of_16_bits(2, DEEP_COLOR, struct.pack(">HHH", 1000, 500, 333)),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["", "loaded"])
@pytest.mark.parametrize("data", TRANSPARENT_FILES.values(), ids=TRANSPARENT_FILES)
def test_transparent_colors_of_16_bits(data, loaded):
    image = Image.open(io.BytesIO(data))
    if loaded:
        image.load()
    array = pixels(image, 28)
    assert (array[:, :12] == 255).all()
    assert (array[:, 16:, 0] == 30000 >> 8).all()


def palette_with_transparency() -> bytes:
    return bytes_of(HALVES.quantize(2), "PNG", transparency=0)


@pytest.mark.parametrize(
    "data",
    [
        *TRANSPARENT_FILES.values(),
        palette_with_transparency(),
        jpeg_with_exif(6),
        DEEP_FILES["TIFF of 16 bits"](),
    ],
    ids=[*TRANSPARENT_FILES, "palette", "orientation", "16 bits"],
)
def test_the_image_of_the_caller_stays_as_it_is(data):
    image = Image.open(io.BytesIO(data))
    mode, info = image.mode, dict(image.info)
    preprocess(image)
    assert image.mode == mode
    assert image.info == info
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))
    assert dict(image.getexif()) == dict(Image.open(io.BytesIO(data)).getexif())


# --------------------------------------------------------------------------------------------------
# Files that are no images

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize("as_path", [False, True], ids=["bytes", "path"])
def test_heic_without_pillow_heif(as_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    with pytest.raises(ValueError, match=r"HEIC.*pip install pillow-heif"):
        preprocess(tmp_path / "photo.heic" if as_path else HEIC)


PNG, JPEG = bytes_of(picture(90, 60), "PNG"), bytes_of(picture(90, 60), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk" * 9,
        JPEG[:500],
        PNG[: len(PNG) // 2],
        PNG.replace(b"IDAT", b"IxAT"),
        png_of_16_bits(7, DEEP_GRAY, b""),
        b"DDS " + struct.pack("<I", 124) + bytes(200),
    ],
    ids=["empty", "junk", "cut JPEG", "cut PNG", "no pixels", "color type 7", "DDS"],
)
def test_broken_images(data):
    with pytest.raises((OSError, ValueError)) as error:
        preprocess(data)
    assert str(error.value)


def test_a_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"3000 pixels.* 2000 pixels"):
        preprocess(bytes_of(Image.new("RGB", (100, 30)), "PNG"))


@pytest.mark.parametrize("name", ["folder", "pipe", "dangling", "loop"])
def test_names_of_what_is_no_file(name, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        preprocess(tmp_path / name)


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """Three images, three files that cannot be read, and a loop of links."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"new\nline.png", b"bad\xff.png", b"good.png"):
        Image.new("RGB", (20, 20)).save(os.path.join(os.fsencode(folder), name))
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "loop").symlink_to(folder)
    return folder


def test_unusual_names_and_files(odd_folder):
    result = run(odd_folder, "x" * 300 + ".png", "--model", DIGITS, "--top", "1")
    names = [line.rsplit("/", 1)[1].split("  ")[0] for line in result.stdout.splitlines()]
    assert names == ["bad\\udcff.png", "good.png", "new\\nline.png"]
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 4
    assert result.returncode == 1


def test_unusual_names_in_json(odd_folder):
    result = run(odd_folder, "--model", DIGITS, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {os.path.basename(os.fsencode(line["image"])): line for line in lines}
    assert len(found) == 6
    assert "predictions" in found[b"bad\xff.png"]
    assert "predictions" in found[b"new\nline.png"]
    assert "error" in found[b"pipe.png"]


ESCAPE = "\x1b]0;x\x07"


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "text"])
def test_control_characters_of_files_and_labels(options, tmp_path):
    dinoreg.save(tiny_classifier([ESCAPE, "a", "b"]), tmp_path / "model.safetensors")
    picture(20, 20).save(tmp_path / f"{ESCAPE}.png")
    (tmp_path / f"{ESCAPE}.jpg").write_text("no image")
    result = run(tmp_path, "--model", tmp_path / "model.safetensors", *options)
    text = result.stdout + result.stderr
    assert text.count("1b]0;x") >= 3
    assert text.replace("\n", "").isprintable()
    assert result.returncode == 1


def test_labels_that_standard_output_cannot_encode(folder, tmp_path):
    dinoreg.save(tiny_classifier(["ü", "é", "猫"]), tmp_path / "model.safetensors")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(stdout):
        assert (
            dinoreg.main([str(folder / "b.png"), "--model", str(tmp_path / "model.safetensors")])
            == 0
        )
    lines = stdout.buffer.getvalue().decode().splitlines()
    assert {line.split()[-1] for line in lines} == {"\\xfc", "\\xe9", "\\u732b"}


def test_control_characters_of_tensors(folder, tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    result = run(folder / "b.png", "--model", rewrite(path, {ESCAPE: torch.zeros(1)}))
    assert "\\x1b]0;x\\x07 is (1,)" in result.stderr
    assert result.stderr.strip().isprintable()
    assert result.returncode == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(folder, bad, tmp_path):
    model = tiny_classifier()
    model.linear_head.bias.data[0] = bad
    dinoreg.save(model, tmp_path / "model.safetensors")
    text = run(folder / "b.png", "--model", tmp_path / "model.safetensors")
    lines = run(folder / "b.png", "--model", tmp_path / "model.safetensors", "--json")
    record = json.loads(lines.stdout, parse_constant=pytest.fail)
    assert "NaN or infinity" in record["error"]
    assert "NaN or infinity" in text.stderr
    assert text.stdout == ""
    assert (text.returncode, lines.returncode) == (1, 1)


def test_logits_that_overflow_in_float16(folder, tmp_path):
    model = tiny_classifier()
    model.backbone.blocks[0].mlp.fc2.weight.data.fill_(1e5)
    dinoreg.save(model, tmp_path / "model.safetensors")
    result = run(folder / "b.png", "--model", tmp_path / "model.safetensors", "--dtype", "float16")
    assert "float16" in result.stderr
    assert result.stdout == ""
    assert result.returncode == 1


# --------------------------------------------------------------------------------------------------
# Hostile weights

# Tensors that change a state dict, and the error.
CHANGES = {
    "missing": ({"norm.bias": None}, r"norm.bias is missing; expected \(384,\)"),
    "unknown": ({"x": torch.zeros(3)}, r"x is \(3,\); expected no such tensor"),
    "shape": ({"norm.bias": torch.zeros(7)}, r"norm.bias is \(7,\); expected \(384,\)"),
    "no positions": ({"pos_embed": None}, "pos_embed.* is missing"),
    "one number": (
        {"pos_embed": torch.zeros(1).expand(1, 26, 384)},
        r"pos_embed is \(1, 26, 384\)",
    ),
    "no dimension": (
        {"cls_token": torch.tensor(1.0)},
        r"cls_token is \(\); expected \(1, 1, 384\)",
    ),
    "sparse": ({"norm.bias": torch.zeros(384).to_sparse()}, r"norm.bias is \(384,\).*sparse"),
    "a gap": ({"blocks.99999999.norm1.weight": torch.ones(384)}, r"blocks\.2"),
    **{
        str(dtype): ({"norm.bias": torch.ones(384).to(dtype)}, rf"norm.bias is \(384,\).*{dtype}")
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool)
    },
}


@pytest.mark.parametrize("changes, message", CHANGES.values(), ids=CHANGES)
def test_load_refuses_other_tensors(changes, message, tmp_path):
    state = {**randomised(SMALL).state_dict(), **changes}
    torch.save({key: x for key, x in state.items() if x is not None}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}") as error:
        dinoreg.load(tmp_path / "model.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes, layers", [(3, 0), (3, 8), (0, 1)])
def test_heads_of_other_widths(classes, layers, tmp_path):
    weight = torch.zeros(classes, (layers + 1) * TINY.embed_dim)
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: .*\b{classes}\b.*\b{layers}\b"):
        dinoreg.load(rewrite(path, {"linear_head.weight": weight}))


FIELDS = {
    "num_heads": [0, 5, -4, 2.0, "4"],
    "drop_path_rate": [5, math.nan, "x"],
    "interpolate_offset": [-1, 1e308, math.nan],
    "mlp_ratio": [1e308, math.nan],
    "layerscale_init": [10**400],
    "image_size": [None, [20], "x"],
    "color": [1],
}


@pytest.mark.parametrize("field, value", [(key, x) for key in FIELDS for x in FIELDS[key]], ids=str)
def test_stored_configs_that_are_refused(field, value, tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        dinoreg.load(rewrite(path, config={**TINY.to_dict(), field: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"resize": 0}, {"resize": "256"}, {"resize": (256,)}, {"resize": 2.5}, {"resize": 10**9},
     {"crop": 224}, {"crop": (224, 300)}, {"crop": (0, 224)}, {"resampling": "box"},
     {"resampling": None}, {"mean": 0.5}, {"mean": (0.5, 0.5)}, {"mean": ("a", "b", "c")},
     {"mean": (1e308, 0.0, 0.0)}, {"std": (1.0, 1.0, 0.0)}, {"std": (1.0, 1.0, math.nan)}],
    ids=str,
)  # fmt: skip
def test_transforms_that_are_refused(fields):
    with pytest.raises(ValueError, match="cannot transform images with"):
        Transform(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"resize": 0}, {"resize": 10**400}, {"crop": 224}, {"resampling": "box"}, {"color": 1},
     {"mean": [10**400] * 3}, {"mean": [1e308] * 3}, {"mean": ["a"] * 3}, {"std": [math.nan] * 3}],
    ids=lambda fields: str(fields)[:40],
)  # fmt: skip
def test_stored_transforms_that_are_refused(fields, tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        dinoreg.load(rewrite(path, transform=fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["config", "transform", "labels"])
@pytest.mark.parametrize(
    "text", ["[1]", "3", '"x"', "{", "[" * 100_000, '{"embed_dim": {}}', "NaN"]
)
def test_metadata_that_are_refused(key, text, tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        dinoreg.load(rewrite(path, **{key: text}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [["a"] * 2, ["a"] * 4, [1, 2, 3], [["a"], "b", "c"], '"abc"', {"a": 0, "b": 1, "c": 2}],
)
def test_stored_labels_that_are_refused(labels, tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .*labels"):
        dinoreg.load(rewrite(path, labels=labels))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("the payload ran",)


CONTENTS = {
    "text": b"no checkpoint",
    "empty": b"",
    "header that is too long": b"\xff" * 8 + b"{",
    "header that is no JSON": struct.pack("<Q", 3) + b"{x}",
    "pickle": pickle.dumps([1]),
    "payload": pickle.dumps(Payload()),
    "payload in a checkpoint": saved({"weight": Payload()}),
    "other model": saved({"weight": torch.zeros(2)}),
    "list": saved([1, 2]),
    "number": saved({"norm.bias": 3}),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_files_that_are_no_models(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        dinoreg.load(tmp_path / name)
    assert str(error.value).isprintable()
    assert "payload" not in capsys.readouterr().out


def test_compressed_checkpoints_are_refused(tmp_path):
    """They may unpack to any size; torch.save never compresses."""
    plain = zipfile.ZipFile(io.BytesIO(saved(randomised(SMALL).state_dict())))
    with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"model\.pth: .*compressed"):
        dinoreg.load(tmp_path / "model.pth")


def load_in_little_memory(paths: list[Path]) -> list[str]:
    """The error of each file."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    errors = []
    for path in paths:
        try:
            dinoreg.load(path)
        except ValueError as error:
            errors.append(str(error))
    return errors


@linux_only
def test_names_and_shapes_are_compared_before_memory_is_allocated(tmp_path):
    changes = {
        "blocks": {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(1000)},
        "pos_embed": {"pos_embed": torch.zeros(1).expand(1, 2**36 + 1, 384)},
        "register_tokens": {"register_tokens": torch.zeros(0, 2**40, 0)},
        "fc2": {"blocks.0.mlp.fc2.weight": torch.zeros(0, 2**40)},
    }
    for name, tensors in changes.items():
        torch.save(randomised(SMALL).state_dict() | tensors, tmp_path / name)
    errors = in_a_process(load_in_little_memory, [tmp_path / name for name in changes])
    blocks, pos_embed, register_tokens, fc2 = errors
    assert re.search(r"blocks: blocks\.0\.norm1\.weight is \(1,\); expected \(384,\)", blocks)
    assert re.search(r"pos_embed: pos_embed is \(1, 68719476737, 384\)", pos_embed)
    assert re.search(
        r"register_tokens: register_tokens is \(0, 1099511627776, 0\)", register_tokens
    )
    assert re.search(r"fc2: blocks\.0\.mlp\.fc\d\.weight is ", fc2)


# --------------------------------------------------------------------------------------------------
# Damaged downloads


def with_a_hole(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(4096) + data[middle + 4096 :]


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "hole": with_a_hole,
    "another file": lambda data: b"<html>please log in</html>",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_download_of_a_damaged_file(hub, damage):
    content = hub.files[HUB_BACKBONE]
    hub.files[HUB_BACKBONE] = damage(content)
    with pytest.raises(OSError, match="not a complete checkpoint"):
        dinoreg.load("vits14_reg")
    assert os.listdir(hub.cache) == []
    hub.files[HUB_BACKBONE] = content
    assert_same(dinoreg.load("vits14_reg"), randomised(HUB_CONFIG))


def test_download_that_is_cut_off(hub):
    hub.cut_off = True
    with pytest.raises(OSError, match="not a complete checkpoint"):
        dinoreg.load("vits14_reg")
    assert os.listdir(hub.cache) == []


@pytest.mark.parametrize("file", [HUB_BACKBONE, HUB_HEADS[4]])
def test_the_error_names_a_damaged_file_of_the_cache(hub, file):
    dinoreg.load("vits14_reg_lc")
    path = hub.cache / Path(file).name
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{path} \(delete it to download it again\): "):
        dinoreg.load("vits14_reg_lc")


@pytest.mark.parametrize("file", [HUB_BACKBONE, HUB_HEADS[4]])
def test_the_error_names_other_weights_in_the_cache(hub, file):
    dinoreg.load("vits14_reg_lc")
    (hub.cache / Path(file).name).write_bytes(saved({"bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=Path(file).name):
        dinoreg.load("vits14_reg_lc")


# --------------------------------------------------------------------------------------------------
# Models that a file cannot hold


class OtherBlock(dinoreg.Block):
    """Has the same tensors and another output."""


class Block(dinoreg.Block):
    """This one has the same name, too."""


def wrap(place: str):
    """An edit that puts a module into a container, as adapters do."""

    def edit(model):
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(place)))

    return edit


REFUSED = {
    "another class": lambda m: setattr(m.blocks[1], "__class__", OtherBlock),
    "another class of the same name": lambda m: setattr(m.blocks[1], "__class__", Block),
    "other heads": lambda m: setattr(m.blocks[0].attn, "num_heads", 2),
    "another scale": lambda m: setattr(m.blocks[0].attn, "scale", 1.0),
    "dropout": lambda m: setattr(m.blocks[0].mlp.drop, "p", 0.5),
    "dropout of the attention": lambda m: setattr(m.blocks[0].attn, "attn_drop", 0.5),
    "tanh GELU": lambda m: setattr(m.blocks[0].mlp, "act", nn.GELU("tanh")),
    "ReLU": lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    "another eps": lambda m: setattr(m, "norm", nn.LayerNorm(32, eps=0.5)),
    "a stride": lambda m: setattr(m.patch_embed.proj, "stride", (2, 2)),
    "a norm of patches": lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(32)),
    "a norm without tensors": lambda m: setattr(m.patch_embed, "norm", nn.Softmax(-1)),
    "a head": lambda m: setattr(m, "head", nn.Linear(32, 3)),
    "no bias": lambda m: setattr(m.blocks[0].attn.qkv, "bias", None),
    "a wrapped block": wrap("blocks.2"),
    "a wrapped attention": wrap("blocks.2.attn"),
    "a wrapped layer": wrap("blocks.0.mlp.fc1"),
    "a wrapped patch embedding": wrap("patch_embed"),
    "pruned": lambda m: torch.nn.utils.prune.l1_unstructured(m.blocks[0].mlp.fc1, "weight", 0.5),
    "normed": lambda m: torch.nn.utils.parametrizations.weight_norm(m.blocks[0].mlp.fc1),
    "tied": lambda m: setattr(m.blocks[1].mlp.fc1, "weight", m.blocks[0].mlp.fc1.weight),
    "sparse": lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight.data.to_sparse())),
    "meta": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_save_refuses_models_that_would_not_load(edit, tmp_path):
    edit(model := randomised(TINY))
    with pytest.raises(
        ValueError, match=r"cannot save this model as it is: |share memory"
    ) as error:
        dinoreg.save(model, tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), None], ids=str)
def test_save_refuses_other_modules(model, tmp_path):
    with pytest.raises(ValueError, match="cannot save a "):
        dinoreg.save(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    assert torch.equal(copied(model)(images), model(images))
    assert copied(model).config == model.config


def test_threads_share_a_model():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    expected = model(images)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: model(images), range(32)))
    assert [i for i, output in enumerate(outputs) if not torch.equal(output, expected)] == []


# --------------------------------------------------------------------------------------------------
# Files that are overwritten, killed and concurrent processes, full disks


def overwrite(other: Path, paths: list[Path]) -> list[bool]:
    """Whether the output of a model is the same after its file was overwritten."""
    images, same = torch.ones(1, 3, 16, 16), []
    for path in paths:
        model = dinoreg.load(path)
        expected = model(images)
        if path.name.endswith("saved"):
            torch.save(model.state_dict(), path)
        else:
            shutil.copyfile(other, path)
        same.append(torch.equal(model(images), expected))
    return same


def test_the_file_of_a_loaded_model_can_be_overwritten(tmp_path):
    """A model that is mapped would end the process."""
    model, other = randomised(SMALL), randomise(DinoVisionTransformer(SMALL), seed=1)
    contents = {"saved": model, "copied": other, "zip saved": model, "zip copied": other}
    paths = [tmp_path / name for name in contents]
    for path in paths[:2]:
        dinoreg.save(model, path)
    for path in paths[2:]:
        torch.save(model.state_dict(), path)
    torch.save(other.state_dict(), tmp_path / "other")
    assert in_a_process(overwrite, tmp_path / "other", paths) == [True] * 4
    for path in paths:
        assert_same(dinoreg.load(path), contents[path.name])


def save_often(source: Path, path: Path, together: Barrier) -> str:
    model = dinoreg.load(source)
    together.wait(60)
    for _ in range(50):
        dinoreg.save(model, path)
    return "saved"


def test_several_processes_save_to_one_path(tmp_path):
    dinoreg.save(randomised(TINY), source := tmp_path / "source")
    path, together = tmp_path / "folder" / "model.safetensors", PROCESSES.Barrier(3)
    path.parent.mkdir()
    dinoreg.save(randomised(TINY), path)
    started = [start(save_often, source, path, together) for _ in range(2)]
    together.wait(60)
    while any(process.is_alive() for process, _ in started):
        assert_same(dinoreg.load(path), randomised(TINY))
    assert [receiver.recv() for _, receiver in started] == ["saved"] * 2
    assert os.listdir(path.parent) == ["model.safetensors"]


def be_killed(path: Path) -> None:
    with dinoreg.atomic(path) as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_saves_leave_the_old_file(tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    process, _ = start(be_killed, path)
    process.join(60)
    leftover, name = sorted(os.listdir(tmp_path))
    assert process.exitcode == -signal.SIGKILL
    assert leftover.startswith(".dinoreg-")
    assert_same(dinoreg.load(path), randomised(TINY))
    os.utime(tmp_path / leftover, (time.time() - 90000,) * 2)
    dinoreg.save(randomised(TINY), path)
    assert os.listdir(tmp_path) == [name]


def test_folders_of_others_stay(tmp_path):
    for name, age in {".dinoreg-old": 90000, ".dinoreg-young": 80000, "x.part": 90000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    dinoreg.save(randomised(TINY), tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == [".dinoreg-young", "x", "x.part"]
    assert os.listdir(tmp_path / "x.part") == ["file"]


def test_save_to_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        dinoreg.save(randomised(TINY), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_save_to_a_device(tmp_path):
    device = tmp_path / "null"  # as root, a mistake would destroy the real one
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("needs root")
    with pytest.raises(OSError, match="not a regular file"):
        dinoreg.save(randomised(TINY), device)
    assert device.is_char_device()


@pytest.mark.parametrize("path", ["", "missing/model", "folder"])
def test_save_to_what_is_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(OSError):
        dinoreg.save(randomised(TINY), path)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["file"]


def write_to_a_full_disk(source: Path, folder: Path) -> dict[str, Exception]:
    """The errors of all dialects, where a file can have 20 kB."""
    model, errors = dinoreg.load(source), {}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    for name, dialect in DIALECTS.items():
        try:
            convert_weights.write(model, folder / name, dialect)
        except Exception as error:
            errors[name] = error
    return errors


DIALECTS = {"a.safetensors": "dinoreg", "b.safetensors": "timm", "c.pth": "official", "d": "hf"}


@linux_only
def test_a_full_disk(tmp_path):
    dinoreg.save(randomised(TINY), source := tmp_path / "source")
    (tmp_path / "folder").mkdir()
    files = [tmp_path / "folder" / name for name in DIALECTS if "." in name]
    for file in files:
        file.write_text("old")
    errors = in_a_process(write_to_a_full_disk, source, tmp_path / "folder")
    assert sorted((tmp_path / "folder").iterdir()) == files
    assert [file.read_text() for file in files] == ["old"] * 3
    assert errors.keys() == DIALECTS.keys()
    for name, error in errors.items():
        assert isinstance(error, OSError), name
        assert "\n" not in str(error), name


def download(url: str, home: str) -> float:
    os.environ["TORCH_HOME"] = home
    dinoreg.HUB_URL = url
    dinoreg.CONFIGS["vits14_reg"] = HUB_CONFIG
    return dinoreg.load("vits14_reg").cls_token.sum().item()


def test_two_processes_download_at_once(hub):
    hub.delay = 0.2
    started = [start(download, hub.url, os.environ["TORCH_HOME"]) for _ in range(2)]
    expected = randomised(HUB_CONFIG).cls_token.sum().item()
    assert [receiver.recv() for _, receiver in started] == [expected] * 2
    for process, _ in started:
        process.join(60)
    assert os.listdir(hub.cache) == ["dinov2_vits14_reg4_pretrain.pth"]


# --------------------------------------------------------------------------------------------------
# Closed and full streams

CLASSIFY = ["-m", "dinoreg", *DIGIT_IMAGES[:3], "--model", DIGITS, "--top", "1"]


@pytest.fixture(scope="module")
def streams() -> dict[str, tuple[str, str, int]]:
    """The output, errors and exit status of the command line by redirection of its streams."""
    program, pipes = [sys.executable, *map(str, CLASSIFY)], dict(stdout=subprocess.PIPE, text=True)
    processes = {}
    for redirection in ("<&- 2>&-", ">/dev/full", ">&-", "| exit 3", ">/dev/full 2>/dev/full"):
        command = ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", *program]
        processes[redirection] = subprocess.Popen(
            command, stderr=subprocess.PIPE, cwd=HERE, **pipes
        )
    return {key: (*process.communicate(), process.returncode) for key, process in processes.items()}


@linux_only
def test_closed_standard_input_and_standard_error(streams):
    output, _, returncode = streams["<&- 2>&-"]
    assert [line.split()[-1] for line in output.splitlines()] == ["eight", "five", "four"]
    assert returncode == 0


@linux_only
def test_full_standard_output(streams):
    _, errors, returncode = streams[">/dev/full"]
    assert errors == "dinoreg: [Errno 28] No space left on device\n"
    assert returncode == 2
    assert streams[">/dev/full 2>/dev/full"][2] == 2


@linux_only
def test_closed_standard_output(streams):
    _, errors, returncode = streams[">&-"]
    assert "Traceback" not in errors
    assert returncode in (0, 2)


@linux_only
def test_a_reader_that_stops_reading(streams):
    _, errors, returncode = streams["| exit 3"]
    assert errors == ""
    assert returncode == 1


def test_an_error_without_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it if it is closed
    assert dinoreg.main([str(DIGIT_IMAGES[0]), "--model", "nowhere"]) == 2
    assert capsys.readouterr().out == ""


def test_a_traceback_on_request(monkeypatch, capsys):
    def fail():
        raise RuntimeError("first\nsecond")

    assert dinoreg.guard("program", fail) == 2
    assert capsys.readouterr().err == "program: first (DINOREG_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("DINOREG_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="second"):
        dinoreg.guard("program", fail)


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_an_error_with_full_standard_error():
    assert run(DIGIT_IMAGES[0], "--model", "nowhere", stderr=Full()).returncode == 2


# --------------------------------------------------------------------------------------------------
# Fuzzing


def mutated(data: bytes, random: Random) -> bytes:
    """A file with some bytes changed, removed, repeated or cut off."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        start = random.randrange((len(data) if random.random() < 0.5 else min(len(data), 300)) + 1)
        end = min(len(data), start + random.choice([1, 1, 4, 64]))
        piece = data[start:end]
        choice = random.randrange(6)
        if choice == 0:
            piece = bytes(random.randrange(256) for _ in piece)
        elif choice == 1:
            piece = bytes(byte ^ (1 << random.randrange(8)) for byte in piece)
        elif choice == 2:
            values = [b"", b"0", b"-1", b"99999999", b"null", b"[]", b"{}", b"\xff" * 8, bytes(8)]
            piece = random.choice(values)
        elif choice == 3:
            piece = piece * 2
        elif choice == 4:
            piece = bytes(random.choice([0, 255]) for _ in piece)
        else:
            end = len(data) if random.random() < 0.2 else end
            piece = b""
        data[start:end] = piece
    return bytes(data)


IMAGE_SUFFIXES = ["png", "jpg", "gif", "tif", "webp", "bmp", "ppm"]
IMAGE_SUFFIXES += ["dds", "tga", "ico", "jp2", "pcx", "sgi", "im"]


def fuzz_seeds(folder: Path) -> dict[str, list[Path]]:
    """One valid input of each kind, as the files that it consists of."""
    classifier = tiny_classifier(["a", "b", "c"])
    dinoreg.save(classifier, folder / "model.safetensors")
    classifier = LinearClassifier(classifier.backbone, 3)
    convert_weights.write(classifier, folder / "hf", "hf")
    small = randomised(replace(SMALL, depth=1, image_size=8)).half().state_dict()
    torch.save(small, folder / "zip.pth")
    torch.save(small, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    for suffix in IMAGE_SUFFIXES:
        image.save(folder / f"image.{suffix}")
    image.save(folder / "image.apng", "PNG", save_all=True, append_images=[image.rotate(90)])
    kinds = {path.name: [path] for path in folder.iterdir() if path.is_file()}
    return kinds | {"hf": sorted((folder / "hf").iterdir())}


def read(path: Path) -> str:
    """Read an image or weights; use them."""
    if path.stem == "image":
        assert preprocess(path, 28).shape == (3, 28, 28)
        return "images read"
    model, _ = convert_weights.read(str(path))
    C, P = model.config.in_chans, model.config.patch_size
    with torch.inference_mode():
        model(torch.zeros(1, C, 2 * P, 2 * P))
    return "weights read"


@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path):
    random = Random(0)
    (tmp_path / "seeds").mkdir()
    kinds = fuzz_seeds(tmp_path / "seeds")
    count, outcomes = int(os.environ.get("DINOREG_FUZZ", 600)), Counter()
    for i in range(count):
        kind, files = list(kinds.items())[i % len(kinds)]
        victim, folder = random.choice(files), tmp_path / "mutated"
        folder.mkdir()
        for file in files:
            content = file.read_bytes()
            content = mutated(content, random) if file == victim else content
            (folder / file.name).write_bytes(content)
        try:
            outcomes[read(folder if kind == "hf" else folder / victim.name)] += 1
        except (OSError, ValueError) as error:
            assert str(error), f"mutation {i} of {victim.name}: an error without a message"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {i} of {victim.name}: {error!r}") from error
        shutil.rmtree(folder)
    print(f"\n{count} mutated inputs: {dict(outcomes)}")
    assert outcomes.keys() == {"images read", "weights read", "refused"}


# --------------------------------------------------------------------------------------------------
# Several processes that train, and an installed wheel

DISTRIBUTED = """
import os, sys, torch, dinoreg
from torch.nn.parallel import DistributedDataParallel
rank, rendezvous = int(sys.argv[1]), f"file://{os.getcwd()}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
torch.manual_seed(0)
config = dinoreg.Config(embed_dim=32, depth=2, num_heads=4, patch_size=4, image_size=20)
model = dinoreg.DinoVisionTransformer(config)
model.mask_token.requires_grad_(False)
parallel = DistributedDataParallel(model)
for step in range(3):
    torch.manual_seed(10 * step + rank)
    parallel(torch.randn(2, 3, 20, 20)).square().sum().backward()
torch.save(model.cls_token.grad, f"gradient{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort a process that ends the usual way
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DISTRIBUTED]
    with open(tmp_path / "log", "w") as log:
        options = dict(cwd=tmp_path, env=environment, stderr=log)
        processes = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (tmp_path / "log").read_text()
    first, second = (torch.load(tmp_path / f"gradient{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    (folder / "source").mkdir()
    for name in ("dinoreg.py", "convert_weights.py", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(HERE / name, folder / "source")
    subprocess.run([*pip, "wheel", folder / "source", "--no-deps", "-w", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments", [("dinoreg", CLASSIFY[2:]), ("dinoreg-convert", ["-h"])]
)
def test_programs_of_the_wheel(site, script, arguments, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [site / "bin" / script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.stderr == ""
    assert result.stdout
    assert result.returncode == 0
