"""Tests of hubconf.py, and of code written for the official models of torch.hub: what it reads of a
model, and what it replaces."""

import re
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

import dinoreg
from dinoreg import CONFIGS, DinoVisionTransformer, LinearClassifier
from test_dinoreg import (
    HERE,
    HUB_BACKBONE,
    HUB_CONFIG,
    HUB_HEADS,
    TINY,
    TINY_PLAIN,
    assert_same,
    hub_head,
    randomised,
    resized,
    scaled_error,
)


def hub_model(name="dinov2_vits14_reg", **arguments):
    return torch.hub.load(str(HERE), name, source="local", **arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_entry_points_of_backbones(name, monkeypatch):
    config = replace(TINY, depth=4)
    monkeypatch.setitem(dinoreg.CONFIGS, name, config)
    model = hub_model(f"dinov2_{name}", pretrained=False)
    assert isinstance(model, DinoVisionTransformer)
    assert model.config == config


@pytest.mark.parametrize("arguments, layers", [({}, 4), ({"layers": 4}, 4), ({"layers": 1}, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_entry_points_of_classifiers(name, arguments, layers, monkeypatch):
    monkeypatch.setitem(dinoreg.CONFIGS, name, replace(TINY, depth=4))
    model = hub_model(f"dinov2_{name}_lc", pretrained=False, **arguments)
    assert isinstance(model, LinearClassifier)
    assert model.layers == layers
    assert model.linear_head.out_features == 1000


def test_trained_weights_are_the_default(hub):
    model = hub_model()
    assert_same(model, randomised(HUB_CONFIG))
    assert not model.training
    assert hub.requests == [HUB_BACKBONE]


@pytest.mark.parametrize("arguments, layers", [({}, 4), ({"layers": 1}, 1)])
def test_trained_classifiers(hub, arguments, layers):
    model = hub_model("dinov2_vits14_reg_lc", **arguments)
    assert torch.equal(model.linear_head.weight, hub_head(layers).weight)
    assert model.labels == dinoreg.IMAGENET_CLASSES
    assert hub.requests == [HUB_BACKBONE, HUB_HEADS[layers]]


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
    ids=str,
)
def test_arguments_of_the_official_entry_points(arguments, field, value, monkeypatch):
    small = replace(CONFIGS["vits14_reg"], embed_dim=24, num_heads=2, depth=1)
    monkeypatch.setitem(dinoreg.CONFIGS, "vits14_reg", small)
    model = hub_model(pretrained=False, **arguments)
    assert isinstance(model, DinoVisionTransformer)
    assert getattr(model.config, field) == value


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_chans": 1}, "in_chans is 3 in the official weights, not 1; give pretrained=False"),
        ({"img_size": 224}, "img_size is 518 in the official weights, not 224"),
        ({"depth": 3}, "does not take depth=3; its arguments are pretrained, weights, img_size"),
        ({"qkv_bias": False}, "does not take qkv_bias=False"),
        ({"weights": "IN22K"}, "weights must be 'LVD142M', got 'IN22K'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hub_model(**arguments)


def test_arguments_that_leave_the_trained_weights_as_they_are(hub):
    model = hub_model(drop_path_rate=0.3, interpolate_antialias=False)
    assert_same(model, randomised(HUB_CONFIG))
    assert model.config == replace(HUB_CONFIG, drop_path_rate=0.3, interpolate_antialias=False)
    assert model.blocks[-1].sample_drop_ratio == pytest.approx(0.3)
    assert not model.training


def test_arguments_of_trained_classifiers(hub):
    model = hub_model("dinov2_vits14_reg_lc", interpolate_antialias=False)
    assert torch.equal(model.linear_head.weight, hub_head(4).weight)
    assert not model.backbone.interpolate_antialias
    assert model.labels == dinoreg.IMAGENET_CLASSES


# --------------------------------------------------------------------------------------------------
# Code that reads and edits the model, as code written for the official class does


def test_attributes_of_the_official_class():
    model = DinoVisionTransformer(replace(TINY, image_size=(20, 40)))
    embed, attn = model.patch_embed, model.blocks[0].attn
    assert (model.num_tokens, model.chunked_blocks, model.n_blocks) == (1, False, 3)
    assert (model.embed_dim, model.num_features, model.num_heads) == (32, 32, 4)
    assert (model.patch_size, model.num_register_tokens) == (4, 4)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)
    assert (embed.img_size, embed.patch_size) == ((20, 40), (4, 4))
    assert (embed.patches_resolution, embed.num_patches) == ((5, 10), 50)
    assert (embed.in_chans, embed.embed_dim) == (3, 32)
    assert (attn.dim, attn.num_heads, attn.scale) == (32, 4, 8**-0.5)
    assert (attn.attn_drop, attn.proj_drop.p, model.blocks[0].mlp.drop.p) == (0.0, 0.0, 0.0)


def test_a_block_written_out_by_its_parts():
    model, x = randomised(TINY), torch.randn(1, 5, 32)
    block, mlp = model.blocks[0], model.blocks[0].mlp
    y = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    hidden = mlp.drop(mlp.fc2(mlp.drop(mlp.act(mlp.fc1(block.norm2(y))))))
    assert torch.equal(y + block.drop_path2(block.ls2(hidden)), block(x))


def test_patches_embedded_by_the_parts():
    model, images = randomised(TINY), torch.randn(1, 3, 8, 12)
    embed = model.patch_embed
    assert torch.equal(embed.norm(embed.proj(images).flatten(2).mT), embed(images))


def test_attention_with_a_bias():
    attn, x, bias = randomised(TINY).blocks[0].attn, torch.randn(2, 5, 32), torch.randn(5, 5)
    q, k, v = attn.qkv(x).double().unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    attended = (q @ k.mT / 8**0.5 + bias).softmax(-1) @ v
    expected = attn.proj.double()(attended.transpose(1, 2).flatten(2))
    attn.float()
    assert scaled_error(attn(x, attn_bias=bias), expected) < 1e-5
    assert torch.equal(attn(x, attn_bias=None), attn(x))


def test_a_changed_scale_of_the_attention():
    model, other, images = randomised(TINY), randomised(TINY), torch.randn(1, 3, 8, 12)
    model.blocks[2].attn.scale *= 0.25
    with torch.no_grad():
        other.blocks[2].attn.qkv.weight[:32] *= 0.25  # of the queries
        other.blocks[2].attn.qkv.bias[:32] *= 0.25
    assert scaled_error(model(images), other(images)) < 1e-6
    assert scaled_error(model.attention_maps(images), other.attention_maps(images)) < 1e-6


@pytest.mark.parametrize("place", ["mlp.drop", "attn.proj_drop"])
def test_dropout_that_is_switched_on(place):
    model, other, images = randomised(TINY), randomised(TINY), torch.randn(2, 3, 8, 12)
    model.blocks[1].get_submodule(place).p = 1.0
    assert torch.equal(model(images), other(images))
    gamma = other.blocks[1].ls2.gamma if "mlp" in place else other.blocks[1].ls1.gamma
    gamma.data.zero_()
    assert torch.equal(model.train()(images), other(images))


def test_dropout_of_the_attention():
    model, other, images = randomised(TINY), randomised(TINY), torch.randn(2, 3, 8, 12)
    model.blocks[1].attn.attn_drop = 1.0
    assert torch.equal(model(images), other(images))
    other.blocks[1].attn.proj.weight.data.zero_()
    assert torch.equal(model.train()(images), other(images))


@pytest.mark.parametrize("w, h", [(8, 12), (20, 20), (4, 32)])  # w is the first side, the height
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interpolate_pos_encoding_takes_pixels(w, h, dtype):
    model = randomised(TINY_PLAIN)
    tokens = torch.zeros(1, 1 + w * h // 16, 32, dtype=dtype)
    positions = model.interpolate_pos_encoding(tokens, w, h)
    grid = model.pos_embed[0, 1:].detach().double().numpy().reshape(5, 5, 32)
    expected = resized(grid, w // 4, h // 4, TINY_PLAIN) if w < 20 else grid.reshape(25, 32)
    assert positions.shape == tokens.shape
    assert scaled_error(positions[0, 1:], expected) < (1e-6 if dtype == torch.float32 else 0.01)
    assert torch.equal(positions[:, 0].float(), model.pos_embed[:, 0].to(positions.dtype).float())


def test_a_patched_interpolate_pos_encoding():
    model, images, seen = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12), []
    expected = model(images)

    def interpolate(self, x, w, h):
        seen.append((x.shape, w, h))
        return DinoVisionTransformer.interpolate_pos_encoding(self, x, w, h)

    model.interpolate_pos_encoding = types.MethodType(interpolate, model)
    assert torch.equal(model(images), expected)
    assert seen == [((1, 7, 32), 8, 12)]


def test_a_replaced_position_embedding_of_another_grid():
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    model.pos_embed.data = torch.randn(1, 1 + 9, 32)  # 3 x 3
    other = DinoVisionTransformer(replace(TINY_PLAIN, image_size=12)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))
    tokens = torch.zeros(1, 10, 32)
    assert torch.equal(model.interpolate_pos_encoding(tokens, 12, 12), model.pos_embed)


@pytest.mark.parametrize("antialias, offset", [(True, 0.1), (True, 0.0), (False, 0.0)])
def test_attributes_override_the_config(antialias, offset):
    model, images = randomised(TINY_PLAIN), torch.randn(1, 3, 8, 12)
    model.interpolate_antialias, model.interpolate_offset = antialias, offset
    config = replace(TINY_PLAIN, interpolate_antialias=antialias, interpolate_offset=offset)
    assert torch.equal(model(images), randomised(config)(images))


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_first_convolution_of_other_channels(channels):
    model, gray = randomised(TINY), torch.randn(2, 1, 8, 12)
    expected = model(gray.expand(-1, 3, -1, -1))
    old = model.patch_embed.proj
    model.patch_embed.proj = nn.Conv2d(channels, 32, 4, 4)
    weight = old.weight.data.sum(1, keepdim=True) / channels
    model.patch_embed.proj.weight.data = weight.repeat(1, channels, 1, 1)
    model.patch_embed.proj.bias.data = old.bias.data
    assert scaled_error(model(gray.expand(-1, channels, -1, -1)), expected) < 1e-5


@pytest.mark.parametrize(
    "stride, grid", [(2, (5, 9)), ((2, 2), (5, 9)), ((2, 4), (5, 5)), ((4, 2), (3, 9))]
)
def test_a_stride_below_the_patch_size(stride, grid):
    model, images = randomised(TINY), torch.randn(1, 3, 12, 20)
    model.patch_embed.proj.stride = stride
    features = model.forward_features(images)["x_norm_patchtokens"]
    (reshaped,) = model.get_intermediate_layers(images, reshape=True)
    assert model.to_grid(12, 20) == reshaped.shape[2:] == grid
    assert torch.equal(reshaped.flatten(2).mT, features)
    assert model.attention_maps(images).shape == (1, 4, 5, *grid)
    model.fix_image_size(12, 20)
    assert torch.equal(model.forward_features(images)["x_norm_patchtokens"], features)


def test_tokens_of_a_stride_below_the_patch_size():
    """Every second one sees what it sees without overlap, and has a position of its own."""
    model, images = randomised(TINY), torch.randn(1, 3, 12, 20)
    plain = model.patch_embed(images).unflatten(1, (3, 5))
    model.patch_embed.proj.stride = 2
    dense = model.patch_embed(images).unflatten(1, (5, 9))
    tokens = model.prepare_tokens_with_masks(images)[:, 5:] - dense.flatten(1, 2)
    grid = model.pos_embed[0, 1:].detach().double().numpy().reshape(5, 5, 32)
    assert scaled_error(dense[:, ::2, ::2], plain) < 1e-6
    assert scaled_error(tokens[0], resized(grid, 5, 9, TINY)) < 1e-5


class OtherPatchEmbed(nn.Module):
    """A patch embedding of somebody else."""

    def __init__(self, proj: nn.Conv2d):
        super().__init__()
        self.proj = proj
        self.patch_size = proj.kernel_size

    def forward(self, x):
        return self.proj(x).flatten(2).mT


def replace_projection(model: DinoVisionTransformer, proj: nn.Conv2d):
    model.patch_embed.proj = proj
    model.patch_embed.patch_size = 8


def replace_patch_embed(model: DinoVisionTransformer, proj: nn.Conv2d):
    model.patch_embed = OtherPatchEmbed(proj)


@pytest.mark.parametrize("edit", [replace_projection, replace_patch_embed])
def test_a_replaced_patch_embedding_decides_about_sizes(edit):
    expected, images = (
        randomised(replace(TINY, patch_size=8, image_size=40)),
        torch.randn(1, 3, 16, 24),
    )
    model = DinoVisionTransformer(TINY).eval()
    edit(model, nn.Conv2d(3, 32, 8, 8))
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(images), expected(images))
    (grid,) = model.get_intermediate_layers(images, reshape=True)
    assert torch.equal(grid, expected.get_intermediate_layers(images, reshape=True)[0])
    assert torch.equal(model.attention_maps(images), expected.attention_maps(images))


def test_a_model_cut_to_fewer_blocks():
    whole, model, images = randomised(TINY), randomised(TINY), torch.randn(2, 3, 8, 12)
    model.blocks = model.blocks[:2]
    ((patches, cls),) = whole.get_intermediate_layers(images, [1], return_class_token=True)
    assert torch.equal(model.get_intermediate_layers(images)[0], patches)
    assert torch.equal(model(images), cls)
    assert torch.equal(model.attention_maps(images), whole.attention_maps(images, 1))
    assert LinearClassifier(model, 2, layers=2)(images).shape == (2, 2)
    with pytest.raises(ValueError, match="2 blocks"):
        model.get_intermediate_layers(images, 3)


class Adapter(nn.Module):
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


def wrap_mlp(model):
    model.blocks[-1].mlp = Adapter(model.blocks[-1].mlp)


def hook_attention(model):
    model.blocks[-1].attn.register_forward_hook(lambda module, args, output: output * 1.5)


def patch_attention(model):
    attn = model.blocks[-1].attn
    attn.forward = lambda x, forward=attn.forward: forward(x) * 1.5


def wrap_patch_embed(model):
    model.patch_embed = nn.Sequential(model.patch_embed, nn.LayerNorm(32))


def norm_patches(model):
    model.patch_embed.norm = nn.LayerNorm(32)


def prepend_convolution(model):
    model.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 3, 1), model.patch_embed.proj)


def replace_head(model):
    model.head = nn.Linear(32, 32)


@pytest.mark.parametrize(
    "edit",
    [
        wrap_block,
        wrap_attention,
        wrap_mlp,
        hook_attention,
        patch_attention,
        wrap_patch_embed,
        norm_patches,
        prepend_convolution,
        replace_head,
    ],
)
def test_edits_that_are_honored(edit):
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    before = model(images)
    edit(model)
    after = model(images)
    assert scaled_error(after, before) > 1e-3
    assert torch.equal(model([images]), after)
    if edit is not replace_head:
        ((_, cls),) = model.get_intermediate_layers(images, return_class_token=True)
        assert torch.equal(cls, after)
