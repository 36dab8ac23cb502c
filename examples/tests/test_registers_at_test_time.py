"""Tests of examples/registers_at_test_time.py.

Run them with `python -m pytest examples/tests/test_registers_at_test_time.py`.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinoreg
import registers_at_test_time
from registers_at_test_time import add_register, find_register_neurons
from test_dinoreg import SALIENCY_WEIGHTS

PLAIN = dinoreg.Config(
    embed_dim=32, depth=4, num_heads=4, patch_size=4, image_size=32, num_register_tokens=0
)
PLANTED = {1: [70]}  # the neuron that fires at bright patches, and writes a large vector there


def planted_model(config: dinoreg.Config = PLAIN) -> dinoreg.DinoVisionTransformer:
    """A random model in which bright patches become outliers in block 1. Neuron 5 of block 2 fires
    at outliers.
    """
    torch.manual_seed(0)
    model = dinoreg.DinoVisionTransformer(config).eval()
    model.transform = dinoreg.Transform().at_size(32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3 * parameter[0].numel() ** -0.5)
        proj = model.patch_embed.proj.weight
        # Brightness is in channel 0 of a token only.
        proj.sub_(proj.mean(dim=(1, 2, 3), keepdim=True))
        proj[0], model.patch_embed.proj.bias[0], model.pos_embed[..., 0] = 0.006, 0, 0
        outlier = torch.randn(config.embed_dim)
        cause, effect = model.blocks[1].mlp, model.blocks[2].mlp
        cause.fc1.weight[70] = 6 * F.one_hot(torch.tensor(0), config.embed_dim)
        cause.fc1.bias[70] = -10
        cause.fc2.weight[:, 70] = outlier
        effect.fc1.weight[5] = outlier
    return model


def images_with_bright_patches(*places: list[tuple[int, int]], size: int = 32) -> torch.Tensor:
    """An image (3, size, size) of noise for each argument, with these patches (row, column)
    bright.
    """
    torch.manual_seed(1)
    images = torch.randn(len(places), 3, size, size) * 0.3
    for image, patches in zip(images, places):
        for row, column in patches:
            image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 3
    return images


IMAGES = images_with_bright_patches([(2, 3), (6, 1)], [(0, 0)], [(7, 7), (4, 4), (1, 6)])


def norms(model, images: torch.Tensor) -> torch.Tensor:
    """The norms of patches (B, h * w) after the last block but one."""
    return model.get_intermediate_layers(images, [2], norm=False)[0].norm(dim=-1)


@torch.inference_mode()
def test_the_planted_neurons_are_found_and_their_outliers_move_to_the_register():
    model = planted_model()
    before = norms(model, IMAGES)
    bright = before > 3 * before.median(dim=1, keepdim=True).values
    assert bright.nonzero().tolist() == [[0, 19], [0, 49], [1, 0], [2, 14], [2, 36], [2, 63]]
    # Neurons of block 2 are left out, since the outliers are there after block 1.
    assert find_register_neurons(model, IMAGES, count=1) == {1: [70]}
    assert set(find_register_neurons(model, IMAGES, count=50)) <= {0, 1}
    assert sum(map(len, find_register_neurons(model, IMAGES, count=50).values())) == 50
    assert sum(map(len, find_register_neurons(model, IMAGES, count=1000).values())) == 2 * 128
    assert not any(block.mlp.act._forward_hooks for block in model.blocks)

    add_register(model, PLANTED)
    after = norms(model, IMAGES)
    assert (after < 2 * before.median()).all()
    (tokens,) = model._get_intermediate_layers_not_chunked(IMAGES, [2])
    assert (tokens[:, 1].norm(dim=-1) > 3 * after.median()).all()
    with pytest.raises(
        ValueError,
        match=r"no patch has a norm above 100 times the median: the largest has \d+\.\d\d times",
    ):
        find_register_neurons(planted_model(), IMAGES, cutoff=100)


@pytest.mark.parametrize("R", [0, 2])
@torch.inference_mode()
def test_the_register_takes_the_peak_of_each_image_and_each_neuron(R):
    model = planted_model(replace(PLAIN, num_register_tokens=R))
    neurons, seen = {1: [70, 3, 41]}, {}
    mlp = model.blocks[1].mlp
    mlp.fc1.weight[3].mul_(0.01)
    mlp.fc1.bias[3] = -0.7  # its largest magnitude is that of a negative value
    mlp.act.register_forward_hook(lambda module, inputs, x: seen.update(before=x.clone()))
    mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.update(after=inputs[0]))
    add_register(model, neurons)
    model.forward_features(IMAGES)
    expected = seen["before"].clone()
    for image in range(3):
        for neuron in neurons[1]:
            expected[image, 1 + R, neuron] = max(seen["before"][image, :, neuron].tolist(), key=abs)
            expected[image, 2 + R :, neuron] = 0  # patches; CLS and trained registers stay
    assert torch.equal(seen["after"], expected)
    assert (expected[:, 1 + R, 3] < -0.1).all()


@torch.inference_mode()
def test_tokens_other_than_the_outliers_keep_their_places():
    model = planted_model()
    for block in model.blocks:
        torch.nn.init.zeros_(block.ls1.gamma)  # no attention: no token depends on another one
    before = model.forward_features(IMAGES)
    remove = add_register(model, {})
    after = model.forward_features(IMAGES)
    assert torch.equal(after["x_norm_patchtokens"], before["x_norm_patchtokens"])
    assert torch.equal(after["x_norm_clstoken"], before["x_norm_clstoken"])
    assert after["x_norm_regtokens"].shape == (3, 1, 32)
    remove()
    add_register(model, PLANTED)
    after = model.forward_features(IMAGES)
    changed = (after["x_norm_patchtokens"] - before["x_norm_patchtokens"]).norm(dim=-1) > 1
    assert changed.nonzero().tolist() == [[0, 19], [0, 49], [1, 0], [2, 14], [2, 36], [2, 63]]
    assert torch.equal(after["x_norm_clstoken"], before["x_norm_clstoken"])


@pytest.mark.parametrize("R", [0, 2])
@torch.inference_mode()
def test_batches_lists_and_all_outputs_agree(R):
    model = planted_model(replace(PLAIN, num_register_tokens=R))
    add_register(model, PLANTED | {3: [1, 2, 3]})
    batch, small = (
        model.forward_features(IMAGES),
        images_with_bright_patches([(1, 1)], [(3, 0)], size=16),
    )
    assert batch["x_norm_patchtokens"].shape == (3, 64, 32) and batch["x_norm_regtokens"].shape == (
        3,
        R + 1,
        32,
    )
    for i in range(3):
        alone = model.forward_features(IMAGES[i : i + 1])
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"):
            assert torch.allclose(alone[key][0], batch[key][i], atol=1e-5)
    for part, images in zip(model.forward_features([IMAGES, small]), [IMAGES, small]):
        whole = model.forward_features(images)
        assert torch.allclose(part["x_prenorm"], whole["x_prenorm"], atol=1e-5)
    patches, _ = model.get_intermediate_layers(IMAGES, 1, reshape=True, return_class_token=True)[0]
    assert torch.allclose(patches.flatten(2).mT, batch["x_norm_patchtokens"], atol=1e-5)
    maps = model.attention_maps(IMAGES)
    assert maps.shape == (3, 4, 1 + R + 1, 8, 8)
    assert (maps.sum(dim=(-2, -1)) < 1).all()
    classifier = dinoreg.LinearClassifier(model, 5).eval()
    assert torch.allclose(classifier(IMAGES)[2:], classifier(IMAGES[2:]), atol=1e-5)


def test_the_register_can_be_trained_removed_and_is_not_saved(tmp_path):
    model = planted_model()
    with torch.no_grad():
        before = model.forward_features(IMAGES)["x_prenorm"]
    keys = list(model.state_dict())
    remove = add_register(model, PLANTED)
    model(IMAGES)[:, 0].sum().backward()
    assert (
        model.register_tokens.grad.abs().sum() > 0
        and model.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0
    )
    with pytest.raises(ValueError, match=r"cannot save .* blocks\.1\.mlp.* MlpWithRegister"):
        dinoreg.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    remove()
    with torch.no_grad():
        assert torch.equal(model.forward_features(IMAGES)["x_prenorm"], before)
    assert (
        list(model.state_dict()) == keys
        and model.register_tokens is None
        and model.num_register_tokens == 0
    )
    dinoreg.save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("neurons", [{4: [0]}, {-1: [0]}, {0: [128]}, {0: [-1]}])
def test_neurons_that_the_model_does_not_have(neurons):
    model = planted_model()
    with pytest.raises(
        ValueError, match=rf"block {next(iter(neurons))} of the model has no MLP with the neurons"
    ):
        add_register(model, neurons)
    assert model.num_register_tokens == 0 and model.register_tokens is None


def test_other_mlps_are_refused():
    model = planted_model()
    add_register(model, {1: [70]})
    with pytest.raises(ValueError, match="block 1 of the model has no MLP"):
        add_register(model, {1: [70]})
    swiglu = dinoreg.DinoVisionTransformer(replace(PLAIN, ffn="swiglu"))
    for other, found in (
        (model, "block 1 has a MlpWithRegister"),
        (swiglu, "block 0 has a SwiGLU"),
    ):
        with pytest.raises(ValueError, match=f"register neurons are those of an Mlp, but {found}"):
            find_register_neurons(other, IMAGES)
    with pytest.raises(ValueError, match="block 0 of the model has no MLP"):
        add_register(swiglu, {0: [0]})


def call(capsys, *arguments) -> tuple[int, list[dict], str]:
    status = registers_at_test_time.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def write_photo(path: Path) -> Path:
    """A dark photo of 32 x 32 pixels with two bright patches."""
    pixels = np.random.default_rng(0).integers(90, 150, (32, 32, 3), dtype=np.uint8)
    pixels[8:12, 12:16] = pixels[24:28, 4:8] = 255
    Image.fromarray(pixels).save(path)
    return path


def test_the_script_prints_neurons_and_norms(tmp_path, capsys):
    model, weights = planted_model(), tmp_path / "planted.safetensors"
    dinoreg.save(model, weights)
    photo, broken = write_photo(tmp_path / "photo.png"), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    options = ("--model", weights, "--resolution", 32, "--count", 1)
    status, (found, record), err = call(capsys, broken, photo, *options)
    assert (
        status == 1
        and err.startswith(f"registers_at_test_time: {broken}: ")
        and "Traceback" not in err
    )
    assert found == {"neurons": {"1": [70]}}

    image = dinoreg.preprocess(photo, 32, True, 4)
    with torch.inference_mode():
        before, features = norms(model, image[None]), model.forward_features(image[None])
        add_register(model, {1: [70]})
        after, new_features = norms(model, image[None]), model.forward_features(image[None])
        (tokens,) = model._get_intermediate_layers_not_chunked(image[None], [2])
    assert record["image"] == str(photo)
    assert record["median_norm"] == pytest.approx([before.median().item(), after.median().item()])
    assert record["largest_norm"] == pytest.approx([before.max().item(), after.max().item()])
    assert record["largest_norm"][1] < 0.7 * record["largest_norm"][0]
    assert record["register_norm"] == pytest.approx(tokens[0, 1].norm().item())
    for name, key in (("cosine_cls", "x_norm_clstoken"), ("cosine_patches", "x_norm_patchtokens")):
        cosines = F.cosine_similarity(features[key], new_features[key], dim=-1)
        assert record[name] == pytest.approx(cosines.mean().item())
    assert call(capsys, broken, *options)[0] == 1

    assert registers_at_test_time.main([*map(str, [photo, *options])]) == 0
    neurons, change = capsys.readouterr().out.splitlines()
    assert neurons == "register neurons: 1 in block 1 (the first block is 0)"
    largest, new_largest = (f"{x.max():.1f}" for x in (before, after))
    where = f"the largest norm of a patch was {largest} and is {new_largest} "
    assert change.startswith(f"{photo}: {where}")

    status, records, err = call(capsys, photo, *options, "--cutoff", 100)
    assert status == 2 and records == [] and "no patch has a norm above 100 times the median" in err


def test_add_register_option_of_other_scripts(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    import find_objects
    import visualize

    weights, photo = tmp_path / "planted.safetensors", write_photo(tmp_path / "photo.png")
    dinoreg.save(planted_model(), weights)
    options = [photo, "--model", weights, "--resolution", 32, "--stride", 4, "--add-register", 3]
    options = [str(x) for x in [*options, "-o", tmp_path]]
    assert visualize.main([*options, "--npy"]) == find_objects.main(options) == 0
    # The attention of CLS and of the added register.
    assert np.load(tmp_path / "photo_planted_attention.npy").shape == (1, 4, 2, 8, 8)


def test_features_that_are_not_finite_are_an_error_of_the_image(tmp_path, capsys):
    model, weights = planted_model(), tmp_path / "planted.safetensors"
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.bias[0] = float("nan")  # after the block whose norms are measured
    dinoreg.save(model, weights)
    photo = write_photo(tmp_path / "photo.png")
    options = ("--model", weights, "--resolution", 32, "--count", 1)
    status, (found,), err = call(capsys, photo, *options)
    assert status == 1 and found == {"neurons": {"1": [70]}}
    assert f"{photo}: the model returns NaN or infinity" in err


@pytest.mark.skipif(
    not SALIENCY_WEIGHTS.exists(), reason="the ViT-S/14 fine-tuned for saliency is not here"
)
def test_mild_outliers_of_a_real_model(capsys):
    photo = Path(__file__).parents[1] / "images" / "astronaut.jpg"
    status, (found, record), _ = call(
        capsys, photo, "--model", SALIENCY_WEIGHTS, "--cutoff", 1.4, "--resolution", 280
    )
    assert status == 0 and sum(map(len, found["neurons"].values())) == 50
    assert record["largest_norm"][1] < 0.75 * record["largest_norm"][0]
    assert record["register_norm"] > record["largest_norm"][1]
    assert record["cosine_cls"] > 0.95 and record["cosine_patches"] > 0.95
