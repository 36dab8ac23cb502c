"""The same numbers as the official code, torchvision, transformers and timm; models that peft and
torchao changed. All parameters are random. Tests of packages that are not installed are skipped."""

import io
import json
import os
import shutil
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import convert_weights
import dinoreg
from dinoreg import CONFIGS, Config, DinoVisionTransformer, LinearClassifier, Transform, preprocess
from test_dinoreg import (
    HUB_CONFIG,
    PHOTOS,
    TINY,
    assert_same,
    picture,
    randomise,
    randomised,
    reference,
    saved,
    scaled_error,
)

TOLERANCE = 1e-5  # of the largest value of an output; the measured error is 1e-6
PICTURES = [(500, 375), (375, 500), (224, 224), (256, 256), (100, 40), (33, 331), (640, 427)]
every_picture = pytest.mark.parametrize("picture_size", PICTURES, ids="{0[0]}x{0[1]}".format)


def converted(source, **options):
    model, _ = convert_weights.read(str(source), **options)
    return model


# --------------------------------------------------------------------------------------------------
# The official code: values recorded from facebookresearch/dinov2 b8931f7 (torch 2.14.1)

# Of a training pass of the official class, by `training_record`.
OFFICIAL_TRAINING = {
    0.1: [
        -0.06875584, -0.1008217, -0.1056296, -0.09332562,
        0.0001231401, 4.459554e-06, 9.789318e-06, 1.491366e-05,
    ],
    0.4: [
        -0.1757448, -0.08866164, -0.07461654, -0.0904834,
        8.887214e-05, 5.559903e-06, 1.675731e-05, 1.896572e-05,
    ],
}  # fmt: skip


def training_record(model) -> list[float]:
    """Means of the tokens of each of four images, of a gradient of the CLS token and of squared
    gradients of each block."""
    images = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # draws the images that keep a branch
    tokens = model.train()(images, is_training=True)["x_prenorm"]
    tokens.square().mean().backward()
    gradients = [block.attn.qkv.weight.grad.square().mean().item() for block in model.blocks]
    return [*tokens.mean(dim=(1, 2)).tolist(), model.cls_token.grad.mean().item(), *gradients]


@pytest.mark.parametrize("rate", OFFICIAL_TRAINING)
def test_stochastic_depth_is_the_official_one(rate):
    model = randomised(replace(TINY, drop_path_rate=rate, drop_path_uniform=True))
    assert training_record(model) == pytest.approx(OFFICIAL_TRAINING[rate], rel=1e-4, abs=1e-7)


# --------------------------------------------------------------------------------------------------
# torchvision


@pytest.fixture
def transforms():
    return pytest.importorskip("torchvision.transforms")


