"""Tests of examples/pretrain.py: `python -m pytest examples/tests/test_pretrain.py`.

Values of the official code were recorded with commit b8931f7 of facebookresearch/dinov2, on a CPU
with torch 2.14, from the inputs that `randn` and `fill` make. Its DINOHead, DINOLoss,
iBOTPatchLoss, KoLeoLoss, MaskingGenerator, CosineScheduler and get_params_groups_with_decay were
called as they are, in a gloo group of one process. For a whole step its SSLMetaArch ran:
forward_backward, clip_grad_norm_ for each part, AdamW of get_params_groups, update_teacher.
Replaced were only what needs CUDA (Tensor.cuda did nothing), xformers (a pass for each size of
crops; BlockDiagonalMask split rows) and FSDP.
"""

import argparse
import csv
import dataclasses
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

import torch.distributed as dist

import dinoreg
import pretrain
import pretrain_images
import pretrain_run
import training_parts

SCRIPT = Path(pretrain.__file__)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fixed parameters: factors near 1, others near 0."""
    factors = ("norm1.weight", "norm2.weight", "norm.weight", "gamma", "weight_g")
    for i, (name, parameter) in enumerate(sorted(module.named_parameters())):
        parameter.copy_(float(name.endswith(factors)) + 0.2 * randn(seed + i, *parameter.shape))
    return module


def project(module: torch.nn.Module) -> float:
    """All parameters as one number, without the key biases, whose gradients are rounding errors."""
    parameters = enumerate(sorted(module.named_parameters()))
    return sum(
        (p * randn(7000 + i, *p.shape)).double().sum().item()
        for i, (name, p) in parameters
        if "qkv.bias" not in name
    )


def close(ours, official, tolerance: float = 1e-6) -> bool:
    return np.allclose(ours, official, rtol=tolerance, atol=tolerance)


# The official code


@pytest.mark.parametrize("nlayers, official", [
    (1, [[[-0.0677088, -0.7521507, -0.7779112], [0.4876434, -0.5557063, -0.7885796]]]),
    (3, [[[0.2297517, -0.1871182, 0.7544487], [0.1174646, -0.1942654, 0.7691037]]]),
])  # fmt: skip
def test_heads_compute_what_official_ones_do(nlayers, official):
    head = fill(
        pretrain.DINOHead(in_dim=5, out_dim=3, hidden_dim=6, bottleneck_dim=4, nlayers=nlayers),
        seed=0,
    )
    assert close(head(randn(50, 2, 5)).tolist(), official)
    mlp = ["mlp"] if nlayers == 1 else ["mlp.0", "mlp.2", "mlp.4"]
    names = [f"{layer}.{kind}" for layer in mlp for kind in ("weight", "bias")]
    assert list(head.state_dict()) == [*names, "last_layer.weight_g", "last_layer.weight_v"]
    assert head(randn(0, 0, 5)).shape == (0, 3)


def test_sinkhorn_knopp():
    official = [
        [0.6729524, 0.1214879, 0.00025438, 0.2053054],
        [0.0474077, 0.00038447, 0.4390382, 0.5131697],
        [0.0140764, 0.6595879, 0.3139347, 0.0124009],
    ]
    assert close(pretrain.sinkhorn_knopp(randn(1, 3, 4), 0.3).tolist(), official)
    official = [
        [0.6517643, 0.1636928, 0.00026241, 0.1842806],
        [0.0478311, 0.00053965, 0.4717904, 0.4798388],
        [0.0110182, 0.7182614, 0.2617244, 0.0089960],
    ]
    assert close(pretrain.sinkhorn_knopp(randn(1, 3, 4), 0.3, iterations=1).tolist(), official)
    assert pretrain.sinkhorn_knopp(torch.zeros(0, 4), 0.3).shape == (0, 4)
    assert pretrain.sinkhorn_knopp(randn(1, 3, 4).half(), 0.3).dtype == torch.float32


def test_sinkhorn_knopp_of_large_logits():
    logits = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits[:, 2], logits[1] = -1.0, 0.9 * logits[1] - 3.0  # like no image; like no prototype
    for temperature in (0.02, 0.04):
        exact = (logits.double() / temperature).exp()  # as the official code, in float64
        for _ in range(3):
            exact /= exact.sum(dim=0)
            exact /= exact.sum(dim=1, keepdim=True)
        assert close(training_parts.sinkhorn_knopp(logits, temperature), exact, 1e-4)
    assert training_parts.sinkhorn_knopp(100 * logits, 0.02).sum() == pytest.approx(6)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_losses_in_a_process_group(process_group):
    x = randn(6, 5, 4)
    with torch.no_grad():
        assert close(training_parts.koleo_loss(x).item(), 0.2782086)
    probs = training_parts.sinkhorn_knopp(randn(1, 3, 4), 0.3)
    assert close(probs[0].tolist(), [0.6729524, 0.1214879, 0.00025438, 0.2053054])


def test_moving_center():
    official = [
        [0.00049787, 0.00465157, 0.00000189, 0.9948487],
        [0.00039107, 0.02621707, 0.9682801, 0.00511172],
        [0.00000671, 0.00003096, 0.00168249, 0.9982799],
    ]
    center = torch.zeros(1, 4)
    for seed in range(3):
        probs = pretrain.softmax_center(randn(seed, 3, 4), 0.3, center)
    assert close(probs.tolist(), official)
    official = [[0.0705921, -0.1596101, 0.1002679, 0.0684264]]
    assert close(center.tolist(), official)
    assert pretrain.softmax_center(torch.zeros(0, 4), 0.3, center).shape == (0, 4)
    assert close(center.tolist(), official)  # not a mean of no patches


def test_losses():
    assert close(
        pretrain.dino_loss(randn(2, 3, 2, 4), randn(3, 2, 2, 4).softmax(-1), 0.1).item(), 77.29222
    )
    masks = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    assert close(
        pretrain.ibot_loss(randn(4, 3, 4), randn(5, 3, 4).softmax(-1), masks, 0.1).item(), 7.7382445
    )
    for images, official in ((1, 17.3220692), (2, 0.3862091), (5, 0.2782086)):
        assert close(pretrain.koleo_loss(randn(6, images, 4)).item(), official)
    assert close(pretrain.koleo_loss(torch.ones(3, 4)).item(), 17.3220692)


def test_loss_without_masked_patches():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = pretrain.ibot_loss(logits, torch.zeros(0, 4), torch.zeros(2, 9, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(dtype):
    x, probs, masks = (
        randn(0, 2, 6, 8).to(dtype),
        randn(1, 2, 6, 8).softmax(-1),
        torch.ones(2, 3, dtype=torch.bool),
    )
    assert pretrain.dino_loss(x, probs, 0.1) == pretrain.dino_loss(x.float(), probs, 0.1)
    assert pretrain.ibot_loss(x[0], probs[0], masks, 0.1) == pretrain.ibot_loss(
        x[0].float(), probs[0], masks, 0.1
    )
    assert pretrain.koleo_loss(x[0]) == pretrain.koleo_loss(x[0].float())
    assert pretrain.koleo_loss(torch.ones(3, 8, dtype=dtype)).isfinite()


@pytest.mark.parametrize("h, w, count, official", [
    # mean and standard deviation, over 20,000 masks, of: masked patches, changes down and across,
    # patches at the border
    (16, 16, 60, [(59.936, 0.247), (23.96, 7.15), (23.91, 7.20), (5.12, 4.50)]),
    (7, 9, 20, [(19.966, 0.183), (10.07, 3.76), (10.56, 3.59), (5.58, 3.05)]),
])  # fmt: skip
def test_masks_are_distributed_as_official_ones(h, w, count, official):
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack(
        [training_parts.random_mask(h, w, count, generator) for _ in range(1000)]
    ).int()
    border = masks[:, [0, -1]].sum((1, 2)) + masks[:, :, [0, -1]].sum((1, 2))
    found = (
        masks.sum((1, 2)),
        masks.diff(dim=1).abs().sum((1, 2)),
        masks.diff(dim=2).abs().sum((1, 2)),
        border,
    )
    assert masks.sum((1, 2)).max() <= count
    for values, (mean, std) in zip(found, official):
        assert abs(values.float().mean() - mean) < 4 * std / 1000**0.5


def test_an_empty_mask():
    assert not training_parts.random_mask(4, 4, 0).any()


def test_schedules():
    official = [1, 4 / 3, 5 / 3, 2, 2, 1.8995191, 1.625, 1.25, 0.875, 0.6004809, 0.5, 0.5]
    assert close(
        [training_parts.cosine(step, 2.0, 0.5, 10, 4, 1.0) for step in range(12)], official
    )
    assert close(
        [training_parts.cosine(step, 0.07, 0.07, 3, 3, 0.04) for step in range(5)],
        [0.04, 0.055, 0.07, 0.07, 0.07],
    )
    recipe = pretrain.Recipe(
        batch_size=256,
        epochs=4,
        warmup_epochs=1,
        freeze_last_layer_epochs=1,
        freeze_epochs=0,
        base_lr=1.0,
        min_lr=0.0,
    )
    now = [pretrain.schedule(recipe, step, epoch_length=2) for step in range(8)]
    assert [row["lr"] for row in now][:3] == [0, 0.5, 0.5]
    assert [row["last_layer_lr"] > 0 for row in now] == [False] * 2 + [True] * 6
    assert [row["backbone_lr"] for row in now] == [row["lr"] for row in now]


def test_schedule_of_new_heads_on_a_trained_backbone():
    recipe = dataclasses.replace(pretrain.CONTINUE, batch_size=1024, base_lr=1.0)
    now = [pretrain.schedule(recipe, step, epoch_length=10) for step in range(200)]
    for row in now[:10]:  # an epoch
        assert row["backbone_lr"] == 0
        assert row["last_layer_lr"] == row["lr"] == pytest.approx(1, abs=0.01)
    rates = [row["backbone_lr"] for row in now[10:]]
    assert rates[0] == 0 and max(rates) == rates[9] == pytest.approx(recipe.backbone_lr_mult)


def test_initial_weights_of_unit_variance():
    torch.manual_seed(0)
    config = dinoreg.Config(embed_dim=32, depth=2, num_heads=2, patch_size=4, image_size=32)
    backbone = dinoreg.DinoVisionTransformer(config)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    training_parts.init_unit_variance(backbone)
    stds = {
        name: parameter.std().item()
        for name, parameter in backbone.named_parameters()
        if parameter.numel() > 64
    }
    assert stds["pos_embed"] == pytest.approx(1, abs=0.1) and stds[
        "register_tokens"
    ] == pytest.approx(1, abs=0.3)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        width = 128 if name == "mlp.fc2" else 32
        assert stds[f"blocks.1.{name}.weight"] == pytest.approx(width**-0.5, rel=0.1), name
    for name in (
        "patch_embed.proj.weight",
        "mask_token",
        "blocks.0.norm1.weight",
        "blocks.0.mlp.fc1.bias",
    ):
        assert torch.equal(before[name], backbone.state_dict()[name]), name


def tiny_network(**constants) -> tuple[pretrain.Network, pretrain.Recipe]:
    recipe = dict(
        prototypes=6,
        bottleneck_dim=4,
        hidden_dim=7,
        ibot_prototypes=5,
        ibot_bottleneck_dim=3,
        local_crops=3,
    )
    recipe = pretrain.Recipe(**(recipe | dict(layerwise_decay=0.9, clip_grad=0.5) | constants))
    config = dinoreg.Config(
        embed_dim=8, depth=2, num_heads=2, patch_size=4, image_size=16, num_register_tokens=2
    )
    return pretrain.Network(dinoreg.DinoVisionTransformer(config), recipe), recipe


def test_parameter_groups():
    network, _ = tiny_network()
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = {
        names[p]: group
        for group in training_parts.parameter_groups(network, 0.9, 0.2)
        for p in group["params"]
    }
    assert len(groups) == len(names)
    official = {
        "backbone.cls_token": (0.729, 1, False),
        "backbone.pos_embed": (0.729, 1, False),
        "backbone.register_tokens": (0.729, 1, False),
        "backbone.mask_token": (0.729, 1, False),
        "backbone.patch_embed.proj.weight": (0.1458, 1, False),
        "backbone.patch_embed.proj.bias": (0.1458, 0, False),
        "backbone.blocks.0.norm1.weight": (0.81, 0, False),
        "backbone.blocks.0.attn.qkv.weight": (0.81, 1, False),
        "backbone.blocks.1.ls1.gamma": (0.9, 0, False),
        "backbone.blocks.1.mlp.fc2.bias": (0.9, 0, False),
        "backbone.norm.weight": (1, 0, False),
        "dino_head.mlp.0.weight": (1, 1, False),
        "dino_head.mlp.0.bias": (1, 0, False),
        "ibot_head.last_layer.weight_g": (1, 1, True),
        "ibot_head.last_layer.weight_v": (1, 1, True),
    }
    for name, (lr_multiplier, wd_multiplier, is_last_layer) in official.items():
        assert groups[name]["lr_multiplier"] == pytest.approx(lr_multiplier), name
        assert groups[name]["wd_multiplier"] == wd_multiplier, name
        assert (groups[name]["schedule"] == "last_layer_lr") == is_last_layer, name


NOW = dict(
    lr=0.01, backbone_lr=0.01, last_layer_lr=0.001, weight_decay=0.1, momentum=0.9, teacher_temp=0.3
)


def take_step(networks, optimizer, recipe, step, masked=True, copies=1):
    student, teacher = networks
    masks = torch.zeros(4, 16, dtype=torch.bool)
    if masked:
        masks[[0, 0, 0, 2, 2, 2, 2, 2, 3], [1, 2, 5, 0, 4, 8, 12, 13, 7]] = True
    part = [randn(10 + step, 4, 3, 16, 16), randn(20 + step, 6, 3, 8, 8)], masks
    terms = pretrain.train_step(student, teacher, teacher, optimizer, [part] * copies, recipe, NOW)
    return [terms[name].item() for name in ("dino_global", "dino_local", "ibot", "koleo")]


def make_networks(**constants):
    student, recipe = tiny_network(**constants)
    teacher = fill(tiny_network(**constants)[0], 300).eval().requires_grad_(False)
    groups = training_parts.parameter_groups(
        fill(student, 100).train(), recipe.layerwise_decay, recipe.patch_embed_lr_mult
    )
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
    return (student, teacher), optimizer, recipe


@pytest.mark.parametrize("constants, masked, official, student, teacher", [
    # the official log has half of the losses of patches, and a twentieth of KoLeo
    (dict(), True,
     [(1.1156299, 3.3424697, 2 * 4.4875212, 20 * 0.1305323),
      (1.0806395, 3.2475016, 2 * 3.6452630, 20 * 0.1054990)],
     6.5539611, 0.8569518),
    (dict(centering="centering", ibot_prototypes=0), True,
     [(1.6177883, 4.8468533, 2 * 2.3782206, 20 * 0.1305323),
      (1.1753440, 3.5299563, 2 * 1.8844293, 20 * 0.0919411)],
     3.8366259, -0.4978066),
    (dict(ibot_prototypes=0), False,
     [(1.1162097, 3.3424697, 0, 20 * 0.1217332), (1.0509771, 3.1644669, 0, 20 * 0.0495736)],
     4.7851134, -0.3508773),
])  # fmt: skip
def test_two_steps_are_those_of_the_official_code(constants, masked, official, student, teacher):
    networks, optimizer, recipe = make_networks(**constants)
    found = [take_step(networks, optimizer, recipe, step, masked) for step in range(2)]
    assert close(found, official, 2e-6)
    assert close([project(network) for network in networks], [student, teacher])


def test_accumulated_gradients_are_their_mean():
    results = []
    for copies in (1, 3):
        networks, optimizer, recipe = make_networks()
        results.append(
            (take_step(networks, optimizer, recipe, 0, copies=copies), project(networks[0]))
        )
    assert close(*(losses for losses, _ in results)) and close(
        *(parameters for _, parameters in results)
    )


def test_gradients_of_a_frozen_backbone():
    (student, teacher), optimizer, recipe = make_networks(clip_grad=0.0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.backbone.requires_grad_(False)
    take_step((student, teacher), optimizer, recipe, 0)
    for name, tensor in student.named_parameters():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone"), name


def test_no_clipping():
    results = []
    for clip_grad in (0.0, 1e9):
        networks, optimizer, recipe = make_networks(clip_grad=clip_grad)
        take_step(networks, optimizer, recipe, 0)
        results.append(project(networks[0]))
    assert results[0] == results[1]


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_autograd_keeps(ffn, checkpointing):
    config = dinoreg.Config(embed_dim=192, depth=4, num_heads=3, image_size=112, ffn=ffn)
    constants = dict(prototypes=256, ibot_prototypes=256, bottleneck_dim=32, hidden_dim=64)
    recipe = dataclasses.replace(pretrain.ONE_GPU, global_size=112, local_crops=2, **constants)
    student = pretrain.Network(dinoreg.DinoVisionTransformer(config), recipe).train()
    student.backbone.grad_checkpointing = checkpointing
    parameters = {p.untyped_storage()._cdata for p in student.parameters()}

    def kept(images: int) -> int:
        storages = {}

        def pack(x):
            storage = x.untyped_storage()
            if storage._cdata not in parameters:
                storages[storage._cdata] = storage
            return x

        crops = [torch.randn(2 * images, 3, 112, 112), torch.randn(2 * images, 3, 98, 98)]
        unpacked = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with unpacked, torch.autocast("cpu", torch.bfloat16):
            student.backbone(crops, is_training=True)
        return sum(storage.nbytes() for storage in storages.values())

    recipe = dataclasses.replace(recipe, prototypes=1, ibot_prototypes=1)  # none but the backbone's
    _, each = pretrain_run.estimate_memory(student, None, recipe, checkpointing)
    found = (kept(3) - kept(1)) / 2 / 2**30
    if checkpointing:  # and what one block computes anew
        tokens, hidden = 2 * (64 + 5) + 2 * (49 + 5), config.hidden_dim
        found += tokens * (26 * 192 + (8 if ffn == "swiglu" else 4) * hidden) / 2**30
    assert each == pytest.approx(found, rel=0.15)


# Images


def test_files_are_those_that_dinoreg_finds(folder, tmp_path):
    files = pretrain.Files(folder)
    assert list(files) == files[:] == dinoreg.find_images([folder])
    assert files[3:9:2] == files[:][3:9:2] and files[-2:] == files[:][-2:]
    for name in ("b/\u00e9\u20ac.png", "a.jpg", ".hidden.png", "note.txt", "x.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert set(pretrain.Files(tmp_path)) == set(dinoreg.find_images([tmp_path]))
    assert len(pretrain.Files(tmp_path)) == 2 and len(pretrain.Files(tmp_path, [".npy"])) == 3
    before = files.digest()
    (folder / "across" / "0.png").rename(folder / "across" / "other.png")
    assert pretrain.Files(folder).digest() != before
    (folder / "across" / "other.png").rename(folder / "across" / "0.png")
    assert pretrain.Files(folder).digest() == before


def test_paths_of_many_files_are_two_tensors(tmp_path):
    for i in range(100):
        (tmp_path / f"image{i:08}.jpg").touch()
    files = pretrain.Files(tmp_path)
    held = [x for x in vars(files).values() if not isinstance(x, Path)]
    assert all(isinstance(x, torch.Tensor) for x in held)
    assert sum(x.nbytes for x in held) < 30 * len(files)


def test_levels_and_channels_of_images(tmp_path):
    read, levels = pretrain_images.read_image, np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "x.png")
    Image.fromarray(levels).save(tmp_path / "x.tif")
    np.save(tmp_path / "x.npy", levels)
    for name in ("x.png", "x.tif", "x.npy"):
        for channels in (1, 3):
            x = read(tmp_path / name, channels, 4095.0, 64)
            x = torch.from_numpy(np.array(x)) if isinstance(x, Image.Image) else x
            assert x.shape == (channels, 64, 64) and len(x.unique()) == 256, name
        assert len(read(tmp_path / name, 1, 0.0, 64).unique()) == 17
    pages = [Image.fromarray(np.full((8, 9), 10 * i, np.uint8)) for i in range(5)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    np.save(tmp_path / "last.npy", np.stack([np.asarray(page) for page in pages], axis=-1))
    for name in ("pages.tif", "last.npy"):
        x = read(tmp_path / name, 5, 0.0, 8)
        assert x.shape == (5, 8, 9) and x[:, 0, 0].tolist() == [0, 10, 20, 30, 40]
        with pytest.raises(ValueError, match="not of 4 channels"):
            read(tmp_path / name, 4, 0.0, 8)
    pages[4].convert("RGB").save(tmp_path / "rgb.png")
    assert read(tmp_path / "rgb.png", 1, 0.0, 8)[0, 0, 0] == 40


def test_large_jpeg_files_are_decoded_smaller(tmp_path):
    Image.new("RGB", (640, 480), (200, 30, 90)).save(tmp_path / "x.jpg")
    recipe = pretrain.Recipe(global_size=56, local_size=28)
    read = pretrain.Crops([tmp_path / "x.jpg"], recipe, 1, 4).read
    assert 28 / (0.05 * 3 / 4) ** 0.5 <= min(read(tmp_path / "x.jpg").size) < 480
    Image.new("RGB", (640, 480)).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png").size == (640, 480)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images of stripes across and twelve of stripes down, in folders of these names."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("across", "down"):
        (folder / name).mkdir()
        for i in range(12):
            stripes = np.full((32, 32, 3), 40) + 150 * (np.arange(32) // 4 % 2)[:, None, None]
            pixels = (stripes if name == "across" else stripes.transpose(1, 0, 2)) + rng.integers(
                0, 60, (32, 32, 3)
            )
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_crops_depend_on_batch_and_place_alone(folder):
    recipe = pretrain.Recipe(global_size=28, local_size=14, local_crops=3)
    paths = dinoreg.find_images([folder])
    items = [pretrain.Crops(paths, recipe, 8, 4)[key] for key in ((1, 2), (1, 3), (1, 2))]
    (first, first_masks, _), (other, _, _), (again, again_masks, _) = items
    assert [stack.shape for stack in first] == [(2, 3, 28, 28), (3, 3, 14, 14)] and first[
        0
    ].dtype == torch.uint8
    assert all(map(torch.equal, first, again)) and torch.equal(first_masks, again_masks)
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0][0], first[0][1])


def test_rotated_crops(folder):
    recipe = pretrain.Recipe(
        global_size=28, local_crops=0, flip=0, jitter=0, gray=0, blur=(0, 0, 0), global_scale=(1, 1)
    )
    paths = dinoreg.find_images([folder])
    straight, rotated = (
        pretrain.Crops(paths, dataclasses.replace(recipe, rotate=degrees, solarize=0), 8, 4)[0, 0][
            0
        ][0]
        for degrees in (0, 45)
    )
    assert straight.min() > 0 and (rotated == 0).any()  # black corners


def test_a_batch_has_all_images_and_evenly_spread_masks(folder):
    recipe = pretrain.Recipe(global_size=224, local_size=98, local_crops=0)
    paths = dinoreg.find_images([folder])
    dataset = pretrain.Crops(paths, recipe, 24, 16)
    crops, masks, _ = zip(*(dataset[0, i] for i in range(24)))
    assert all(len(stacks) == 1 and stacks[0].shape == (2, 3, 224, 224) for stacks in crops)
    shares = sorted(torch.cat(masks).float().mean(dim=1).tolist())
    assert shares[:24] == [0] * 24
    # The official collate draws one share between each two of these.
    bounds = np.linspace(0.1, 0.5, 25)
    assert all(
        low - 0.02 < share <= high for share, low, high in zip(shares[24:], bounds, bounds[1:])
    )
    assert sorted(pretrain_images.permutation(24, 0, 0, 0)) == list(range(24))


# Runs

OPTIONS = dict(
    device="cpu", workers=0, preset="laptop", batch_size=8, epochs=3, warmup_epochs=1,
    freeze_last_layer_epochs=0, global_size=28, local_size=14, local_crops=2,
    prototypes=16, ibot_prototypes=16, hidden_dim=16, bottleneck_dim=8, ibot_bottleneck_dim=8,
)  # fmt: skip
TINY = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
ARCHITECTURE = ["--patch-size=7", "--embed-dim=16", "--depth=2", "--num-heads=2"]


def leave_out_curves(monkeypatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.subplots", lambda *args: np.empty(0))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch())


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process, which saves the seconds of its imports, and draw no curves,
    which takes longest.
    """
    leave_out_curves(monkeypatch)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(folder: Path, output: Path, *options):
        new = [] if "--model" in options else ARCHITECTURE
        monkeypatch.setattr(
            sys, "argv", [*map(str, ["pretrain.py", folder, "-o", output, *TINY, *new, *options])]
        )
        try:
            status = pretrain.main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return call


