"""Tests of convert_weights.py: round trips through every dialect, checkpoints as people have them,
and what is refused. `test_parity.py` compares converted models with their originals."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convert_weights
import dinoreg
from dinoreg import CONFIGS, DinoVisionTransformer, LinearClassifier, Transform
from test_dinoreg import (
    HERE,
    SMALL,
    TINY,
    assert_same,
    randomise,
    randomised,
    scaled_error,
    tiny_classifier,
)


def converted(source, **options):
    model, _ = convert_weights.read(str(source), **options)
    return model


def convert(source, output, *options) -> int:
    """The program in this process."""
    return convert_weights.main([str(source), "-o", str(output), *map(str, options)])


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: x.clone() for key, x in state.items()}


def zeros(state: dict) -> dict:
    return {key: torch.zeros_like(x) for key, x in state.items()}


def classifier_of_one_layer() -> LinearClassifier:
    model = randomise(LinearClassifier(randomised(TINY), 3))
    model.backbone.transform = Transform().at_size(12)
    model.labels = ["cat", "dog", "ü"]
    return model


# --------------------------------------------------------------------------------------------------
# Round trips


@pytest.fixture(params=["vits14_reg", "vits14"])
def config(request):
    return replace(CONFIGS[request.param], depth=2, image_size=70)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize(
    "dialect, name",
    [("dinoreg", "a.safetensors"), ("official", "a.pth"), ("official", "a.safetensors"),
     ("hf", "a")],
)  # fmt: skip
def test_round_trip_of_every_dialect(config, ffn, dialect, name, tmp_path):
    model = randomised(replace(config, ffn=ffn))
    convert_weights.write(model, tmp_path / name, dialect)
    back = converted(tmp_path / name)
    assert_same(back, model)
    assert back.config == model.config
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_round_trip_through_timm(config, ffn, name, tmp_path):
    """It has no mask token, and with registers the position of the CLS token is in the token."""
    model, images = randomised(replace(config, ffn=ffn)), torch.randn(1, 3, 28, 42)
    convert_weights.write(model, tmp_path / name, "timm")
    back = converted(tmp_path / name)
    assert back.config == model.config
    assert scaled_error(back(images), model(images)) < 1e-6
    assert_same(back.blocks, model.blocks)


def test_round_trip_of_a_hugging_face_classifier(tmp_path):
    model = classifier_of_one_layer()
    convert_weights.write(model, tmp_path / "hf", "hf")
    back = converted(tmp_path / "hf")
    assert_same(back, model)
    assert back.labels == model.labels
    assert back.config == model.config
    assert back.transform == model.transform


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


def test_the_config_that_is_written_for_hugging_face(tmp_path):
    model = randomised(replace(TINY, mlp_ratio=2.0, drop_path_rate=0.1, layerscale_init=0.5))
    convert_weights.write(model, tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "use_swiglu_ffn": False,
        "image_size": 20,
        "patch_size": 4,
        "num_channels": 3,
        "num_register_tokens": 4,
        "drop_path_rate": 0.1,
        "layerscale_value": 0.5,
    }
    assert written | expected == written


def test_other_channels_through_hugging_face(tmp_path):
    model = randomised(replace(TINY, in_chans=5))
    convert_weights.write(model, tmp_path / "hf", "hf")
    assert_same(converted(tmp_path / "hf"), model)


def test_a_rectangular_grid_in_a_file_of_dinoreg(tmp_path):
    model = randomised(replace(TINY, image_size=(20, 40)))
    convert_weights.write(model, tmp_path / "model.safetensors")
    assert converted(tmp_path / "model.safetensors").config.image_size == (20, 40)


@pytest.mark.parametrize(
    "make, dialect, message",
    [
        (lambda: randomised(replace(TINY, mlp_ratio=3.5)), "hf", "mlp_ratio is 3.5"),
        (lambda: randomised(replace(TINY, image_size=(20, 40))), "hf", "5 x 10 patches"),
        (lambda: randomised(replace(TINY, image_size=(20, 40))), "timm", "5 x 10 patches"),
        (lambda: randomised(replace(TINY, image_size=(20, 40))), "official", "5 x 10 patches"),
        (tiny_classifier, "hf", "one layer"),
        (tiny_classifier, "timm", "one layer"),
        (classifier_of_one_layer, "timm", "only the CLS token"),
    ],
)
def test_models_that_a_dialect_cannot_express(make, dialect, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_weights.write(make(), tmp_path / "out.pth", dialect)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dialect", ["dinoreg", "official", "hf", "timm"])
def test_edited_models_are_refused(dialect, tmp_path):
    model = randomised(TINY)
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="cannot save this model as it is: "):
        convert_weights.write(model, tmp_path / "out.pth", dialect)
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# Files and folders of Hugging Face


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


@pytest.fixture
def many_files(tmp_path) -> Path:
    """A folder of Hugging Face with files of other models."""
    convert_weights.write(randomised(TINY), folder := tmp_path / "many", "hf")
    for name in ("backbone_compatible", "dino_head"):
        dinoreg.save_file({"x": torch.zeros(2)}, folder / f"{name}.safetensors")
    return folder


def test_a_folder_of_several_files(many_files):
    assert_same(converted(many_files), randomised(TINY))


@pytest.mark.parametrize(
    "name, message",
    [
        ("model-00001-of-00002.safetensors", "only 1 of the 2 files"),
        (
            "other.safetensors",
            "expected one file of weights, found backbone_compatible.safetensors, ",
        ),
    ],
)
def test_folders_that_are_refused(many_files, name, message):
    (many_files / "model.safetensors").rename(many_files / name)
    with pytest.raises(OSError, match=message):
        converted(many_files)


def test_a_repository_of_the_hugging_face_hub(tmp_path, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    convert_weights.write(randomised(TINY), folder := tmp_path / "downloaded", "hf")

    def download(repo, allow_patterns):
        asked.append(repo)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert_same(converted("someone/model"), randomised(TINY))
    assert asked == ["someone/model"]


def test_an_old_repository_of_the_hugging_face_hub(tmp_path, monkeypatch):
    hub, patterns = pytest.importorskip("huggingface_hub"), []
    state = convert_weights.from_official(randomised(TINY), "hf")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))

    def download(repo, allow_patterns):
        patterns.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert_same(converted("someone/old"), randomised(TINY))
    assert "pytorch_model*.bin" in patterns


def test_a_repository_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="pip install huggingface_hub"):
        converted("someone/model")


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    "file, change, message",
    [
        (CONFIG, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (CONFIG, {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        (CONFIG, {"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_"),
        (CONFIG, {"problem_type": "regression"}, "problem_type is 'regression'"),
        (CONFIG, {"id2label": {"0": "score"}}, "a head of one class"),
        (PROCESSOR, {"do_rescale": False}, "do_rescale is False; expected True"),
        (PROCESSOR, {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        (PROCESSOR, {"do_resize": False}, "do_resize is False; expected True"),
        (PROCESSOR, {"do_pad": True}, "do_pad is True; expected False"),
        (
            PROCESSOR,
            {"size": {"longest_edge": 224}},
            "the keys of size is ['longest_edge']; expected",
        ),
        (PROCESSOR, {"resample": 4}, "resample is 4; expected 0 or 1 or 2 or 3"),
        (PROCESSOR, {"image_processor_type": "SamImageProcessor"}, "image processor is 'Sam'"),
        (PROCESSOR, {"crop_size": 600}, "cannot transform images with"),
        (PROCESSOR, {"size": 7.5}, "cannot transform images with"),
        (PROCESSOR, {"image_mean": [0.5]}, "cannot transform images with"),
    ],
    ids=str,
)
def test_settings_of_hugging_face_that_are_refused(file, change, message, tmp_path):
    convert_weights.write(classifier_of_one_layer(), folder := tmp_path / "hf", "hf")
    described = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(described))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        converted(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


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
        ({"image_processor_type": "ViTImageProcessor", "size": 224, "do_center_crop": True},
         Transform((224, 224), None, "bilinear", (0.5,) * 3, (0.5,) * 3)),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224},
          "crop_size": 224},
         Transform(224, (224, 224), "bicubic",
                   convert_weights.CLIP_MEAN, convert_weights.CLIP_STD)),
    ],
    ids=["Bit", "ViT", "ViT without normalization", "ViT that crops nothing", "CLIP"],
)  # fmt: skip
def test_preprocessor_configs_of_other_classes(described, expected):
    assert convert_weights.transform_from_hf(described) == expected


# --------------------------------------------------------------------------------------------------
# timm's config.json


@pytest.mark.parametrize(
    "described, message",
    [
        ({"crop_mode": "border"}, "crop_mode"),
        ({"input_size": [3, 98, 140], "crop_mode": "center"}, "crop_mode"),
        ({"interpolation": "hamming"}, "resampling"),
    ],
)
def test_transforms_of_timm_that_are_refused(described, message):
    with pytest.raises(ValueError, match=message):
        convert_weights.transform_from_timm(described)


@pytest.fixture
def timm_folder(tmp_path) -> Path:
    """A model of a width whose heads only the name of the architecture tells."""
    model = randomised(replace(TINY, embed_dim=192, num_heads=3))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_number_of_heads_from_the_architecture(timm_folder):
    (timm_folder / "config.json").write_text('{"architecture": "vit_tiny_patch14"}')
    assert converted(timm_folder).config.num_heads == 3


def test_number_of_heads_without_an_architecture(timm_folder):
    with pytest.raises(ValueError, match=r"heads.* from width 192: give num_heads"):
        converted(timm_folder)


@pytest.mark.parametrize(
    "change", [{"global_pool": "avg"}, {"act_layer": "relu"}, {"qk_norm": True}]
)
def test_models_of_timm_that_are_refused(timm_folder, change):
    described = {"architecture": "vit_tiny_patch14", "model_args": change}
    (timm_folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=rf"config.json: {next(iter(change))} is"):
        converted(timm_folder)


# --------------------------------------------------------------------------------------------------
# Checkpoints as people have them

FC = {"fc.weight": torch.zeros(3, 384), "fc.bias": torch.zeros(3)}
CHECKPOINTS = {
    "module": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "module of a compiled one": lambda state: prefixed("module._orig_mod.", state),
    "checkpoint wrappers": lambda state: {
        key.replace("attn.", "attn._checkpoint_wrapped_module."): x for key, x in state.items()
    },
    "Lightning": lambda state: {
        "state_dict": prefixed("model.", state), "epoch": 1, "hyper_parameters": {"lr": 0.1},
    },
    "Lightning with a head": lambda state: {"state_dict": prefixed("model.backbone.", state) | FC},
    "encoder with a head": lambda state: prefixed("encoder.", state) | FC,
    "Depth Anything": lambda state: (
        prefixed("pretrained.", state) | {"depth_head.x": torch.zeros(3)}
    ),
    "VGGT": lambda state: (
        prefixed("aggregator.patch_embed.", state)
        | {"aggregator.frame_blocks.0.x": torch.zeros(3)}
    ),
    "student and teacher": lambda state: {
        "model": prefixed("student.", zeros(state)) | prefixed("teacher.", state)
    },
    "model and its average": lambda state: {
        "model": zeros(state), "model_ema": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    },
    "model_state_dict": lambda state: {
        "model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3,
    },
    "nested": lambda state: {
        "teacher": {"net": prefixed("backbone.", state), "dino_head": {"weight": torch.zeros(2)}}
    },
    "no mask token": lambda state: {key: x for key, x in state.items() if key != "mask_token"},
}  # fmt: skip


@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_backbones_in_other_checkpoints(wrap, tmp_path, capsys):
    model = randomised(SMALL)
    model.mask_token.data.zero_()
    torch.save(wrap(model.state_dict()), tmp_path / "model.pth")
    assert_same(converted(tmp_path / "model.pth"), model)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("convert_weights: ")


def test_a_checkpoint_of_the_official_training(tmp_path, capsys):
    model, chunks = randomised(replace(SMALL, depth=3)), {0: 0, 1: 1, 2: 1}
    # blocks.1 and blocks.2 lie in the second chunk, under their own numbers.
    state = {
        re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{chunks[int(m[1])]}.{m[1]}", key): x
        for key, x in model.state_dict().items()
    }
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.x": torch.zeros(2, 2)}
    teacher = {"teacher": prefixed("backbone.", state) | heads, "iteration": 10}
    torch.save(teacher, tmp_path / "teacher_checkpoint.pth")
    assert_same(converted(tmp_path / "teacher_checkpoint.pth"), model)
    assert "left out: dino_head, ibot_head" in capsys.readouterr().err


@pytest.fixture
def two_backbones(tmp_path) -> Path:
    state = randomised(SMALL).state_dict()
    path = tmp_path / "two.pth"
    torch.save(prefixed("left.", zeros(state)) | prefixed("right.", state), path)
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "two.pth: choose the prefix of one backbone with --prefix: 'left.', 'right.'"),
        (
            ["--prefix", "middle."],
            "two.pth: choose the prefix of one backbone with --prefix: 'left.', 'right.'",
        ),
    ],
)
def test_several_backbones(two_backbones, options, message, tmp_path, capsys):
    assert convert(two_backbones, tmp_path / "out.safetensors", *options) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["two.pth"]


def test_the_prefix_of_one_of_several_backbones(two_backbones, tmp_path, capsys):
    assert convert(two_backbones, tmp_path / "out.safetensors", "--prefix", "right.") == 0
    assert_same(dinoreg.load(tmp_path / "out.safetensors"), randomised(SMALL))
    assert "left out: left" in capsys.readouterr().err


def test_averaged_weights_are_reported(tmp_path, capsys):
    state = randomised(SMALL).state_dict()
    both = prefixed("student.", zeros(state)) | prefixed("teacher.", state)
    torch.save(both, tmp_path / "two.pth")
    assert_same(converted(tmp_path / "two.pth"), randomised(SMALL))
    assert "took the averaged weights 'teacher.', not 'student.'" in capsys.readouterr().err


def save_with_a_head(path: Path, prefix: str, name: str, width: int) -> nn.Linear:
    head = randomise(nn.Linear(width, 3))
    state = prefixed(prefix, randomised(SMALL).state_dict())
    torch.save(state | prefixed(name, head.state_dict()), path)
    return head


@pytest.mark.parametrize(
    "prefix, name, width",
    [
        ("backbone.", "linear_head.", 768),
        ("state.backbone.", "state.linear_head.", 768),
        ("", "linear_head.", 768),
        ("backbone.", "backbone.head.", 384),
        ("", "head.", 384),
    ],
)
def test_a_head_beside_a_backbone(prefix, name, width, tmp_path, capsys):
    head = save_with_a_head(tmp_path / "model.pth", prefix, name, width)
    model, images = converted(tmp_path / "model.pth"), torch.randn(2, 3, 8, 12)
    inputs = LinearClassifier(randomised(SMALL), 3).linear_input(images)[:, :width]
    assert scaled_error(model(images), head(inputs)) < 1e-5
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "prefix, name, width",
    [("backbone.", "head.", 384), ("", "fc.", 384), ("backbone.", "linear_head.", 385)],
)
def test_other_heads_are_left_out(prefix, name, width, tmp_path, capsys):
    save_with_a_head(tmp_path / "model.pth", prefix, name, width)
    assert_same(converted(tmp_path / "model.pth"), randomised(SMALL))
    assert f"left out: {name[:-1]}" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [(".gamma", 1), ("qkv.bias", 0)])
def test_models_without_layerscale_or_biases(name, value, tmp_path):
    model = randomised(SMALL)
    state = {key: x for key, x in model.state_dict().items() if not key.endswith(name)}
    torch.save(state, tmp_path / "model.pth")
    for key, x in model.state_dict().items():
        if key.endswith(name):
            x.fill_(value)
    assert_same(converted(tmp_path / "model.pth"), model)


@pytest.mark.parametrize(
    "D, hidden, ffn",
    [(384, 1023, "mlp"), (1000, 4095, "mlp"), (1280, 3417, "mlp"), (1280, 3416, "swiglu"),
     (1536, 4096, "swiglu")],
)  # fmt: skip
def test_hidden_widths_that_rounding_would_change(D, hidden, ffn):
    state = DinoVisionTransformer(replace(TINY, embed_dim=D, depth=1)).state_dict()
    state = {key: x for key, x in state.items() if ".mlp." not in key}
    first, second = ("fc1", "fc2") if ffn == "mlp" else ("w12", "w3")
    state |= {f"blocks.0.mlp.{first}.weight": torch.empty(hidden * (1 + (ffn == "swiglu")), D)}
    state |= {f"blocks.0.mlp.{second}.weight": torch.empty(D, hidden)}
    found = dinoreg.infer_config(state, TINY)
    assert (found.hidden_dim, found.ffn) == (hidden, ffn)
    assert dinoreg.infer_config(state, found) == found


# --------------------------------------------------------------------------------------------------
# The program, and its errors


@pytest.fixture
def official_files(tmp_path) -> dict[str, Path]:
    """A backbone, a head and labels; the model is `classifier`."""
    model = randomise(LinearClassifier(randomised(replace(TINY, depth=4)), 3, layers=4))
    paths = {name: tmp_path / name for name in ("backbone.pth", "head.pth", "labels.txt", "out")}
    torch.save(model.backbone.state_dict(), paths["backbone.pth"])
    torch.save(model.linear_head.state_dict(), paths["head.pth"])
    paths["labels.txt"].write_text("cat\ndog\nü\n", encoding="utf-8")
    return paths


def test_an_official_backbone_with_head_and_labels(official_files):
    backbone, head, labels, out = official_files.values()
    command = [sys.executable, "convert_weights.py", backbone, "--head", head, "--labels", labels]
    command += ["--num-heads", "4", "-o", out]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert "took 4 register tokens" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.returncode == 0
    model = dinoreg.load(out)
    assert_same(model, randomise(LinearClassifier(randomised(replace(TINY, depth=4)), 3, layers=4)))
    assert model.labels == ["cat", "dog", "ü"]
    count = sum(p.numel() for p in model.parameters())
    assert f"official -> dinoreg, {count:,} parameters" in result.stdout
    assert "Config(embed_dim=32, depth=4, num_heads=4" in result.stdout


@pytest.mark.parametrize("official", [True, False])
def test_only_an_official_head_has_the_classes_of_imagenet(official_files, official, monkeypatch):
    backbone, head, _, _ = official_files.values()
    torch.save(randomise(nn.Linear(5 * 32, 1000)).state_dict(), head)
    if official:
        monkeypatch.setitem(CONFIGS, "vits14_reg", replace(TINY, depth=4))
    labels = converted(backbone, head=head, num_heads=4).labels
    assert labels == (dinoreg.IMAGENET_CLASSES if official else None)


def test_unnamed_classes_are_not_those_of_imagenet(tmp_path):
    model = randomise(LinearClassifier(randomised(SMALL), 1000))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert converted(tmp_path / "model.pth").labels is None


@pytest.mark.parametrize("file", ["backbone.pth", "head.pth"])
def test_the_error_names_the_damaged_file(official_files, file, capsys):
    backbone, head, _, out = official_files.values()
    official_files[file].write_bytes(b"damaged")
    assert convert(backbone, out, "--head", head, "--num-heads", 4) == 2
    assert str(official_files[file]) in capsys.readouterr().err


KEY = "encoder.layer.1.attention.attention.key.bias"


def without(state: dict, key: str) -> dict:
    return {name: x for name, x in state.items() if name != key}


# What is made of a state dict, of its dialect, and the error.
REFUSED_HF = {
    "missing part": (lambda state: without(state, KEY), f"{KEY} is missing"),
    "missing": (
        lambda state: without(state, "embeddings.position_embeddings"),
        "embeddings.position_embeddings is missing; expected",
    ),
    "unknown": (
        lambda state: state | {"encoder.layer.0.extra": torch.zeros(3)},
        "encoder.layer.0.extra: no such tensor in the hf dialect",
    ),
    "shape": (
        lambda state: state | {"layernorm.bias": torch.zeros(7)},
        r"norm.bias is \(7,\); expected \(384,\)",
    ),
}
OTHER_LAYERS = ["storage_tokens", "rope_embed.periods", "norm_pre.weight", "fc_norm.bias"]
REFUSED_OFFICIAL = {
    "missing gamma": (
        lambda state: without(state, "blocks.1.ls1.gamma"),
        "blocks.1.ls1.gamma is missing; expected",
    ),
    **{
        name: (
            lambda state, name=name: state | {name: torch.zeros(3)},
            f"{name}: not a layer of DINOv2",
        )
        for name in OTHER_LAYERS
    },
    "Namespace": (
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        "argparse.Namespace",
    ),
    "NumPy": (lambda state: {"model": state, "best": np.float64(0.5)}, "numpy"),
    "Path": (lambda state: {"model": state, "args": Path("x")}, "pathlib"),
    "other model": (
        lambda state: {"conv1.weight": torch.zeros(3)},
        "no patch_embed.proj.weight; the first is conv1.weight",
    ),
    "list": (lambda state: [1, 2], ""),
}


def assert_refused(content, message: str, folder: Path, capsys) -> None:
    torch.save(content, folder / "model.pth")
    assert convert(folder / "model.pth", folder / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert re.search(rf"model\.pth: .*{message}", error)
    assert "two options" not in error  # PyTorch advises to let the code in the file run
    assert error.strip().isprintable()
    assert os.listdir(folder) == ["model.pth"]


@pytest.mark.parametrize("change, message", REFUSED_HF.values(), ids=REFUSED_HF)
def test_files_of_hugging_face_that_are_refused(change, message, tmp_path, capsys):
    state = convert_weights.from_official(randomised(SMALL), "hf")
    assert_refused(change(state), message, tmp_path, capsys)


@pytest.mark.parametrize("change, message", REFUSED_OFFICIAL.values(), ids=REFUSED_OFFICIAL)
def test_checkpoints_that_are_refused(change, message, tmp_path, capsys):
    assert_refused(change(randomised(SMALL).state_dict()), message, tmp_path, capsys)


@pytest.mark.parametrize(
    "name, message",
    [("", "expected one file of weights, found none"), ("nowhere.pth", "")],
)
def test_folders_and_files_without_weights(name, message, tmp_path, capsys):
    assert convert(tmp_path / name, tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert re.search(f"{tmp_path / name}.*{message}", error)
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("the payload ran",)


@pytest.mark.parametrize(
    "content", [{"weight": Payload()}, {"teacher": {"backbone.cls_token": Payload()}}]
)
@pytest.mark.parametrize("name", ["file.pth", "folder/pytorch_model.bin"])
def test_no_code_in_a_pickle_runs(content, name, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    assert convert(path.parent if "/" in name else path, tmp_path / "out.safetensors") == 2
    output, error = capsys.readouterr()
    assert "payload" not in output
    assert "two options" not in error  # PyTorch advises to let the code run
    assert error.strip().isprintable()


def test_a_file_may_be_converted_over_itself(tmp_path):
    torch.save(randomised(SMALL).state_dict(), tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "model.pth") == 0
    assert_same(dinoreg.load(tmp_path / "model.pth"), randomised(SMALL))


def test_a_folder_is_written_as_a_whole(tmp_path):
    """A folder of the user that is called as a temporary one was stays."""
    (tmp_path / "hf.part").mkdir()
    (tmp_path / "hf.part" / "notes.txt").touch()
    convert_weights.write(randomised(TINY), tmp_path / "hf", "hf")
    assert sorted(os.listdir(tmp_path)) == ["hf", "hf.part"]
    assert os.listdir(tmp_path / "hf.part") == ["notes.txt"]
    shutil.rmtree(tmp_path / "hf.part")


# --------------------------------------------------------------------------------------------------
# What the files say, and what the tensors say


def classifier_folder(dialect: str, folder: Path) -> Path:
    """A folder of Hugging Face or timm with a classifier of three classes and its config.json."""
    model = classifier_of_one_layer()
    if dialect == "hf":
        convert_weights.write(model, folder, "hf")
        return folder
    folder.mkdir()
    model.linear_head.weight.data[:, 32:] = 0
    convert_weights.write(model, folder / "model.safetensors", "timm")
    args = {"num_heads": 4, "img_size": [20, 20], "patch_size": 4, "reg_tokens": 4, "depth": 3}
    args |= {"embed_dim": 32, "mlp_ratio": 4.0, "no_embed_class": True}
    described = {"architecture": "vit_small_patch14", "num_classes": 3, "model_args": args}
    described |= {"num_features": 32, "label_names": ["cat", "dog", "ü"]}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def change(file: Path, settings: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("dialect", ["hf", "timm"])
def test_a_config_that_agrees_with_the_tensors(dialect, tmp_path):
    model = converted(classifier_folder(dialect, tmp_path / "in"))
    assert model.config == classifier_of_one_layer().config
    assert model.labels == ["cat", "dog", "ü"]


@pytest.mark.parametrize(
    "dialect, settings",
    [
        ("hf", {"num_hidden_layers": 1}),
        ("hf", {"num_register_tokens": 0}),
        ("hf", {"hidden_size": 64}),
        ("hf", {"patch_size": 14}),
        ("hf", {"image_size": 24}),
        ("hf", {"num_channels": 1}),
        ("hf", {"mlp_ratio": 2}),
        ("hf", {"use_swiglu_ffn": True}),
        ("hf", {"qkv_bias": False}),
        ("hf", {"num_labels": 4}),
        ("timm", {"num_features": 64}),
        ("timm", {"num_classes": 4}),
        ("timm", {"depth": 2}),
        ("timm", {"embed_dim": 64}),
        ("timm", {"reg_tokens": 8}),
        ("timm", {"img_size": [24, 24]}),
        ("timm", {"mlp_ratio": 2.0}),
        ("timm", {"act_layer": "silu"}),
        ("timm", {"label_offset": 1}),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors(dialect, settings, tmp_path):
    folder = classifier_folder(dialect, tmp_path / "in")
    change(
        folder / "config.json",
        settings | ({"model_args": settings | {"num_heads": 4}} if dialect == "timm" else {}),
    )
    ((key, value),) = settings.items()
    value = 24 if value == [24, 24] else value
    with pytest.raises(ValueError, match=rf"in: config.json: {key} is {value!r}; the model has "):
        converted(folder)


def test_registers_that_a_config_states_and_a_file_lacks(tmp_path):
    folder = classifier_folder("hf", tmp_path / "in")
    tensors, _ = dinoreg.read_tensors(folder / "model.safetensors")
    tensors = {key: x for key, x in tensors.items() if "register_tokens" not in key}
    dinoreg.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="num_register_tokens is 4; the model has 0"):
        converted(folder)


def test_a_rectangular_grid_that_a_config_states(tmp_path):
    model = randomised(replace(TINY, image_size=(20, 40), num_register_tokens=0))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    settings = {"image_size": [20, 40], "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert converted(tmp_path).config.image_size == (20, 40)


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"1": "cat", "2": "dog", "3": "cow"}, r"from 0 without gaps: \['1', '2', '3'\]"),
        ({"0": "a", "5": "b", "9": "c"}, r"from 0 without gaps: \['0', '5', '9'\]"),
        ({"0": "a", "1": "b"}, "expected labels of 3 classes"),
        ({"0": "a", "1": "b", "2": 3}, "expected labels of 3 classes"),
        ({"a": "cat", "b": "dog", "c": "cow"}, "invalid literal"),
    ],
)
@pytest.mark.parametrize("dialect, key", [("hf", "id2label"), ("timm", "label_names")])
def test_labels_that_are_refused(dialect, key, labels, message, tmp_path):
    folder = classifier_folder(dialect, tmp_path / "in")
    change(folder / "config.json", {key: labels})
    with pytest.raises(ValueError, match=f"in: .*{message}"):
        converted(folder)


def test_labels_of_timm_as_a_dict_and_in_old_files(tmp_path):
    folder = classifier_folder("timm", tmp_path / "in")
    change(folder / "config.json", {"label_names": {"2": "c", "10": "x"} | {"0": "a", "1": "b"}})
    with pytest.raises(ValueError, match="without gaps"):
        converted(folder)
    change(folder / "config.json", {"label_names": {"2": "c", "0": "a", "1": "b"}})
    assert converted(folder).labels == ["a", "b", "c"]
    old = {"label_names": None, "labels": ["d", "e", "f"], "input_size": [3, 98, 98]}
    change(folder / "config.json", old | {"mean": [0.5] * 3, "crop_pct": 1.0})
    model = converted(folder)
    assert model.labels == ["d", "e", "f"]
    assert model.transform == Transform(98, (98, 98), mean=(0.5,) * 3)


@pytest.mark.parametrize(
    "content", ["[1]", "{", '"x"', '{"model_args": 3}', '{"id2label": 3, "num_heads": 4}']
)
def test_a_config_that_is_no_config(content, tmp_path):
    folder = classifier_folder("hf", tmp_path / "in")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"in: config\.json: "):
        converted(folder)


# What is made of one tensor.
DAMAGES = {
    "0-dim": lambda x: x.new_tensor(1.0),
    "flat": lambda x: x.flatten() if x.ndim > 1 else x[None],
    "transposed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous(),
    "empty": lambda x: x.new_empty(0),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x.bool(),
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x.new_zeros(1).expand(x.shape),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dialect", ["official", "timm", "hf", "hf5"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_one_damaged_tensor_is_named(ffn, dialect, damage):
    model = DinoVisionTransformer(replace(TINY, ffn=ffn, depth=2))
    state = convert_weights.from_official(model, dialect)
    tried = 0
    for key, x in state.items():
        damaged = DAMAGES[damage](x)
        same = (damaged.shape, damaged.dtype, damaged.layout) == (x.shape, x.dtype, x.layout)
        if same and damage != "expanded":  # a square matrix that is transposed, for instance
            continue
        with pytest.raises(ValueError, match=rf"^{re.escape(key)} is "):
            convert_weights.to_official(state | {key: damaged})
        tried += 1
    assert tried > 5


@pytest.mark.parametrize("damage", [DAMAGES["flat"], DAMAGES["transposed"], DAMAGES["int8"]])
@pytest.mark.parametrize("key", ["classifier.weight", "classifier.bias"])
def test_a_damaged_head_is_named(key, damage, tmp_path):
    state = convert_weights.from_official(classifier_of_one_layer(), "hf")
    torch.save(state | {key: damage(state[key])}, tmp_path / "model.pth")
    if key == "classifier.bias" and damage is DAMAGES["transposed"]:
        return  # it stays as it is
    with pytest.raises(ValueError, match=f"model.pth: {key} is "):
        converted(tmp_path / "model.pth", num_heads=4)


# --------------------------------------------------------------------------------------------------
# How positions are resized, and registers that are not used

NOTE = "resizes positions as the released models do"


@pytest.mark.parametrize("prefix, noted", [("", False), ("teacher.backbone.", True)])
def test_only_released_models_have_a_known_way_to_resize_positions(
    prefix, noted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(CONFIGS, "vits14_reg", SMALL)
    torch.save(prefixed(prefix, randomised(SMALL).state_dict()), tmp_path / "model.pth")
    model = converted(tmp_path / "model.pth")
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)
    assert (NOTE in capsys.readouterr().err) == noted


def test_options_of_how_positions_are_resized(tmp_path, capsys):
    torch.save(prefixed("x.", randomised(SMALL).state_dict()), tmp_path / "model.pth")
    options = ["--no-interpolate-antialias", "--interpolate-offset", 0.1]
    assert convert(tmp_path / "model.pth", tmp_path / "out", *options) == 0
    model = dinoreg.load(tmp_path / "out")
    assert (model.interpolate_antialias, model.interpolate_offset) == (False, 0.1)
    assert capsys.readouterr().err == ""


TRAINING = """
student:
  arch: vit_large
  num_register_tokens: 4
  interpolate_antialias: false
  interpolate_offset: 0.05  # a comment
