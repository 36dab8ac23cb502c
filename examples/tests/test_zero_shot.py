"""Tests of examples/zero_shot.py: `python -m pytest examples/tests/test_zero_shot.py`."""

import functools
import http.server
import json
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny
from PIL import Image

import dinoreg

pytest.importorskip("scipy")
pytest.importorskip("tqdm")

import zero_shot
from zero_shot import DinoTxt, TextEncoder, VisionHead

CONFIG = dinoreg.Config(embed_dim=32, depth=2, num_heads=4, image_size=70)
HEAD = {"input_dim": 32, "num_heads": 4, "num_blocks": 2}
TEXT = {
    "embed_dim": 64,
    "context_length": 9,
    "vocab_size": 60,
    "dim": 48,
    "num_heads": 3,
    "depth": 2,
}
START, END = 58, 59  # tokens


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers in [-1, 1] that look random, and are the same in all versions of PyTorch."""
    n = torch.arange(torch.Size(shape).numel())
    return ((n * n * 31 + n * 17 + seed * 101) % 10007 / 10007 * 2 - 1).reshape(shape)


def small_model() -> DinoTxt:
    model = DinoTxt(
        dinoreg.DinoVisionTransformer(CONFIG), VisionHead(**HEAD), TextEncoder(**TEXT)
    ).eval()
    with torch.no_grad():
        for i, (name, x) in enumerate(sorted(model.named_parameters())):
            if name != "logit_scale":
                center = 1 if x.ndim == 1 and not name.endswith("bias") else 0
                x.copy_(
                    noise(*x.shape, seed=i) * (2 * x[0].numel() ** -0.5 if x.ndim > 1 else 0.3)
                    + center
                )
    return model


MODEL = small_model()
IMAGES = noise(2, 3, 28, 42) * 2
TOKENS = torch.tensor(
    [
        [START, 3, 17, END, 0, 0, 0, 0, 0],
        [START, 40, 41, 5, 6, 7, 8, 9, END],
        [START, END] + [0] * 7,
    ]
)


# --------------------------------------------------------------------------------------------------
# The model


@torch.inference_mode()
def test_outputs_are_those_of_the_official_code():
    """Recorded from dinov2/hub/text with the same parameters."""
    cls, patches = MODEL.get_visual_class_and_patch_tokens(IMAGES)
    assert cls.shape == (2, 32) and patches.shape == (2, 6, 32)
    expected = [[3.418351, 0.33726, 1.95089, 0.329528], [3.047811, -0.026715, 1.873155, -0.386296]]
    assert torch.allclose(patches[:, 5, ::8], torch.tensor(expected), atol=2e-5)
    images = MODEL.encode_image(IMAGES)
    expected = [
        [2.683196, 0.236323, 0.466826, -0.102636, 0.979265],
        [1.411045, -0.90254, 0.22045, -0.502542, 1.264249],
    ]
    assert torch.allclose(images[:, ::13], torch.tensor(expected), atol=2e-5)
    texts = MODEL.encode_text(TOKENS)
    expected = [
        [1.923615, 0.598272, 1.96903, 0.596797, -0.039155],
        [1.923095, -0.764077, 0.586053, 0.08645, -0.503766],
        [1.833228, 1.098648, 0.825239, 1.186969, -0.92797],
    ]
    assert torch.allclose(texts[:, ::13], torch.tensor(expected), atol=2e-5)
    image_logits, text_logits = MODEL.get_logits(IMAGES, TOKENS)
    expected = [[0.734944, 0.582313, 1.75837], [-1.180767, -0.455366, -1.007747]]
    assert torch.allclose(image_logits, torch.tensor(expected), atol=2e-5)
    assert torch.equal(text_logits, image_logits.T)
    assert torch.allclose(
        MODEL.encode_image(IMAGES, normalize=True), images / images.norm(dim=1, keepdim=True)
    )
    assert torch.allclose(
        MODEL.encode_text(TOKENS, normalize=True), texts / texts.norm(dim=1, keepdim=True)
    )


def test_names_and_sizes_of_the_official_files():
    with dinoreg.NoMemory():
        backbone = dinoreg.DinoVisionTransformer(dinoreg.CONFIGS["vitl14_reg"])
        head, text = VisionHead(), TextEncoder()
    model = DinoTxt(backbone, head, text)
    assert sum(x.numel() for x in head.parameters()) == 25_326_336
    assert sum(x.numel() for x in text.parameters()) == 538_131_200
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    block = "visual_model.head.block_list.1"
    assert (
        shapes[f"{block}.attn.qkv.weight"] == (3072, 1024)
        and f"{block}.attn.qkv.bias" not in shapes
    )
    assert {
        f"{block}.{key}"
        for key in ("norm1.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight", "ls2.gamma")
    } <= {*shapes}
    assert shapes[f"{block}.mlp.w1.weight"] == shapes[f"{block}.mlp.w2.weight"] == (2752, 1024)
    assert shapes[f"{block}.mlp.w3.weight"] == (1024, 2752) and shapes[
        "visual_model.head.ln_final.bias"
    ] == (1024,)
    block = "text_model.backbone.blocks.23"
    assert (
        shapes[f"{block}.attention.qkv.weight"] == (3840, 1280)
        and f"{block}.attention.qkv.bias" not in shapes
    )
    assert {
        f"{block}.{key}" for key in ("attention_norm.bias", "attention.proj.bias", "ffn_norm.bias")
    } <= {*shapes}
    assert (
        shapes[f"{block}.feed_forward.fc1.weight"] == (5120, 1280)
        and f"{block}.feed_forward.fc2.bias" in shapes
    )
    assert shapes["text_model.backbone.token_embedding.weight"] == (49408, 1280)
    assert shapes["text_model.backbone.positional_embedding"] == (77, 1280)
    assert shapes["text_model.head.linear_projection.weight"] == (2048, 1280)
    assert "visual_model.backbone.model.register_tokens" in shapes and shapes["logit_scale"] == (1,)
    assert {
        module.eps
        for module in [*head.modules(), *text.modules()]
        if isinstance(module, torch.nn.LayerNorm)
    } == {1e-5}


@torch.inference_mode()
def test_text_features_ignore_tokens_after_the_end():
    changed = TOKENS.clone()
    changed[0, 4:], changed[2, 2:] = 21, 33
    expected = MODEL.encode_text(TOKENS)
    assert torch.allclose(MODEL.encode_text(changed), expected, atol=1e-6)
    assert torch.allclose(MODEL.encode_text(TOKENS[:1, :4]), expected[:1], atol=1e-5)
    changed[1, 2] += 1
    assert not torch.allclose(MODEL.encode_text(changed)[1], expected[1], atol=1e-2)


@torch.inference_mode()
def test_compare_gives_cosines_of_images_and_of_patches():
    text = F.normalize(noise(4, 64, seed=5), dim=1)
    both = [*zero_shot.compare(MODEL, text, [*IMAGES])]
    square = noise(3, 28, 28, seed=9)
    mixed = [*zero_shot.compare(MODEL, text, [IMAGES[0], square, IMAGES[1]])]
    assert [cosines.shape for cosines in mixed] == [(3, 3, 4), (3, 2, 4), (3, 3, 4)]
    _, tokens = MODEL.get_visual_class_and_patch_tokens(IMAGES)
    for i, cosines in enumerate(both):
        whole, patches = cosines[0, 0], cosines[1:]
        expected = F.cosine_similarity(MODEL.encode_image(IMAGES[i : i + 1]), text)
        assert torch.allclose(whole, expected, atol=1e-6)
        for row, column in ((0, 0), (0, 2), (1, 1)):
            # With the half of the text features that is for patches.
            expected = F.cosine_similarity(tokens[i, row * 3 + column], text[:, 32:])
            assert torch.allclose(patches[row, column], expected, atol=1e-6)
        assert torch.allclose(cosines, mixed[2 * i], atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The script, with a small model on a server in place of the official host


def tokenize(texts: list[str], context_length: int = 9) -> torch.Tensor:
    """Tokens of words, in place of CLIP's."""
    rows = [
        [START, *(sum(map(ord, word)) % 58 for word in text.split()[:7]), END] for text in texts
    ]
    return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.requests.append(self.path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with the three files, and empty caches: `hub.folder`, `hub.requests`,
    `hub.cache`.
    """
    folder = tmp_path / "server" / "dinov2_vitl14"
    folder.mkdir(parents=True)
    parts = MODEL.visual_model
    torch.save(parts.backbone.model.state_dict(), folder / "dinov2_vitl14_reg4_pretrain.pth")
    torch.save(parts.head.state_dict(), folder / zero_shot.FILE.format("vision_head"))
    torch.save(MODEL.text_model.state_dict(), folder / zero_shot.FILE.format("text_encoder"))
    handler = functools.partial(Handler, directory=folder.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.folder, server.requests, server.cache = (
        folder,
        [],
        tmp_path / "torch" / "hub" / "checkpoints",
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dinoreg, "HUB_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(dinoreg.CONFIGS, "vitl14_reg", CONFIG)
    monkeypatch.setattr(zero_shot, "VisionHead", functools.partial(VisionHead, **HEAD))
    monkeypatch.setattr(zero_shot, "TextEncoder", functools.partial(TextEncoder, **TEXT))
    monkeypatch.setattr(zero_shot, "tokenize", tokenize)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the script in this process: its status, its lines, its errors."""

    def call(*arguments) -> tuple[int, list[str], str]:
        capfd.readouterr()
        status = zero_shot.main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err

    return call


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("wide", "tall", "square")]
    for i, (path, size) in enumerate(zip(paths, [(90, 60), (50, 80), (64, 64)])):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(path)
    return paths