@every_picture
@pytest.mark.parametrize("size", [224, 98, 518])
def test_preprocess_is_the_transform_of_torchvision(transforms, size, picture_size):
    bicubic, image = transforms.InterpolationMode.BICUBIC, picture(*picture_size)
    transform = transforms.Compose(
        [
            transforms.Resize(size * 8 // 7, interpolation=bicubic),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(dinoreg.IMAGENET_MEAN, dinoreg.IMAGENET_STD),
        ]
    )
    assert torch.equal(preprocess(image, size), transform(image))


@every_picture
@pytest.mark.parametrize("resampling", dinoreg.RESAMPLINGS)
@pytest.mark.parametrize(
    "resize, crop",
    [(256, (224, 224)), ((224, 224), None), (518, (518, 518)), ((98, 140), (98, 112))],
    ids=str,
)
def test_transforms_are_those_of_torchvision(transforms, resize, crop, resampling, picture_size):
    image, statistics = picture(*picture_size), ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    mode = transforms.InterpolationMode(resampling)
    steps = [transforms.Resize(resize, interpolation=mode)]
    steps += [transforms.CenterCrop(crop)] if crop else []
    steps += [transforms.ToTensor(), transforms.Normalize(*statistics)]
    found = preprocess(image, transform=Transform(resize, crop, resampling, *statistics))
    assert torch.equal(found, transforms.Compose(steps)(image))


# --------------------------------------------------------------------------------------------------
# transformers

PEER_CONFIGS = {  # at their real width; B, L and g with fewer blocks
    "s": CONFIGS["vits14_reg"],
    "b": replace(CONFIGS["vitb14_reg"], depth=2),
    "l": replace(CONFIGS["vitl14_reg"], depth=1),
    "g": replace(CONFIGS["vitg14_reg"], depth=1),
}
every_shape = pytest.mark.parametrize("shape", [(224, 224), (224, 336), (28, 14)], ids=str)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def hugging_face(transformers):
    """Makes a model of transformers from the config that `convert_weights` writes."""

    def make(config: Config, **options) -> nn.Module:
        described = convert_weights.hf_config(DinoVisionTransformer(config)) | options
        stem = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
        kind = "ForImageClassification" if options else "Model"
        hf_config = getattr(transformers, stem + "Config").from_dict(described)
        return randomise(getattr(transformers, stem + kind)(hf_config))

    return make


def ours(peer: nn.Module) -> DinoVisionTransformer:
    """A backbone of transformers or timm as ours."""
    return dinoreg.from_state_dict(convert_weights.to_official(peer.state_dict())[0])


@pytest.fixture(scope="module", params=PEER_CONFIGS)
def hugging_face_pair(request, hugging_face, tmp_path_factory):
    """A backbone of transformers, and ours converted from its files."""
    config, folder = PEER_CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    peer = hugging_face(config)
    peer.save_pretrained(folder)
    model = converted(folder)
    assert model.config == config
    return peer, model


@every_shape
def test_features_are_those_of_hugging_face(hugging_face_pair, shape):
    (peer, model), images = hugging_face_pair, torch.randn(1, 3, *shape)
    with torch.inference_mode():
        theirs = peer(images, output_hidden_states=True)
        states = model._get_intermediate_layers_not_chunked(images, range(model.n_blocks))
        features = model.forward_features(images)
    tokens = theirs.last_hidden_state
    for found, expected in zip(states, theirs.hidden_states[1:], strict=True):
        assert scaled_error(found, expected) < TOLERANCE
    assert scaled_error(features["x_norm_clstoken"], theirs.pooler_output) < TOLERANCE
    assert scaled_error(features["x_norm_regtokens"], tokens[:, 1:5]) < TOLERANCE
    assert scaled_error(features["x_norm_patchtokens"], tokens[:, 5:]) < TOLERANCE


def test_attention_maps_are_those_of_hugging_face(hugging_face):
    peer = hugging_face(CONFIGS["vits14_reg"])
    peer.set_attn_implementation("eager")
    model, images = ours(peer), torch.randn(1, 3, 224, 154)
    with torch.inference_mode():
        attentions = peer(images, output_attentions=True).attentions
        maps = model.attention_maps(images, layer=range(12))
    for found, expected in zip(maps, attentions, strict=True):
        assert (found.flatten(3) - expected[:, :, :5, 5:]).abs().max() < 1e-5


def test_masks_are_those_of_hugging_face(hugging_face):
    peer = hugging_face(PEER_CONFIGS["s"])
    model = ours(peer)
    images, masks = torch.randn(2, 3, 98, 70), torch.rand(2, 35) < 0.4
    with torch.inference_mode():
        expected = peer(images, bool_masked_pos=masks).last_hidden_state
        found = model.norm(model.forward_features(images, masks)["x_prenorm"])
    assert scaled_error(found, expected) < TOLERANCE


def test_gradients_are_those_of_hugging_face(hugging_face):
    peer = hugging_face(replace(CONFIGS["vits14_reg"], depth=4))
    model = ours(peer)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # tensors of its own
    images, masks = torch.randn(2, 3, 98, 70), torch.rand(2, 35) < 0.4
    model.norm(model.forward_features(images, masks)["x_prenorm"]).square().mean().backward()
    peer(images, bool_masked_pos=masks).last_hidden_state.square().mean().backward()
    theirs = {key: parameter.grad for key, parameter in peer.named_parameters()}
    for key, parameter in model.named_parameters():
        expected = torch.cat([theirs[name] for name in convert_weights.translate(key, "hf5")])
        assert scaled_error(parameter.grad, expected) < 1e-4, key


def test_bfloat16_error_is_that_of_hugging_face(hugging_face):
    peer = hugging_face(replace(CONFIGS["vits14_reg"], depth=4))
    model, images = ours(peer), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model(images)
        our_error = scaled_error(model.to(torch.bfloat16)(images), expected)
        their_error = scaled_error(peer.to(torch.bfloat16)(images).pooler_output, expected)
    assert our_error < 1.5 * their_error
    assert their_error < 0.07


CLASSES = {i: f"class {i}" for i in range(7)}


@pytest.fixture(params=["vits14_reg", "vits14"])
def hugging_face_classifier(request, hugging_face):
    config = replace(CONFIGS[request.param], depth=3)
    labels = {label: i for i, label in CLASSES.items()}
    return hugging_face(config, num_labels=7, id2label=CLASSES, label2id=labels)


def test_classifiers_are_those_of_hugging_face(hugging_face_classifier, tmp_path):
    peer, images = hugging_face_classifier, torch.randn(2, 3, 518, 518)
    peer.save_pretrained(tmp_path)
    model = converted(tmp_path)
    with torch.inference_mode():
        found, hidden = model.linear_input(images), peer.base_model(images).last_hidden_state
        logits, expected = model(images), peer.classifier(found)
    patches = hidden[:, 1 + model.backbone.num_register_tokens :]
    assert model.labels == list(CLASSES.values())
    # Some releases of transformers average the registers with the patches.
    assert scaled_error(found, torch.cat([hidden[:, 0], patches.mean(1)], 1)) < TOLERANCE
    assert scaled_error(logits, expected) < TOLERANCE


def test_classifiers_load_in_transformers(hugging_face_classifier, tmp_path):
    peer = hugging_face_classifier
    peer.save_pretrained(tmp_path / "theirs")
    convert_weights.write(converted(tmp_path / "theirs"), tmp_path / "ours", "hf")
    back, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same(back, peer)
    assert back.config.to_dict() | {"_name_or_path": ""} == peer.config.to_dict()


@pytest.mark.parametrize(
    "transform",
    [
        Transform(),
        Transform(518, (518, 518), "bicubic", (0.53,) * 3, (0.26,) * 3),
        Transform((224, 224), None, "bilinear", (0.5,) * 3, (0.5,) * 3),
        Transform((256, 192), (224, 168), "lanczos"),
    ],
)
def test_image_processors_of_transformers(transformers, transform, tmp_path):
    model, image = randomised(TINY), picture(331, 300)
    model.transform = transform
    convert_weights.write(model, tmp_path / "hf", "hf")
    processor = transformers.BitImageProcessorPil.from_pretrained(tmp_path / "hf")
    theirs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    assert (theirs - preprocess(image, transform=transform)).abs().max() < 1e-5


# Derived models, built by transformers with random weights at reduced size: fields of the config,
# and the transform.
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
def test_models_derived_in_transformers(transformers, name, tmp_path):
    fields, transform = DERIVED_HF[name]
    stem = "Dinov2WithRegisters" if "num_register_tokens" in fields else "Dinov2"
    sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=6, patch_size=14)
    config = getattr(transformers, f"{stem}Config")(**sizes | fields)
    peer = randomise(getattr(transformers, f"{stem}Model")(config))
    peer.save_pretrained(tmp_path)
    described = convert_weights.hf_preprocessor(transform)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    if name == "RAD-DINO":  # whose repository holds the backbone twice, and a head
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "backbone_compatible.safetensors")
        dinoreg.save_file({"head.weight": torch.zeros(2)}, tmp_path / "dino_head.safetensors")
    model = converted(tmp_path)
    images = torch.randn(2, 3, fields["image_size"], fields["image_size"])
    assert model.transform == transform
    with torch.inference_mode():
        assert scaled_error(model(images), peer(images).pooler_output) < TOLERANCE