teacher:
  momentum_teacher: 0.992
"""


@pytest.mark.parametrize("name", ["model.pth", "eval/training_12499/teacher_checkpoint.pth"])
def test_the_config_of_a_training_run(name, tmp_path, capsys):
    (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "config.yaml").write_text(TRAINING)
    torch.save({"teacher": prefixed("backbone.", randomised(SMALL).state_dict())}, path)
    model = converted(path)
    assert (model.interpolate_antialias, model.interpolate_offset) == (False, 0.05)
    error = capsys.readouterr().err
    assert f"positions are resized as {tmp_path / 'config.yaml'} says" in error
    assert NOTE not in error
    assert converted(path, interpolate_offset=0.2).interpolate_offset == 0.2


@pytest.mark.parametrize("value", ["yes", "2", "[]"])
@pytest.mark.parametrize("key", ["interpolate_antialias", "interpolate_offset"])
def test_training_configs_that_are_refused(key, value, tmp_path):
    (tmp_path / "config.yaml").write_text(f"student:\n  {key}: {value}\n")
    torch.save(randomised(SMALL).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: "):
        converted(tmp_path / "model.pth")


def test_registers_that_a_model_does_not_use(tmp_path, capsys):
    """UniDepth and UniK3D keep a row of register_tokens that they never add."""
    model = randomised(replace(TINY, **dinoreg.PLAIN))
    state = prefixed("pixel_encoder.", model.state_dict())
    state |= {"pixel_encoder.register_tokens": torch.randn(1, 1, 32)}
    torch.save(state, tmp_path / "model.pth")
    assert converted(tmp_path / "model.pth", num_heads=4).num_register_tokens == 1
    assert "took 1 register tokens (--registers 0: none)" in capsys.readouterr().err
    options = ["--num-heads", 4, "--registers", 0]
    assert convert(tmp_path / "model.pth", tmp_path / "out", *options) == 0
    assert_same(dinoreg.load(tmp_path / "out"), model)
    assert capsys.readouterr().err == ""


def test_another_number_of_registers_than_the_file_has(tmp_path):
    torch.save(randomised(SMALL).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: registers is 2; the model has 4"):
        converted(tmp_path / "model.pth", registers=2)


# --------------------------------------------------------------------------------------------------
# Options


@pytest.fixture
def sources(tmp_path, hub) -> dict[str, str]:
    """An official name and one file of each kind that has no use for some option."""
    dinoreg.save(randomised(SMALL), tmp_path / "own.safetensors")
    torch.save(randomised(SMALL).state_dict(), tmp_path / "official.pth")
    save_with_a_head(tmp_path / "classifier.pth", "backbone.", "linear_head.", 768)
    names = ("own.safetensors", "official.pth", "classifier.pth", "vits14_reg")
    return {name: str(tmp_path / name) if "." in name else name for name in names}


@pytest.mark.parametrize(
    "name, options",
    [
        ("own.safetensors", ["--head", "head.pth"]),
        ("own.safetensors", ["--head", ""]),
        ("own.safetensors", ["--num-heads", "6"]),
        ("own.safetensors", ["--prefix", "x."]),
        ("own.safetensors", ["--layers", "1"]),
        ("own.safetensors", ["--registers", "0"]),
        ("own.safetensors", ["--interpolate-offset", "0"]),
        ("own.safetensors", ["--labels", "labels.txt"]),
        ("official.pth", ["--layers", "4"]),
        ("official.pth", ["--labels", "labels.txt"]),
        ("classifier.pth", ["--head", "head.pth"]),
        ("vits14_reg", ["--layers", "4"]),
        ("vits14_reg", ["--head", "head.pth"]),
        ("vits14_reg", ["--num-heads", "6"]),
        ("vits14_reg", ["--prefix", ""]),
        ("vits14_reg", ["--labels", "labels.txt"]),
    ],
    ids=str,
)
def test_options_that_do_not_apply(sources, name, options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("a\n")
    torch.save(nn.Linear(768, 3).state_dict(), "head.pth")
    assert convert(sources[name], "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{options[0]} does not apply to " in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--head", "missing.pth"], "missing.pth: no such file"),
        (["--head", "official.pth"], "official.pth: no linear head of weight and bias"),
        (["--num-heads", "0"], "num_heads is 0; the model has 6"),
        (["--num-heads", "7"], "num_heads must divide embed_dim 384, got 7"),
        (["--prefix", "x."], "official.pth: choose the prefix of one backbone with --prefix: ''"),
        (["--interpolate-offset", "nan"], "interpolate_offset must be in"),
    ],
)
def test_options_that_contradict_the_file(sources, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert("official.pth", "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not Path("out").exists()


def test_heads_that_contradict_the_config(tmp_path, capsys):
    convert_weights.write(randomised(TINY), tmp_path / "hf", "hf")
    assert convert(tmp_path / "hf", tmp_path / "out", "--num-heads", 8) == 2
    assert "num_heads is 8; the model has 4" in capsys.readouterr().err
    assert convert(tmp_path / "hf", tmp_path / "out", "--num-heads", 4) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xef\xbb\xbfcat\ndog\ncow\n", None),
        (b"cat\r\ndog\r\ncow", None),
        (b"cat\ndog\n", "expected 3 lines, none empty; got 2"),
        (b"cat\n\ncow\n", "expected 3 lines, none empty; got 3"),
        (b"cat\ndog\ncow\nhen\n", "expected 3 lines, none empty; got 4"),
        (b"", "expected 3 lines, none empty; got 1"),
        ("cat\ndog\nküh\n".encode("latin-1"), "can't decode byte"),
        ("cat\ndog\ncow\n".encode("utf-16"), "can't decode byte"),
    ],
)
def test_files_of_labels(content, message, tmp_path, capsys):
    dinoreg.save(classifier_of_one_layer(), tmp_path / "model.safetensors")
    (labels := tmp_path / "labels.txt").write_bytes(content)
    status = convert(tmp_path / "model.safetensors", tmp_path / "out", "--labels", labels)
    if message is None:
        assert status == 0
        assert dinoreg.load(tmp_path / "out").labels == ["cat", "dog", "cow"]
    else:
        assert status == 2
        assert re.search(f"{labels}: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize("dialect", ["official", "timm"])
def test_labels_for_files_that_cannot_have_them(dialect, tmp_path, capsys):
    options = ["--to", dialect, "--labels", tmp_path / "labels.txt"]
    assert convert("model.safetensors", tmp_path / "out.pth", *options) == 2
    assert f"--labels does not apply to --to {dialect}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "output, dialect, message",
    [
        ("", "dinoreg", "'' cannot be the output: give a file"),
        (".", "dinoreg", "'.' cannot be the output: give a file"),
        ("..", "hf", "'..' cannot be the output: give an empty or new folder"),
        ("full", "dinoreg", "'full' cannot be the output: give a file"),
        ("full", "hf", "'full' cannot be the output: give an empty or new folder"),
        ("full/file", "hf", "'full/file' cannot be the output: give an empty or new folder"),
        ("model", "timm", "model: the name must end in .safetensors or .pth"),
        ("model.v2", "official", "model.v2: the name must end in .safetensors or .pth"),
    ],
)
def test_outputs_that_are_refused(output, dialect, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dinoreg.save(randomised(SMALL), "model.safetensors")
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    assert convert("model.safetensors", output, "--to", dialect) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Path("full/file").read_text() == "mine"
    assert sorted(os.listdir()) == ["full", "model.safetensors"]


@pytest.mark.parametrize(
    "source", ["weights/x.safetensors", "here/x", "../x", "x/y.PTH", "~/x", "a/b/c"]
)
def test_paths_are_not_asked_of_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_weights, "hf_folder", lambda repo: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(source)}: no such file"):
        converted(source)


# --------------------------------------------------------------------------------------------------
# The boundary of the program


def test_help_without_docstrings():
    command = [sys.executable, "-OO", "convert_weights.py", "-h"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0
    assert "--registers" in result.stdout


def test_an_interrupted_conversion(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dinoreg, "read_tensors", interrupt)
    assert convert(tmp_path / "model.pth", tmp_path / "out") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_names_are_printed_on_one_line_without_escapes(tmp_path, capsys):
    model = classifier_of_one_layer()
    model.labels[0] = ESCAPE = "\x1b]0;x\x07\n"
    dinoreg.save(model, tmp_path / "model.safetensors")
    assert convert(tmp_path / "model.safetensors", tmp_path / f"out{ESCAPE}") == 0
    assert convert(tmp_path / f"missing{ESCAPE}", tmp_path / "out") == 2
    state = prefixed("a.", randomised(SMALL).state_dict()) | {f"b{ESCAPE}": torch.zeros(2)}
    torch.save(state, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "out") == 0
    output, error = capsys.readouterr()
    assert "\x1b" not in output + error
    assert all(line.startswith("convert_weights: ") for line in error.splitlines())