CLASSES = ["a cat", "a small dog", "sky", "the deep blue sea"]


@torch.inference_mode()
def class_vectors(templates=("{}",)) -> torch.Tensor:
    """What the official notebook computes, class by class."""
    rows = []
    for name in CLASSES:
        vectors = F.normalize(
            MODEL.encode_text(tokenize([template.format(name) for template in templates])), dim=1
        )
        rows.append(F.normalize(vectors.mean(dim=0), dim=0))
    return torch.stack(rows)


@torch.inference_mode()
def probabilities(photo: Path, text: torch.Tensor, **options) -> torch.Tensor:
    image = MODEL.encode_image(dinoreg.preprocess(photo, **options)[None], normalize=True)
    return (100 * image @ text.T)[0].softmax(dim=0)


def test_scores_of_photos(hub, call, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    status, lines, err = call(
        *photos[:2], broken, photos[2], "--classes", *CLASSES, "--json", "--size", 28
    )
    records = [json.loads(line) for line in lines]
    assert status == 1 and [record["image"] for record in records] == [
        *map(str, [*photos[:2], broken, photos[2]])
    ]
    assert "cannot identify" in records.pop(2)["error"]
    for photo, record in zip(photos, records):
        expected = probabilities(photo, class_vectors(), size=28)
        found = {
            prediction["label"]: prediction["probability"] for prediction in record["predictions"]
        }
        assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), rel=1e-2)
        assert [*found.values()] == sorted(found.values(), reverse=True)
    assert len(hub.requests) == 3 and len(list(hub.cache.iterdir())) == 3
    assert not Path("pictures").exists()

    status, lines, err = call(broken, photos[0], "--classes", *CLASSES, "--size", 28, "--top", 2)
    assert (
        status == 1
        and err.startswith(f"zero_shot: {broken}: cannot identify")
        and err.count("\n") == 1
    )
    first, second = records[0]["predictions"][:2]
    assert lines[0].split(maxsplit=2) == [
        str(photos[0]),
        f"{first['probability']:.1%}",
        first["label"],
    ]
    assert (
        lines[1].split(maxsplit=1) == [f"{second['probability']:.1%}", second["label"]]
        and len(lines) == 2
    )
    assert len(hub.requests) == 3