def training_arguments(transformers, folder):
    return transformers.TrainingArguments(
        folder,
        max_steps=1,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )


def classifier_of_layers():
    return LinearClassifier(DinoVisionTransformer(TINY), 3)


def backbone_with_a_head():
    model = DinoVisionTransformer(TINY)
    model.head = nn.Linear(32, 3)
    return model


@pytest.mark.parametrize("make", [classifier_of_layers, backbone_with_a_head])
def test_the_trainer_of_transformers(transformers, make, tmp_path):
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, **options):
            return nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    model = make()
    weight = getattr(model, "backbone", model).blocks[0].norm1.weight
    data = [{"x": torch.randn(3, 20, 20), "labels": torch.tensor(0)}] * 4
    Trainer(model, training_arguments(transformers, tmp_path), train_dataset=data).train()
    assert not torch.equal(weight, torch.ones(32))


# --------------------------------------------------------------------------------------------------
# timm


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def timm_model(timm):
    """Makes a model of timm of one of the sizes s, b, l and g."""

    def make(size: str, config: Config, **options) -> nn.Module:
        width = {"s": "small", "b": "base", "l": "large", "g": "giant"}[size]
        registers = "_reg4" if config.num_register_tokens else ""
        options = dict(depth=config.depth, dynamic_img_size=True, num_classes=0) | options
        return randomise(timm.create_model(f"vit_{width}_patch14{registers}_dinov2", **options))

    return make