TIMES = ("waited", "seconds", "images_per_s")


def curve(output: Path) -> list[dict]:
    """The log without what depends on the machine."""
    with (output / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: float(x or "nan") for key, x in row.items() if key not in TIMES} for row in rows]


def test_a_run_from_scratch(run, folder, tmp_path):
    result = run(folder, tmp_path / "run")
    assert result.status == 0 and "pretrain:" not in result.err
    assert result.out.count("\nepoch") == 3 and "k-NN on pixels" in result.out
    assert "memory of a GPU for 8 images" in result.out
    model, rows = dinoreg.load(tmp_path / "run" / "teacher.safetensors"), curve(tmp_path / "run")
    assert model.config.num_register_tokens == 4 and model.transform.size == (28, 28)
    assert (
        [row["epoch"] for row in rows] == [1, 2, 3]
        and rows[-1]["loss"] < rows[0]["loss"]
        and 0 <= rows[-1]["knn"] <= 1
    )
    assert run(folder, tmp_path / "run").out == ""  # nothing is left to do


def test_curves(tmp_path):
    terms = dict(step=3, loss=2.0, koleo=1.0, entropy=0.5, information=1e-6, gradient=1.0, lr=1e-3)
    history = [dict(epoch=epoch, **terms) for epoch in (1, 2)]
    pretrain_run.write_log(history, tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000 and len(image.getcolors(10**6)) > 10
    assert [row["epoch"] for row in curve(tmp_path)] == [1, 2]


def test_an_interrupted_run_continues_on_the_same_curve(run, folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole")
    step, calls = pretrain.train_step, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 5:  # in the second epoch of three steps
            signal.raise_signal(signal.SIGINT)
        if len(calls) == 8:  # killed in the third, of which nothing is saved
            raise RuntimeError("killed")
        return step(*args)

    monkeypatch.setattr(pretrain, "train_step", interrupt)
    assert run(folder, tmp_path / "parts").status == 130
    assert len(calls) == 5 and len(curve(tmp_path / "parts")) == 1
    assert "killed" in run(folder, tmp_path / "parts").err
    assert len(calls) == 8 and len(curve(tmp_path / "parts")) == 2
    assert run(folder, tmp_path / "parts").status == 0
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    parts, whole = (
        dinoreg.load(tmp_path / name / "teacher.safetensors").state_dict()
        for name in ("parts", "whole")
    )
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder) -> Path:
    """A finished run of one epoch, with images of another normalization."""
    output = tmp_path_factory.mktemp("trained") / "run"
    options = [*TINY, *ARCHITECTURE, "--epochs=1", "--embed-dim=32"]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_curves(patch)
        assert pretrain.main([str(folder), "-o", str(output), *options]) == 0
    model = dinoreg.load(output / "teacher.safetensors")
    model.transform = dataclasses.replace(model.transform, mean=MEAN)
    dinoreg.save(model, output / "teacher.safetensors")
    return output


MEAN = (0.7, 0.5, 0.6)


def test_heads_learn_before_a_trained_backbone(run, folder, tmp_path, trained, monkeypatch):
    weights = trained / "teacher.safetensors"
    step, learning = pretrain.train_step, []

    def observe(student, *args):
        learning.append(student.backbone.norm.weight.requires_grad)
        return step(student, *args)

    monkeypatch.setattr(pretrain, "train_step", observe)
    options = ("--model", weights, "--freeze-epochs", 2, "--warmup-epochs", 0)
    before = dinoreg.load(weights)
    for epochs in (2, 3):
        assert run(folder, tmp_path / str(epochs), *options, "--epochs", epochs).status == 0
        after = dinoreg.load(tmp_path / str(epochs) / "teacher.safetensors")
        tensors = before.state_dict().items()
        same = [torch.equal(after.state_dict()[key], tensor) for key, tensor in tensors]
        assert all(same) if epochs == 2 else not any(same[:4])
        assert after.transform.mean == MEAN
    assert learning == [False] * 6 + [False] * 6 + [True] * 3
    # The backbone that did not learn is not in the checkpoint, and yet the run can go on.
    saved = torch.load(tmp_path / "2" / "checkpoint.pth", weights_only=True)
    assert not any(key.startswith("backbone") for key in saved["student"])
    assert run(folder, tmp_path / "2", *options, "--epochs", 3).status == 0
    assert learning[15:] == [True] * 3


def test_the_heads_of_a_run_are_taken(run, folder, tmp_path, trained, monkeypatch):
    starts, train_step = [], pretrain.train_step

    def observe(student, teacher, *args):
        networks = (student, teacher)
        starts.append([{k: x.clone() for k, x in one.state_dict().items()} for one in networks])
        return train_step(student, teacher, *args)

    monkeypatch.setattr(pretrain, "train_step", observe)
    options = ("--model", trained, "--epochs", 1, "--global-size", 42)  # of 28 before
    result = run(folder, tmp_path / "run", *options)
    assert result.status == 0, result.err
    expected = torch.load(trained / "checkpoint.pth", weights_only=True)["ema"]
    for start in starts[0]:
        for key in start:
            if key != "backbone.pos_embed":
                assert torch.equal(start[key], expected[key]), key
        assert start["backbone.pos_embed"].shape == (1, 1 + 36, 32)
    result = run(folder, tmp_path / "other", "--model", trained, "--prototypes", 17)
    assert result.status == 2 and result.err.endswith("have prototypes 16\n")
    result = run(folder, tmp_path / "other", "--model", folder)
    assert result.status == 2 and "no run of pretrain.py" in result.err


def test_continuing_is_the_default_for_weights():
    parser = argparse.ArgumentParser()
    pretrain.add_options(parser)
    for options, recipe in (([], pretrain.ONE_GPU), (["--model", "x"], pretrain.CONTINUE)):
        args = parser.parse_args(["images", "-o", "run", *options])
        assert pretrain.choose(args)[1] == recipe


def measure_live_bytes() -> int:
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided
        if plain and not x.is_meta:  # not those of other tests
            for tensor in (x, x.grad) if x.is_leaf else (x,):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_distillation(run, folder, tmp_path, trained, monkeypatch):
    config = dinoreg.Config(
        embed_dim=256, depth=3, num_heads=4, patch_size=7, image_size=28, drop_path_rate=0.1
    )
    large = dinoreg.DinoVisionTransformer(config)
    large.transform = dataclasses.replace(dinoreg.Transform().at_size(28), mean=MEAN)
    weights, size = tmp_path / "large.safetensors", sum(p.nbytes for p in large.parameters())
    dinoreg.save(large, weights)
    live, means, steps = [], [], []
    step, normalize = pretrain.train_step, pretrain_images.normalize

    def observe(*args):
        result = step(*args)
        steps.append(step)
        if len(steps) in (3, 12):  # the last one of the teacher's heads, and of the student
            live.append(measure_live_bytes())
        return result

    def note(pixels, transform):
        means.append(transform.mean)
        return normalize(pixels, transform)

    monkeypatch.setattr(pretrain, "train_step", observe)
    monkeypatch.setattr(pretrain_images, "normalize", note)
    del large
    before = measure_live_bytes()
    options = ("--teacher", weights, "--freeze-epochs", 1, "--centering", "centering")
    result = run(folder, tmp_path / "small", *options)
    assert result.status == 0 and result.out.count("\nepoch") == 1 + 3, result.err
    assert len(live) == 2
    assert max(live) - before < 1.25 * size  # the teacher once, and small networks
    student = dinoreg.load(tmp_path / "small" / "teacher.safetensors")
    assert student.embed_dim == 16 and student.transform.mean == MEAN and set(means) == {MEAN}
    heads = dinoreg.load(tmp_path / "small" / "heads" / "teacher.safetensors").state_dict()
    teacher = dinoreg.load(weights).state_dict()
    assert all(torch.equal(heads[key], teacher[key]) for key in teacher)
    saved = torch.load(tmp_path / "small" / "checkpoint.pth", weights_only=True)
    assert {key.partition(".")[0] for key in saved["teacher"]} >= {"dino_head", "dino_center"}
    assert not any(key.startswith("backbone") for key in saved["teacher"])
    rows = curve(tmp_path / "small")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_images_that_cannot_be_read_are_named_and_left_out(run, folder, tmp_path):
    broken = tmp_path / "images" / "broken.png"
    broken.parent.mkdir()
    for i, path in enumerate(dinoreg.find_images([folder])[:12]):
        (broken.parent / f"{i}.png").write_bytes(path.read_bytes())
    broken.write_bytes(path.read_bytes()[:100])
    result = run(broken.parent, tmp_path / "run", "--epochs", 4)
    assert (
        result.status == 1 and result.err.count(str(broken)) == 1 and result.out.count("epoch") == 4
    )
    for path in dinoreg.find_images([broken.parent]):
        path.write_bytes(b"no image")
    result = run(broken.parent, tmp_path / "none")
    assert result.status == 2 and result.err.endswith("none of the images can be read\n")


def test_a_collapse_is_reported(run, tmp_path):
    for i in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{i}.png")
    result = run(
        tmp_path / "images", tmp_path / "run", "--drop-path-rate", 0, "--mask-probability", 0
    )
    assert result.status == 0 and result.err.count("collapsed") == 2  # not in the warm-up


@pytest.mark.parametrize("options, message", [
    (["--batch-size", "25"], "--batch-size must be at most 24"),
    (["--batch-size", "9", "--accumulate", "2"], "a multiple of 2"),
    (["--local-size", "15"], "15 x 15 pixels are not multiples of 7"),
    (["--num-heads", "3"], "num_heads must divide embed_dim 16"),
    (["--model", "x.safetensors", "--depth", "3"],
     "--model has its own architecture: leave out --depth"),
    (["--model", "missing.safetensors"], "missing.safetensors"),
    (["--model", "x.safetensors", "--config", "vitl14_reg"], "leave out --config"),
    (["--model", "x.safetensors", "--init", "unit"], "leave out --init"),
    (["--accumulate", "0"], "a multiple of 0"),
    (["--mask-ratio", "0.5"], "expected 2 arguments"),
    (["--batch-size", "0"], "--batch-size must be at most 24"),
    (["--local-crops", "-1"], "--local-crops must be at least 0, got -1"),
    (["--patch-size", "0"], "--patch-size must be at least 1, got 0"),
    (["--ffn", "moe"], "invalid choice: 'moe'"),
    (["--centering", "none"], "invalid choice: 'none'"),
    (["--val", "missing"], "missing: no folder with images"),
])  # fmt: skip
def test_bad_options(run, folder, tmp_path, options, message):
    result = run(folder, tmp_path / "run", *options)
    assert (
        result.status == 2
        and message in result.err
        and not (tmp_path / "run" / "checkpoint.pth").exists()
    )


def test_a_folder_without_images(run, tmp_path):
    assert run(tmp_path, tmp_path / "run").err == f"pretrain: {tmp_path}: no folder with images\n"


def test_what_differs_from_the_run_is_named(run, folder, tmp_path, trained):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((trained / "teacher.safetensors").read_bytes())
    options = ("--epochs", 1, "--model")
    assert run(folder, tmp_path / "run", *options, weights).status == 0
    same = weights.rename(tmp_path / "same.safetensors")
    result = run(folder, tmp_path / "run", *options, same, "--epochs", 2)
    assert result.out.startswith("the run was started with --epochs 1.0, now 2.0\n")
    assert result.status == 0 and len(curve(tmp_path / "run")) == 2
    again = (*options, same, "--epochs", 2)
    rates = ("--base-lr", 1e-4, "--clip-grad", 1, "--workers", 1, "--accumulate", 2)
    result = run(folder, tmp_path / "run", *again, *rates)
    assert result.status == 0 and "--base-lr 0.006, now 0.0001" in result.out
    other = dinoreg.load(same)
    torch.nn.init.ones_(other.norm.bias)
    dinoreg.save(other, tmp_path / "other.safetensors")
    for changed, message in (
        (("--batch-size", 4, "--prototypes", 8), "--prototypes 16, now 8; --batch-size 8, now 4"),
        (("--model", tmp_path / "other.safetensors"), "started with model "),
    ):
        result = run(folder, tmp_path / "run", *again, *changed)
        assert result.status == 2 and message in result.err and len(result.err.splitlines()) == 1
    (folder / "down" / "new.png").write_bytes((folder / "down" / "0.png").read_bytes())
    result = run(folder, tmp_path / "run", *again)
    (folder / "down" / "new.png").unlink()
    assert result.status == 2 and "images 24 files" in result.err and "now 25 files" in result.err


def test_a_resumed_run_frees_its_checkpoint(run, folder, tmp_path, monkeypatch):
    step, steps, live = pretrain.train_step, [], []

    def observe(*args):
        result = step(*args)
        steps.append(step)
        if len(steps) in (3, 4):  # the last step before, and the first after resuming
            live.append(measure_live_bytes())
        return result

    monkeypatch.setattr(pretrain, "train_step", observe)
    run(folder, tmp_path / "run", "--epochs", 1, "--embed-dim", 128)
    run(folder, tmp_path / "run", "--epochs", 2, "--embed-dim", 128)
    assert live[1] < 1.05 * live[0]


@pytest.mark.parametrize("name", ["teacher.safetensors", "log.csv"])
def test_outputs_that_were_not_written_are_written_again(run, folder, tmp_path, monkeypatch, name):
    output, write = tmp_path / "run", dinoreg.save if name != "log.csv" else pretrain_run.write_log
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(*args)

    with monkeypatch.context() as patch:
        if name == "log.csv":
            patch.setattr(pretrain_run, "write_log", fail)
        else:
            patch.setattr(dinoreg, "save", fail)
        assert run(folder, output).status == 2
    for _ in range(2):
        assert run(folder, output).status == 0
        saved = torch.load(output / "checkpoint.pth", weights_only=True)
        model = dinoreg.load(output / "teacher.safetensors")
        assert saved["step"] == 9 and len(curve(output)) == 3
        assert torch.equal(model.cls_token, saved["ema"]["backbone.cls_token"])
        (output / name).unlink()


def test_checkpoints_that_are_kept(run, folder, tmp_path):
    output = tmp_path / "run"
    run(folder, output, "--keep-every", 4, "--every", 3)
    names = {path.name for path in output.iterdir()}
    assert names > {"checkpoint_4.pth", "teacher_8.safetensors", "checkpoint_previous.pth"}
    steps = {name: torch.load(output / name, weights_only=True)["step"] for name in names
             if name.endswith(".pth")}  # fmt: skip
    assert sorted(steps.values()) == [4, 8, 8, 9] and steps["checkpoint_previous.pth"] == 8
    last = torch.load(output / "checkpoint.pth", weights_only=True)
    (output / "checkpoint.pth").unlink()
    assert run(folder, output, "--keep-every", 4).status == 0
    again = torch.load(output / "checkpoint.pth", weights_only=True)
    assert all(torch.equal(again["ema"][key], x) for key, x in last["ema"].items())


@pytest.mark.parametrize("name, contents, message", [
    ("checkpoint.pth", b"PK garbage", "checkpoint.pth: "),
    ("checkpoint.pth", {"model": torch.zeros(2)}, "not a checkpoint of this version"),
    ("checkpoint.pth", {"settings": "an earlier version"}, "not a checkpoint of this version"),
    ("checkpoint.pth", {"settings": {}}, "checkpoint.pth: "),
    ("log.csv", b"my,own,notes", "has log.csv, but no checkpoint"),
    ("teacher.safetensors", b"my own", "has teacher.safetensors, but no checkpoint"),
])  # fmt: skip
def test_files_of_others_are_left_alone(run, folder, tmp_path, name, contents, message):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    before = path.read_bytes()
    result = run(folder, tmp_path / "run")
    assert result.status == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_progress(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        pretrain_run, "time", SimpleNamespace(monotonic=iter(range(0, 900, 6)).__next__)
    )
    result = run(folder, tmp_path / "run")
    lines = [line for line in result.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 4, result.err  # every ten seconds: after 12, 24, 36 and 48
    for word in ("of 9: loss ", " images/s, ", "waiting for images, ", " left"):
        assert word in lines[0]


def test_dry_run(run, folder, tmp_path):
    result = run(folder, tmp_path / "run", "--dry-run")
    assert result.status == 0 and not (tmp_path / "run").exists()
    assert "GiB without --checkpointing" in result.out and "an image" in result.out


def test_pixels_are_compared_as_thumbnails(run, folder, tmp_path, monkeypatch):
    shapes, knn = [], pretrain_images.knn_accuracy

    def observe(function, **options):
        shapes.append(function(torch.zeros(2, 3, 42, 42)).shape[1])
        return knn(function, **options)

    monkeypatch.setattr(pretrain_images, "knn_accuracy", observe)
    run(folder, tmp_path / "run", "--epochs", 1, "--global-size", 42)
    assert shapes == [3 * 16 * 16, 16, 16]


def test_images_of_five_channels(run, tmp_path, trained):
    rng, options = np.random.default_rng(0), ("--jitter", 0, "--gray", 0, "--epochs", 1)
    (tmp_path / "images").mkdir()
    for i in range(8):
        np.save(tmp_path / "images" / f"{i}.npy", rng.integers(0, 4096, (32, 32, 5), np.uint16))
    options = ("--in-chans", 5, "--white-level", 4095, *options)
    result = run(tmp_path / "images", tmp_path / "new", *options)
    assert result.status == 0, result.err
    assert dinoreg.load(tmp_path / "new" / "teacher.safetensors").config.in_chans == 5
    weights = trained / "teacher.safetensors"
    options = ("--model", weights, "--freeze-epochs", 1, *options)
    assert run(tmp_path / "images", tmp_path / "old", *options).status == 0
    new, old = dinoreg.load(tmp_path / "old" / "teacher.safetensors"), dinoreg.load(weights)
    gray = torch.randn(1, 1, 28, 28)
    assert torch.allclose(new(gray.repeat(1, 5, 1, 1)), old(gray.repeat(1, 3, 1, 1)), atol=1e-5)
    result = run(tmp_path / "images", tmp_path / "run", "--in-chans", 5)
    assert result.status == 2 and "--jitter 0 --gray 0" in result.err


def test_a_loss_that_is_not_finite_ends_the_run(run, folder, tmp_path):
    result = run(folder, tmp_path / "run", "--base-lr", 1e30)
    assert result.status == 2 and "the loss is not finite" in result.err
    assert "lower --base-lr" in result.err


def test_presets_are_complete():
    for config, recipe in pretrain.PRESETS.values():
        assert recipe.global_size % config.patch_size == recipe.local_size % config.patch_size == 0
    assert pretrain.PRESETS["official"][0].ffn == "swiglu"  # ffn_layer of vitl14.yaml


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["scratch", "weights"])
def test_two_processes_compute_what_one_does(run, folder, tmp_path, trained, start):
    options = ["--drop-path-rate", "0", "--epochs", "2"]
    if start == "weights":  # the heads learn alone in the first epoch
        model = trained / "teacher.safetensors"
        options += ["--model", model, "--freeze-epochs", "1", "--warmup-epochs", "0"]
    run(folder, tmp_path / "one", *options)
    new = ARCHITECTURE if start == "scratch" else []
    command = [*TORCHRUN, SCRIPT, folder, "-o", tmp_path / "two", *TINY, *new, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (
        dinoreg.load(tmp_path / name / "teacher.safetensors").state_dict()
        for name in ("one", "two")
    )
    for weights in (one, two):  # the gradients of the key biases are rounding errors
        for key in weights:
            if key.endswith("qkv.bias"):
                weights[key].chunk(3)[1].zero_()
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def start(prefix, folder, output, *options):
    command = [*prefix, SCRIPT, folder, "-o", output, *TINY, *ARCHITECTURE, *options]
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("prefix", [[sys.executable], TORCHRUN])
def test_a_run_is_saved_when_all_its_processes_get_a_signal(folder, tmp_path, prefix, number):
    options = ("--workers", 1, "--epochs", 2000, "--every", 10, "--keep-every", 100000)
    process = start(prefix, folder, tmp_path / "run", *options)
    while "epoch" not in process.stdout.readline():  # ten steps are saved
        assert process.poll() is None, process.stderr.read()
    torchrun = len(prefix) > 1  # it passes signals on, to the groups of its processes
    (os.kill if torchrun else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 or torchrun, err
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert state["step"] > 10 or not state["rows"]
    assert "killed by signal" not in err and "RuntimeError" not in err


@pytest.mark.slow
def test_a_broken_image_under_torchrun(folder, tmp_path):
    images = tmp_path / "images"
    for part in ("images", "val"):
        for path in dinoreg.find_images([folder]):
            for i in range(1 if part == "images" else 50):
                copy = tmp_path / part / path.parent.name / f"{i}_{path.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    (images / "down" / "broken.png").write_bytes(path.read_bytes()[:90])
    options = ("--epochs", 4, "--every", 12, "--val", tmp_path / "val", "--workers", 1)
    process = start(TORCHRUN, images, tmp_path / "run", *options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "broken.png" in err and "ChildFailedError" not in err, err
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["step"] == 12
    assert len(curve(tmp_path / "run")) == 1
    dinoreg.load(tmp_path / "run" / "teacher.safetensors")


@pytest.mark.slow
def test_a_killed_run_continues_on_the_same_curve(run, folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder, "-o", tmp_path / "run", *TINY, *ARCHITECTURE],
        stdout=subprocess.PIPE,
        text=True,
    )
    while "epoch 1" not in process.stdout.readline():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(folder, tmp_path / "run").status == run(folder, tmp_path / "whole").status == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