def test_templates_and_the_cache_of_texts(hub, call, photos, tmp_path, monkeypatch):
    templates = ["a photo of {}.", "{} in the wild, far away", "{}"]
    (tmp_path / "classes.txt").write_text("\n".join(["", *CLASSES, ""]), encoding="utf-8-sig")
    arguments = (
        photos[0],
        "--classes",
        tmp_path / "classes.txt",
        "--json",
        "--size",
        28,
        "--templates",
    )
    status, (line,), _ = call(*arguments, *templates)
    expected = probabilities(photos[0], class_vectors(templates), size=28)
    found = {
        prediction["label"]: prediction["probability"]
        for prediction in json.loads(line)["predictions"]
    }
    assert status == 0 and [found[name] for name in CLASSES] == pytest.approx(
        expected.tolist(), rel=1e-2
    )

    calls = []
    monkeypatch.setattr(zero_shot, "tokenize", lambda texts: calls.append(texts) or tokenize(texts))
    assert call(*arguments, *templates)[1] == [line] and not calls
    assert call(*arguments, *templates, "--no-cache")[1] == [line] and len(calls) == 1
    assert call(*arguments, *reversed(templates))[0] == 0 and len(calls) == 2
    (cached, *others) = (tmp_path / "cache" / "dinoreg").iterdir()
    assert len(others) == 1 and cached.suffix == ".safetensors"
    os.utime(hub.cache / zero_shot.FILE.format("text_encoder"), (1, 1))  # other weights
    assert call(*arguments, *templates)[1] == [line] and len(calls) == 3
    assert len(calls[0]) == len(CLASSES) * len(templates)