@pytest.fixture(scope="module", params=PEER_CONFIGS)
def timm_pair(request, timm_model, tmp_path_factory):
    """A backbone of timm, and ours converted from its file."""
    config, path = PEER_CONFIGS[request.param], tmp_path_factory.mktemp("timm") / "timm.pth"
    peer = timm_model(request.param, config)
    torch.save(peer.state_dict(), path)
    model = converted(path)
    assert model.config == config
    return peer, model


@every_shape
def test_features_are_those_of_timm(timm_pair, shape):
    (peer, model), images = timm_pair, torch.randn(1, 3, *shape)
    with torch.inference_mode():
        theirs, features = peer.forward_features(images), model.forward_features(images)
    assert scaled_error(features["x_norm_clstoken"], theirs[:, 0]) < TOLERANCE
    assert scaled_error(features["x_norm_regtokens"], theirs[:, 1:5]) < TOLERANCE
    assert scaled_error(features["x_norm_patchtokens"], theirs[:, 5:]) < TOLERANCE


def test_a_classifier_of_timm(timm_model, tmp_path):
    peer = timm_model("s", CONFIGS["vits14_reg"], num_classes=7)
    dinoreg.save_file(peer.state_dict(), tmp_path / "timm.safetensors")
    model, images = converted(tmp_path / "timm.safetensors"), torch.randn(2, 3, 98, 70)
    with torch.inference_mode():
        expected = peer(images)
        assert scaled_error(model(images), expected) < TOLERANCE
        convert_weights.write(model, tmp_path / "back.safetensors", "timm")
        peer.load_state_dict(dinoreg.read_tensors(tmp_path / "back.safetensors")[0], strict=True)
        assert torch.equal(peer(images), expected)


@pytest.mark.parametrize("size", ["s", "g"])
def test_written_files_load_in_timm(timm_model, size, tmp_path):
    config, images = replace(PEER_CONFIGS[size], depth=1), torch.randn(1, 3, 98, 70)
    model, peer = randomised(config), timm_model(size, config)
    convert_weights.write(model, tmp_path / "timm.pth", "timm")
    peer.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    with torch.inference_mode():
        assert scaled_error(peer(images), model(images)) < TOLERANCE


@pytest.mark.parametrize("size", ["s", "g"])
def test_written_files_load_in_transformers(hugging_face, size, tmp_path):
    config, images = replace(PEER_CONFIGS[size], depth=1), torch.randn(1, 3, 98, 70)
    model, peer = randomised(config), hugging_face(config)
    convert_weights.write(model, tmp_path / "hf", "hf")
    back, info = type(peer).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        assert scaled_error(back(images).pooler_output, model(images)) < TOLERANCE


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_interpolation_without_registers(library, request):
    """On the trained grid all agree. At other sizes, official models without registers add 0.1 to
    the grid and do not antialias; Hugging Face leaves out the 0.1, timm also antialiases. With
    their settings our output is theirs."""
    config, images = replace(CONFIGS["vits14"], depth=2), torch.randn(1, 3, 224, 336)
    trained_size = torch.randn(1, 3, 518, 518)
    if library == "timm":
        peer = request.getfixturevalue("timm_model")("s", config)
        forward = peer.forward_features
    else:
        peer = request.getfixturevalue("hugging_face")(config)
        forward = lambda x: peer(x).last_hidden_state  # noqa: E731
    model = ours(peer)
    assert model.config == config

    def tokens(x):
        return model.norm(model.forward_features(x)["x_prenorm"])

    with torch.inference_mode():
        assert scaled_error(tokens(trained_size), forward(trained_size)) < TOLERANCE
        assert scaled_error(tokens(images), forward(images)) > 10 * TOLERANCE
        model.interpolate_antialias, model.interpolate_offset = library == "timm", 0.0
        assert scaled_error(tokens(images), forward(images)) < TOLERANCE


