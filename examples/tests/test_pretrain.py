"""Tests of examples/pretrain.py: `python -m pytest examples/tests/test_pretrain.py`.

Values of the official code were recorded with commit b8931f7 of facebookresearch/dinov2, on a CPU
with torch 2.14, from the inputs that `randn` and `fill` make. Its DINOHead, DINOLoss,
iBOTPatchLoss, KoLeoLoss, MaskingGenerator, CosineScheduler and get_params_groups_with_decay were
called as they are, in a gloo group of one process. For a whole step its SSLMetaArch ran:
forward_backward, clip_grad_norm_ for each part, AdamW of get_params_groups, update_teacher.
Replaced were only what needs CUDA (Tensor.cuda did nothing), xformers (a pass for each size of
crops; BlockDiagonalMask split rows) and FSDP.
"""

import csv
import dataclasses
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

import dinoreg
import pretrain
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


def test_moving_centre():
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
    masks = torch.stack([pretrain.random_mask(h, w, count, generator) for _ in range(1000)]).int()
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
    assert not pretrain.random_mask(4, 4, 0).any()


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
        base_lr=1.0,
        min_lr=0.0,
    )
    now = [
        pretrain.schedule(dataclasses.replace(recipe, freeze_epochs=2), step, epoch_length=2)
        for step in range(8)
    ]
    assert [row["lr"] for row in now][:3] == [0, 0.5, 0.5]
    assert [row["last_layer_lr"] > 0 for row in now] == [False] * 2 + [True] * 6
    assert [row["backbone_lr"] > 0 for row in now] == [False] * 4 + [True] * 4


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
        for group in pretrain.parameter_groups(network, 0.9, 0.2)
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
    groups = pretrain.parameter_groups(
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


# Crops


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
        global_size=28, local_crops=0, flip=0, jitter=0, grey=0, blur=(0, 0, 0), global_scale=(1, 1)
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
    assert sorted(pretrain.permutation(24, 0, 0, 0)) == list(range(24))


# Runs

OPTIONS = dict(
    device="cpu", workers=0, preset="laptop", batch_size=8, epochs=3, warmup_epochs=1,
    freeze_last_layer_epochs=0, global_size=28, local_size=14, local_crops=2,
    prototypes=16, ibot_prototypes=16, hidden_dim=16, bottleneck_dim=8, ibot_bottleneck_dim=8,
)  # fmt: skip
TINY = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
ARCHITECTURE = ["--patch-size=7", "--embed-dim=16", "--depth=2", "--num-heads=2"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process, which saves the seconds of its imports, and draw no curves,
    which takes longest.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch())
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
    return [{key: float(x) for key, x in row.items() if key not in TIMES} for row in rows]


def test_a_run_from_scratch(run, folder, tmp_path):
    result = run(folder, tmp_path / "run")
    assert (
        result.status == 0
        and not result.err
        and result.out.count("\nepoch") == 3
        and "k-NN on pixels" in result.out
    )
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
    pretrain.write_log(history, tmp_path)
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


def test_weights_change_after_the_heads(run, folder, tmp_path):
    run(folder, tmp_path / "first", "--epochs", 1)
    weights = tmp_path / "first" / "teacher.safetensors"
    options = ("--model", weights, "--freeze-epochs", 2, "--warmup-epochs", 0)
    before = dinoreg.load(weights)
    for epochs in (2, 3):
        assert run(folder, tmp_path / str(epochs), *options, "--epochs", epochs).status == 0
        after = dinoreg.load(tmp_path / str(epochs) / "teacher.safetensors").state_dict()
        same = [torch.equal(after[key], tensor) for key, tensor in before.state_dict().items()]
        assert all(same) if epochs == 2 else not any(same[:4])


def test_distillation(run, folder, tmp_path):
    run(folder, tmp_path / "large", "--epochs", 1, "--embed-dim", 32)
    weights = tmp_path / "large" / "teacher.safetensors"
    result = run(
        folder,
        tmp_path / "small",
        "--teacher",
        weights,
        "--freeze-epochs",
        2,
        "--centering",
        "centering",
    )
    assert result.status == 0 and result.out.count("\nepoch") == 2 + 3, result.err
    assert dinoreg.load(tmp_path / "small" / "teacher.safetensors").embed_dim == 16
    heads, large = (
        dinoreg.load(path).state_dict()
        for path in (tmp_path / "small" / "heads" / "teacher.safetensors", weights)
    )
    assert all(torch.equal(heads[key], large[key]) for key in large)
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


def test_a_run_with_other_constants_is_not_continued(run, folder, tmp_path):
    run(folder, tmp_path / "run", "--epochs", 1)
    result = run(folder, tmp_path / "run", "--epochs", 2)
    assert result.status == 2 and result.err.endswith(
        "a run with other constants, images or weights; give another folder\n"
    )


def test_a_loss_that_is_not_finite_ends_the_run(run, folder, tmp_path):
    result = run(folder, tmp_path / "run", "--base-lr", 1e30)
    assert (
        result.status == 2
        and "the loss is not finite" in result.err
        and len(result.err.splitlines()) == 1
    )


def test_presets_are_complete():
    for config, recipe in pretrain.PRESETS.values():
        assert recipe.global_size % config.patch_size == recipe.local_size % config.patch_size == 0


@pytest.mark.slow
def test_two_processes_compute_what_one_does(run, folder, tmp_path):
    options = ("--drop-path-rate", "0", "--epochs", "2")
    run(folder, tmp_path / "one", *options)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [SCRIPT, folder, "-o", tmp_path / "two", *TINY, *ARCHITECTURE, *options]
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