def test_many_classes_are_encoded_in_batches(hub, monkeypatch):
    names = [f"{word} {i}" for i in range(50) for word in ("red", "green blue")]
    templates = ["{}", "one {} here", "{} there"]
    prompts = zero_shot.make_prompts(names, templates)
    assert prompts["red 7"] == ["red 7", "one red 7 here", "red 7 there"]
    seen, encoders, load = [], [], zero_shot.load

    def spy(*arguments):
        encoder = load(*arguments)
        encoders.append(weakref.ref(encoder))
        encoder.register_forward_hook(lambda module, inputs, x: seen.append(inputs[0].shape))
        return encoder

    monkeypatch.setattr(zero_shot, "load", spy)
    features = zero_shot.encode_classes([*prompts.values()], "cpu", use_cache=False)
    assert [encoder() for encoder in encoders] == [None]  # its memory is freed
    assert (
        sum(rows for rows, _ in seen) == 300
        and len(seen) == 5
        and max(columns for _, columns in seen) < 9
    )
    vectors = MODEL.encode_text(
        tokenize([text for texts in prompts.values() for text in texts]), normalize=True
    )
    expected = F.normalize(vectors.unflatten(0, (100, 3)).mean(dim=1), dim=1)
    assert torch.allclose(features, expected, atol=1e-6)