TIMM_TRANSFORMS = [
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


@every_picture
@pytest.mark.parametrize("described", TIMM_TRANSFORMS)
def test_transforms_are_those_of_timm(timm, described, picture_size):
    transform, image = convert_weights.transform_from_timm(described), picture(*picture_size)
    statistics = {"mean": transform.mean, "std": transform.std}
    size = {"input_size": tuple(described["input_size"])}
    theirs = timm.data.create_transform(**described | statistics | size)
    assert torch.equal(preprocess(image, transform=transform), theirs(image))


# Derived models, built by timm with random weights at reduced size, in the layouts of their files.
DERIVED_TIMM = {
    "UNI2-h": dict(architecture="vit_giant_patch14_224", init_values=1e-5, reg_tokens=8,
                   no_embed_class=True, mlp_layer="SwiGLUPacked", mlp_ratio=2.66667 * 2),
    "Virchow2": dict(architecture="vit_huge_patch14_224", init_values=1e-5, reg_tokens=4,
                     mlp_layer="SwiGLUPacked", mlp_ratio=5.3375),
    "H-optimus-0": dict(architecture="vit_giant_patch14_reg4_dinov2", init_values=1e-5,
                        reg_tokens=4, no_embed_class=True, mlp_layer="SwiGLUPacked",
                        mlp_ratio=5.33334),
    "PlantCLEF": dict(architecture="vit_base_patch14_reg4_dinov2", init_values=1e-5, reg_tokens=4,
                      no_embed_class=True, num_classes=7),
    "a plain ViT": dict(architecture="vit_base_patch16_224", patch_size=16),
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVED_TIMM)
def test_models_derived_in_timm(timm, name, tmp_path):
    options = dict(embed_dim=96, depth=2, num_heads=6, patch_size=14, num_classes=0)
    options |= DERIVED_TIMM[name]
    architecture, mlp = options.pop("architecture"), options.pop("mlp_layer", None)
    side = 5 * options["patch_size"]
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU} if mlp else {}
    vit = timm.models.vision_transformer.VisionTransformer
    peer = randomise(vit(img_size=side, global_pool="token", **options, **layers))
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    told = ("num_heads", "no_embed_class", "reg_tokens")
    described = {
        "architecture": architecture,
        "model_args": {key: options[key] for key in told if key in options},
        "pretrained_cfg": TIMM_TRANSFORMS[0],
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    model, images = converted(tmp_path), torch.randn(2, 3, side, side)
    assert model.transform == convert_weights.transform_from_timm(TIMM_TRANSFORMS[0])
    with torch.inference_mode():
        assert scaled_error(model(images), peer(images)) < TOLERANCE


# --------------------------------------------------------------------------------------------------
# peft and torchao


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization")


def test_training_through_lora(peft):
    model, images = randomised(TINY), torch.randn(2, 3, 8, 12)
    before = model(images)
    options = peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    lora = peft.get_peft_model(model, options)
    assert scaled_error(lora(images), before) > 1e-3
    assert torch.equal(lora([images]), lora(images))
    lora(images).sum().backward()
    assert model.blocks[-1].attn.qkv.lora_A["default"].weight.grad.any()


def test_merged_lora_is_saved(peft, tmp_path):
    images = torch.randn(2, 3, 8, 12)
    options = peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(randomised(TINY), options).merge_and_unload()
    dinoreg.save(model, tmp_path / "model.safetensors")
    assert torch.equal(dinoreg.load(tmp_path / "model.safetensors")(images), model.eval()(images))


def test_save_refuses_lora(peft, tmp_path):
    model = randomised(TINY)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], r=2), model)
    with pytest.raises(ValueError, match="cannot save this model as it is: "):
        dinoreg.save(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


def test_save_refuses_quantized_weights(torchao, tmp_path):
    model = randomised(replace(TINY, embed_dim=64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="cannot save this model as it is: "):
        dinoreg.save(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# The official files: `DINOREG_NETWORK=1 python -m pytest -s -k official_files` downloads 470 MB (or
# uses the cache)

# The first three channels of the normalized CLS token and of the first two registers of ViT-B/14
# with registers, for the photo 000000039769 of COCO. Source: the integration test of
# Dinov2WithRegistersModel in transformers.
PUBLISHED_TOKENS = torch.tensor(
    [[-0.4638, -1.4563, -0.0289], [-1.4736, -0.8866, 0.3005], [0.0720, -0.2406, -1.5943]]
)
CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}
CAT_AND_CUP = [PHOTOS / "chelsea.jpg", PHOTOS / "coffee.jpg"]


def check_official_files(photo_url: str, published_tokens: torch.Tensor) -> None:
    """Load ViT-S and ViT-B with registers and their classifiers, classify two photos, compare
    tokens with published ones; print what was compared."""
    for name in ("vits14_reg", "vitb14_reg"):
        backbone = dinoreg.load(name)
        assert backbone.config == CONFIGS[name]
        for layers in (1, 4):
            classifier = dinoreg.load(f"{name}_lc", layers)
            assert classifier.config == CONFIGS[name]
            assert classifier.layers == layers
            probabilities = dinoreg.classify(classifier, CAT_AND_CUP)
            cat, cup = (classifier.labels[x.argmax()] for x in probabilities)
            print(f"{name}, {layers} layers: the cat is a {cat}, the cup an {cup}")
            assert cat in CATS
            assert cup == "espresso"
    with urllib.request.urlopen(f"{photo_url}/000000039769.jpg", timeout=60) as response:
        image = preprocess(response.read())
    with torch.inference_mode():
        features = backbone.forward_features(image[None])
    tokens = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_regtokens"]], dim=1)
    print(f"tokens {tokens[0, :3, :3].tolist()}, published {published_tokens.tolist()}")
    # JPEG decoders may differ by a gray level here and there, which changes tokens by up to 0.01.
    torch.testing.assert_close(tokens[0, :3, :3], published_tokens, rtol=0, atol=0.02)


@pytest.mark.skipif("DINOREG_NETWORK" not in os.environ, reason="DINOREG_NETWORK is not set")
def test_official_files():
    check_official_files("http://images.cocodataset.org/val2017", PUBLISHED_TOKENS)


def stand_in_head(backbone: DinoVisionTransformer, layers: int) -> bytes:
    """A head for which the photo of the cat is a tabby and that of the cup an espresso."""
    classifier = LinearClassifier(backbone, 1000, layers)
    photos = torch.stack([preprocess(photo) for photo in CAT_AND_CUP])
    with torch.inference_mode():
        cat, cup = classifier.linear_input(photos)
    weight, bias = torch.zeros_like(classifier.linear_head.weight), torch.zeros(1000)
    for label, direction in (("tabby", cat - cup), ("espresso", cup - cat)):
        weight[dinoreg.IMAGENET_CLASSES.index(label)] = direction
        bias[dinoreg.IMAGENET_CLASSES.index(label)] = -direction @ (cat + cup) / 2
    return saved({"weight": weight, "bias": bias})


def test_the_check_of_the_official_files(hub, monkeypatch):
    """It passes for small models in their place, and fails for registers in another order."""
    config = replace(HUB_CONFIG, patch_size=14, image_size=70)
    for name in ("vits14", "vitb14"):
        monkeypatch.setitem(dinoreg.CONFIGS, f"{name}_reg", config)
        model, path = randomised(config), f"/dinov2_{name}/dinov2_{name}_reg4"
        hub.files[f"{path}_pretrain.pth"] = saved(model.state_dict())
        hub.files[f"{path}_linear_head.pth"] = stand_in_head(model, 1)
        hub.files[f"{path}_linear4_head.pth"] = stand_in_head(model, 4)
    photo = PHOTOS / "astronaut.jpg"
    hub.files["/000000039769.jpg"] = photo.read_bytes()
    tokens = torch.from_numpy(reference(model, preprocess(photo)[None])[1][-1][0, :3, :3]).float()
    check_official_files(hub.url, tokens)
    assert sorted(hub.requests) == sorted(hub.files)  # each is requested once

    cached = hub.cache / "dinov2_vitb14_reg4_pretrain.pth"
    state = torch.load(io.BytesIO(cached.read_bytes()), weights_only=True)
    cached.write_bytes(saved(state | {"register_tokens": state["register_tokens"].flip(1)}))
    with pytest.raises(AssertionError):
        check_official_files(hub.url, tokens)