def test_segments_of_photos(hub, call, photos, tmp_path):
    other = tmp_path / "other" / photos[0].name
    other.parent.mkdir()
    other.write_bytes(photos[1].read_bytes())
    output = tmp_path / "pictures"
    options = ("--classes", *CLASSES, "--segment", "--resolution", 56, "-o", output)
    status, lines, _ = call(photos[0], other, *options, "--json")
    records = [json.loads(line) for line in lines]
    assert status == 0 and len({record["picture"] for record in records}) == 2
    assert sorted(output.iterdir()) == sorted(Path(record["picture"]) for record in records)
    text = class_vectors()
    for photo, record in zip([photos[0], other], records):
        expected = probabilities(photo, text, size=56, keep_aspect=True)
        assert record["predictions"][0]["probability"] == pytest.approx(
            expected.max().item(), abs=1e-4
        )
        x = dinoreg.preprocess(photo, 56, keep_aspect=True)[None]
        with torch.inference_mode():
            _, patches = MODEL.get_visual_class_and_patch_tokens(x)
        cosines = (F.normalize(patches, dim=2) @ F.normalize(text[:, 32:], dim=1).T).unflatten(
            1, (x.shape[2] // 14, -1)
        )
        with Image.open(photo) as image:
            width, height = image.size
        maps = F.interpolate(cosines.permute(0, 3, 1, 2), (height, width), mode="bilinear")[0]
        shares = torch.bincount(maps.argmax(dim=0).flatten(), minlength=4) / (width * height)
        assert [record["shares"][name] for name in CLASSES] == pytest.approx(
            shares.tolist(), abs=0.01
        )
        with Image.open(record["picture"]) as picture:
            assert picture.width == 2 * width + 4 and picture.height > height
    status, lines, _ = call(photos[0], *options, "--top", 1)
    assert status == 0 and lines[1:] == [f"{records[0]['picture']} written"]
    many = [f"class {i}" for i in range(300)]
    status, _, err = call(photos[0], "--classes", *many, "--segment", "-o", output)
    assert status == 2 and "--segment takes at most 255 classes, got 300" in err


def test_a_picture_never_replaces_a_photo(hub, call, photos):
    photo = photos[0].rename(photos[0].with_stem("wide_classes"))
    photos[1].rename(photos[1].with_stem("wide"))
    before = photo.read_bytes()
    options = ("--classes", *CLASSES, "--segment", "--resolution", 56, "-o", photo.parent)
    status, _, err = call(photo.parent, *options)
    assert status == 2 and "wide_classes.png is one of the images" in err
    assert photo.read_bytes() == before


def test_nan_is_an_error_of_the_photo(hub, call, photos, tmp_path):
    path = hub.folder / "dinov2_vitl14_reg4_pretrain.pth"
    tensors = torch.load(path)
    tensors["norm.bias"][0] = float("nan")
    torch.save(tensors, path)
    options = ("--classes", *CLASSES, "--size", 28, "-o", tmp_path / "pictures")
    for more in ((), ("--segment", "--resolution", 56)):
        status, lines, err = call(photos[0], *options, *more)
        assert status == 1 and not lines
        assert err.splitlines()[-1] == f"zero_shot: {photos[0]}: the model returns NaN or infinity"
    assert not (tmp_path / "pictures").exists()

    path = hub.folder / zero_shot.FILE.format("text_encoder")
    tensors = torch.load(path)
    tensors["head.linear_projection.weight"][0] = float("inf")
    torch.save(tensors, hub.cache / path.name)
    status, lines, err = call(photos[0], *options)
    assert status == 2 and f"{path.name}: the model returns NaN" in err
    assert len(list((tmp_path / "cache" / "dinoreg").iterdir())) == 1  # the vectors before


def test_class_names_cannot_control_the_terminal(hub, call, photos, tmp_path):
    names = ["\x1b]0;x\x07", "a\x9b2Jb"]
    options = ("--segment", "--resolution", 56, "-o", tmp_path / "pictures")
    status, lines, _ = call(photos[0], "--classes", *names, *options)
    assert status == 0 and all(line.isprintable() for line in lines)
    assert "\\x1b]0;x\\x07" in "\n".join(lines)


def test_missing_files_are_named(hub, call, photos):
    for path in hub.folder.iterdir():
        path.unlink()
    status, lines, err = call(photos[0], "--classes", *CLASSES)
    assert status == 2 and not lines
    message = err.splitlines()[-1]
    names = [
        zero_shot.FILE.format("vision_head"),
        zero_shot.FILE.format("text_encoder"),
        "dinov2_vitl14_reg4_pretrain.pth",
    ]
    assert message.startswith("zero_shot: cannot download http://127.0.0.1:") and "404" in message
    assert message.endswith(f"; needed in {hub.cache}: {', '.join(names)}")


def test_wrong_files_and_options_are_reported(hub, call, photos, tmp_path):
    path = hub.folder / zero_shot.FILE.format("vision_head")
    original = path.read_bytes()
    path.write_bytes((hub.folder / zero_shot.FILE.format("text_encoder")).read_bytes())
    status, _, err = call(photos[0], "--classes", *CLASSES)
    cached = hub.cache / path.name
    assert status == 2 and f"zero_shot: {cached}: " in err and "VisionHead" in err
    cached.write_bytes(original)
    config = dinoreg.Config(embed_dim=48, depth=1, num_heads=4, image_size=28)
    other, binary = save_tiny(config, tmp_path / "other.safetensors"), tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfa")
    for arguments, message in (
        (("--classes", "a cat"), "No such file or directory: 'a cat'"),
        (("--classes", binary), "binary.txt: 'utf-8' codec can't decode"),
        (("--classes", "a cat", "a cat"), "two or more different classes"),
        (("--classes", *CLASSES, "--templates", "a photo"), "--templates must contain {}"),
        (("--classes", *CLASSES, "--size", 30), "multiples of 14"),
        (("--classes", *CLASSES, "--model", other), "expected a model of width 32, got 48"),
    ):
        status, lines, err = call(photos[0], *arguments)
        assert status == 2 and not lines and message in err.splitlines()[-1]


def test_tokens_and_templates_of_clip():
    pytest.importorskip("open_clip")
    tokens = zero_shot.tokenize(["a photo of a dog.", "  A  Photo of a DOG. ", "word " * 100])
    assert tokens.shape == (3, 77) and tokens.dtype == torch.int64
    assert tokens[0, :9].tolist() == [49406, 320, 1125, 539, 320, 1929, 269, 49407, 0]
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[2, -2:].tolist() == [2653, 49407]
    prompts = zero_shot.make_prompts(["tench", "{}"], ["imagenet"])
    assert len(prompts["tench"]) == len(set(prompts["tench"])) == 80
    assert (
        all("tench" in prompt for prompt in prompts["tench"])
        and "a photo of a {}." in prompts["{}"]
    )
