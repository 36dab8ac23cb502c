"""Convert weights of DINOv2, with or without registers, between all published formats.

    python convert_weights.py vits14_reg_lc -o classifier.safetensors  # an official model, by name
    python convert_weights.py backbone.pth --head head.pth -o model.safetensors  # official files
    python convert_weights.py facebook/dinov2-with-registers-small -o small.safetensors
    python convert_weights.py classifier.safetensors --to hf -o folder

It reads official files, Hugging Face repositories and folders (of any age, in one file or in
shards), timm files, checkpoints of Meta's training code, and dinoreg's own files: the names of the
tensors tell which. All but training checkpoints can be written, all through the official names."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinoreg
from dinoreg import Config, DinoVisionTransformer, LinearClassifier, Transform

Model = DinoVisionTransformer | LinearClassifier
note = partial(dinoreg.complain, program="convert_weights")

# Names and shapes of tensors ----------------------------------------------------------------------

# The names of the same parameters in each dialect. "#" is the block (`BLOCKS`), braces list the
# parts of which the official tensor is the concatenation. All versions of transformers write the
# names of "hf"; version 5 uses those of "hf5" in memory, where they differ.
TABLE = """
official          timm              hf                                      hf5
cls_token         cls_token         embeddings.cls_token
mask_token        -                 embeddings.mask_token
register_tokens   reg_token         embeddings.register_tokens
pos_embed         pos_embed         embeddings.position_embeddings
patch_embed.proj  patch_embed.proj  embeddings.patch_embeddings.projection
#.norm1           #.norm1           #.norm1
#.attn.qkv        #.attn.qkv        #.attention.attention.{query,key,value} #.attention.{q,k,v}_proj
#.attn.proj       #.attn.proj       #.attention.output.dense                #.attention.o_proj
#.ls1.gamma       #.ls1.gamma       #.layer_scale1.lambda1
#.norm2           #.norm2           #.norm2
#.mlp.fc1         #.mlp.fc1         #.mlp.fc1
#.mlp.fc2         #.mlp.fc2         #.mlp.fc2
#.mlp.w12         #.mlp.fc1         #.mlp.weights_in                        #.mlp.{gate,up}_proj
#.mlp.w3          #.mlp.fc2         #.mlp.weights_out                       #.mlp.down_proj
#.ls2.gamma       #.ls2.gamma       #.layer_scale2.lambda1
norm              norm              layernorm
"""
DIALECTS, *ROWS = (line.split() for line in TABLE.strip().splitlines())
NAMES = {row[0]: dict(zip(DIALECTS, row + row[-1:])) for row in ROWS}
BLOCKS = {"official": "blocks.", "timm": "blocks.", "hf": "encoder.layer.", "hf5": "encoder.layer."}

# Parameters that some models do without (in all blocks), and the values that have no effect.
ABSENT = {"mask_token": 0, "blocks.0.attn.qkv.bias": 0}
ABSENT |= {"blocks.0.ls1.gamma": 1, "blocks.0.ls2.gamma": 1}
# Layers of timm's and DINOv3's models that change what the backbone computes.
OTHER_MODELS = {"norm_pre", "fc_norm", "dist_token", "rope", "rope_embed", "storage_tokens"}


def translate(name: str, dialect: str) -> list[str]:
    """The names in a dialect of the parts of an official tensor; [] if the dialect has none."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match
    block, stem, suffix = match.groups("")
    theirs = NAMES["#." + stem if block else stem][dialect]
    before, _, rest = theirs.replace("#", BLOCKS[dialect] + block).partition("{")
    parts, _, after = rest.partition("}")
    return [before + part + after + suffix for part in parts.split(",") if theirs != "-"]


def check(tensors: dict[str, Tensor], key: str, shape: tuple, prefix: str) -> Tensor:
    """The tensor of this name. Raises a ValueError that names it, with its prefix in the file,
    unless it has floats of this shape, in which None is any size."""
    if key not in tensors:
        raise ValueError(f"{prefix}{key} is missing; expected {tuple(shape)}")
    x = tensors[key]
    plain = dinoreg.is_plain(x)
    fits = len(x.shape) == len(shape) and all(b in (a, None) and a for a, b in zip(x.shape, shape))
    if not (plain and fits):
        kind = "" if plain else f", {x.dtype}, {x.layout}"
        raise ValueError(f"{prefix}{key} is {tuple(x.shape)}{kind}; expected {tuple(shape)}")
    return x


def measure(tensors: dict[str, Tensor], dialect: str, prefix: str) -> Config:
    """The config that the shapes of a backbone determine; its num_heads is 1, which they do not."""
    # The last side of most tensors is the width D: no single tensor is trusted.
    D, _ = Counter(x.shape[-1] for x in tensors.values() if x.ndim).most_common(1)[0]
    swiglu = translate("blocks.0.mlp.w3.weight", dialect)[0] in tensors
    swiglu = is_packed_swiglu(tensors) if dialect == "timm" else swiglu
    shapes: dict[str, tuple] = {"patch_embed.proj.weight": (D, None, None, None)}
    shapes |= {"pos_embed": (1, None, D), "register_tokens": (1, None, D)}
    shapes |= {f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight": (D, None)}
    found = {}
    for name, shape in shapes.items():
        (key,) = translate(name, dialect)
        if key in tensors or name != "register_tokens":
            found[name] = check(tensors, key, shape, prefix)
    start = BLOCKS[dialect]
    blocks = {key.removeprefix(start).split(".")[0] for key in tensors if key.startswith(start)}
    return dataclasses.replace(dinoreg.infer_config(found, num_heads=1), depth=len(blocks))


def is_packed_swiglu(tensors: dict[str, Tensor]) -> bool:
    """Whether timm's fc1 and fc2 are the matrices of a SwiGLU: fc1 then returns both branches."""
    names = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    first, second = (tensors[name].shape if name in tensors else () for name in names)
    return len(first) == len(second) == 2 and first[0] == 2 * second[1]


def join(tensors: dict[str, Tensor], dialect: str, prefix: str) -> dict[str, Tensor]:
    """A backbone's tensors with the official names. All are compared with what the model needs,
    before any are concatenated; raises a ValueError that names the first wrong one."""
    with dinoreg.NoMemory():
        expected = DinoVisionTransformer(measure(tensors, dialect, prefix)).state_dict()
    names = {name: translate(name, dialect) for name in expected}
    kinds = {re.sub(r"\.\d+\.", ".0.", key) for key in tensors}
    absent = [name for name in ABSENT if kinds.isdisjoint(translate(name, dialect))]
    joined, dtype = {}, tensors[names["patch_embed.proj.weight"][0]].dtype
    for name, empty in expected.items():
        kind = re.sub(r"^blocks\.\d+", "blocks.0", name)
        if kind in absent:
            joined[name] = torch.full(empty.shape, ABSENT[kind], dtype=dtype)
            names[name] = []
            continue
        shapes: list[tuple] = [part.shape for part in empty.chunk(len(names[name]))]
        if name == "pos_embed":  # timm has other rows: `place_registers` makes them official ones
            shapes = [(1, None, empty.shape[2])]
        parts = [check(tensors, key, x, prefix) for key, x in zip(names[name], shapes)]
        joined[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if unknown := tensors.keys() - {key for keys in names.values() for key in keys}:
        raise ValueError(f"{prefix}{min(unknown)}: no such tensor in the {dialect} dialect")
    return joined


# Checkpoints to official tensors, and back --------------------------------------------------------

# A backbone is found by its patch-embedding tensor; whatever precedes that name is its prefix.
PATCHES = re.compile(r"(?<![^.])(patch_embed.proj|embeddings.patch_embeddings.projection)\.weight$")
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_(fsdp|checkpoint)_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:teacher|ema|swa|averaged|momentum|target)(?:[._]|$)")


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose names begin with a prefix; return them, without the prefix."""
    keys = [key for key in tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): tensors.pop(key) for key in keys}


def flatten(checkpoint: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, by the names that they have without wrapping modules."""
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            tensors[WRAPPERS.sub("", f"{prefix}{key}")] = value
    return tensors


def find_backbone(tensors: dict[str, Tensor], wanted: str | None) -> str:
    """The prefix of the names of the backbone's tensors: the wanted one, the only one, or that of
    averaged weights. Raises a ValueError if there is none."""
    prefixes = sorted({PATCHES.sub("", key) for key in tensors if PATCHES.search(key)})
    if not prefixes:
        raise ValueError(f"no patch_embed.proj.weight; the first is {min(tensors, default=None)}")
    averaged = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
    found = prefixes if len(prefixes) == 1 else averaged
    found = found if wanted is None else [prefix for prefix in prefixes if prefix == wanted]
    others = ", ".join(repr(prefix) for prefix in prefixes if [prefix] != found)
    if len(found) != 1:
        raise ValueError(f"choose the prefix of one backbone with --prefix: {others}")
    if others and wanted is None:
        note(f"took the averaged weights {found[0]!r}, not {others}")
    return found[0]


def to_official(checkpoint: dict, prefix=None, no_embed_class=None) -> tuple[dict, dict, str]:
    """A checkpoint of any dialect as (backbone, head or {}, dialect), with official names.

    prefix selects one of several backbones. no_embed_class is timm's argument of that name; None
    infers it from the shapes. Other tensors are left out and reported. Raises a
    ValueError that names a tensor that is missing, unknown, or of another shape or type."""
    beside = flatten(checkpoint)
    prefix = find_backbone(beside, prefix)
    tensors = take(beside, prefix)
    hugging_face = "embeddings.patch_embeddings.projection.weight" in tensors
    timm = "reg_token" in tensors or is_packed_swiglu(tensors)
    dialect = "hf" if hugging_face else "timm" if timm else "official"
    if any(".attention.q_proj." in key for key in tensors):
        dialect = "hf5"
    if other := sorted(key for key in tensors if key.split(".")[0] in OTHER_MODELS):
        raise ValueError(f"{other[0]}: not a layer of DINOv2, which would give other outputs")
    # A head is within the backbone or next to it: for "model.backbone.", in "model.".
    parent = ".".join([*prefix.split(".")[:-2], ""])
    name = "classifier." if hugging_face else "linear_head."
    head = take(tensors, name) or take(beside, parent + name)
    cls_head = take(tensors, "head.")
    known = {row[dialect].replace("#", BLOCKS[dialect]).split(".")[0] for row in NAMES.values()}
    for key in [key for key in tensors if key.split(".")[0] not in known]:
        beside[prefix + key] = tensors.pop(key)
    # Training checkpoints keep blocks in chunks: blocks.<chunk>.<index>, where the index is global.
    tensors = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): tensors[key] for key in tensors}
    tensors = join(tensors, dialect, prefix)
    if dialect == "timm" and "register_tokens" in tensors:
        place_registers(tensors, no_embed_class)

    D = tensors["cls_token"].shape[-1]
    if head_width(cls_head, "head.") == D:
        # The input is the CLS token only: the weights for the mean patch token are 0.
        weight = cls_head["weight"]
        head = cls_head | {"weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)}
        cls_head = {}
    width = head_width(head, name)
    if width <= D or width % D or (hugging_face and width != 2 * D):
        beside |= {f"{prefix}{name}{key}": x for key, x in head.items()}
        head = {}
    beside |= {f"{prefix}head.{key}": x for key, x in cls_head.items()}
    if beside:
        parts = [key.split(".") for key in [prefix, *beside]]
        shared = next(i for i, names in enumerate(zip(*parts)) if len(set(names)) > 1)
        modules = sorted({names[shared] for names in parts[1:]})
        note(f"left out: {', '.join(modules):.200}")
    return tensors, head, dialect


def head_width(head: dict[str, Tensor], prefix: str) -> int:
    """The width of the input of a linear layer, or 0 if these are not the tensors of one."""
    if set(head) != {"weight", "bias"}:
        return 0
    classes = len(check(head, "bias", (None,), prefix))
    return check(head, "weight", (classes, None), prefix).shape[1]


def place_registers(tensors: dict[str, Tensor], no_embed_class: bool | None) -> None:
    """Move timm's positions to where the official model has them. With no_embed_class, that of CLS
    has been added to it, and pos_embed has rows for patches only. Without it, the rows are those of
    CLS, of the registers, which officially have no position, and of the patches."""
    registers, positions = tensors["register_tokens"], tensors["pos_embed"]
    R, rows = registers.shape[1], positions.shape[1]
    if no_embed_class is None:
        no_embed_class = math.isqrt(rows) ** 2 == rows
    if no_embed_class:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        return
    if rows <= 1 + R:
        raise ValueError(f"pos_embed has {rows} rows, too few for CLS, {R} registers and patches")
    tensors["register_tokens"] = registers + positions[:, 1 : 1 + R]
    tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, 1 + R :]], dim=1)


def from_official(model: Model, dialect: str) -> dict[str, Tensor]:
    """The state dict of a model in a dialect. Raises a ValueError if it cannot."""
    model = dinoreg.rebuild(model)
    tensors, (h, w) = model.state_dict(), model.config.grid
    if h != w:
        raise ValueError(f"only dinoreg's own files can hold positions of {h} x {w} patches")
    if dialect == "official":
        return tensors
    head, tensors = take(tensors, "linear_head."), take(tensors, "backbone.") or tensors
    D, name, prefix = tensors["cls_token"].shape[-1], "classifier.", ""
    if head and head["weight"].shape[1] != 2 * D:
        raise ValueError(f"{dialect} classifiers use one layer only (official models: --layers 1)")
    if dialect == "timm":
        name = "head."
        if "register_tokens" in tensors:  # timm adds the position of CLS to the token
            tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
        if head and head["weight"][:, D:].any():
            raise ValueError("timm's heads see only the CLS token, but this one also patches")
        head |= {"weight": head["weight"][:, :D]} if head else {}
    elif head:
        prefix = hf_config(model)["model_type"] + "."
    renamed = {name + key: x for key, x in head.items()}
    for key, x in tensors.items():
        names = [prefix + theirs for theirs in translate(key, dialect)]
        renamed |= zip(names, x.chunk(max(len(names), 1)))
    return renamed


# What the files next to the weights say -----------------------------------------------------------


def require(stated: dict, allowed: dict[str, Any], verb: str) -> None:
    """Refuse the first setting of a file or an option that has another value than it may have: a
    ValueError names it. A tuple lists several values; what is not in `allowed` has no effect."""
    for key, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        if key in stated and stated[key] not in values:
            listed = " or ".join(repr(value) for value in values)
            raise ValueError(f"{key} is {stated[key]!r}; {verb} {listed}")


# The fields of `Config` by the names that config.json of Hugging Face and timm has for them.
FIELDS = {
    "embed_dim": ("hidden_size", "embed_dim", "num_features"),
    "depth": ("num_hidden_layers", "depth"),
    "num_heads": ("num_attention_heads", "num_heads"),
    "mlp_ratio": ("mlp_ratio",),
    "patch_size": ("patch_size",),
    "image_size": ("image_size", "img_size"),
    "in_chans": ("num_channels", "in_chans"),
    "num_register_tokens": ("num_register_tokens", "reg_tokens"),
}
# Heads of timm's architectures of other widths than the official ones: "vit_huge_patch14_224".
TIMM_HEADS = dict(tiny=3, small=6, base=12, large=16, huge=16, giant=16, gigantic=16)


def compare(stated: dict, config: Config, tensors: dict[str, Tensor], classes: int) -> Config:
    """Compare config.json, as one flat dict, with the model that the tensors make: whatever both
    state must agree. Returns the config with the image size (H, W), if only the file states it."""
    swiglu, patches = config.ffn == "swiglu", tensors["pos_embed"].shape[1] - 1
    biased = any(x.any() for key, x in tensors.items() if key.endswith("qkv.bias"))
    for key in ("image_size", "img_size", "patch_size"):
        if isinstance(x := stated.get(key), list):
            stated = stated | {key: tuple(x) if len(set(x)) > 1 else x[0]}
    size = stated.get("image_size", stated.get("img_size", config.image_size))
    if math.prod(dataclasses.replace(config, image_size=size).grid) == patches:
        config = dataclasses.replace(config, image_size=size)
    # Several ratios give the same hidden width; timm's is that of the rows of fc1.
    ratio = stated.get("mlp_ratio", config.mlp_ratio)
    hidden = dataclasses.replace(config, mlp_ratio=ratio).hidden_dim
    hidden = int(config.embed_dim * ratio) // (1 + swiglu) if "architecture" in stated else hidden
    facts: dict = {key: (getattr(config, x),) for x, keys in FIELDS.items() for key in keys}
    facts |= {"mlp_ratio": (ratio,)} if hidden == config.hidden_dim else {}
    facts |= {"num_labels": (classes,), "num_classes": (classes,)} if classes else {}
    facts |= {"use_swiglu_ffn": (swiglu,), "act_layer": ("silu" if swiglu else "gelu",)}
    facts |= {} if swiglu else {"hidden_act": "gelu"}  # Hugging Face's SwiGLU does not use it
    facts |= {"qkv_bias": True} if biased else {}
    facts |= {"layer_norm_eps": 1e-6, "qk_norm": False, "class_token": True, "label_offset": 0}
    facts |= {"global_pool": ("token", ""), "problem_type": "single_label_classification"}
    require(stated, facts, "the model has")
    return config


def class_names(stated: dict) -> list[str] | None:
    """The labels of the classes in config.json, in their order."""
    labels = stated.get("id2label") or stated.get("label_names") or stated.get("labels")
    if isinstance(labels, dict):
        if sorted(map(int, labels)) != list(range(len(labels))):
            raise ValueError(f"labels must be numbered from 0 without gaps: {[*labels]!s:.60}")
        labels = [labels[key] for key in sorted(labels, key=int)]
    if len(stated.get("id2label", ())) == 1:
        raise ValueError("a head of one class (id2label) is a regression, not a classifier")
    return labels


def hf_config(model: Model) -> dict:
    """The contents of Hugging Face's config.json for a model; a ValueError if it cannot say."""
    model = dinoreg.rebuild(model)
    config = model.config
    ratio = round(config.mlp_ratio)
    if dataclasses.replace(config, mlp_ratio=ratio).hidden_dim != config.hidden_dim:
        raise ValueError(f"mlp_ratio is {config.mlp_ratio:g}, but Hugging Face has only integers")
    stem = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    kind = "ForImageClassification" if isinstance(model, LinearClassifier) else "Model"
    described: dict[str, Any] = {
        "architectures": [stem + kind],
        "model_type": "dinov2_with_registers" if config.num_register_tokens else "dinov2",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "use_swiglu_ffn": config.ffn == "swiglu",
        "layerscale_value": config.layerscale_init,
        "drop_path_rate": config.drop_path_rate,
    }
    described |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
    described |= {names[0]: getattr(config, field) for field, names in FIELDS.items()}
    described |= {"mlp_ratio": ratio, "image_size": config.grid[0] * config.patch_size}
    if not config.num_register_tokens:
        del described["num_register_tokens"]
    if isinstance(model, LinearClassifier):
        labels = model.labels or [f"LABEL_{i}" for i in range(model.linear_head.out_features)]
        described["id2label"] = dict(enumerate(labels))
        described["label2id"] = {label: i for i, label in enumerate(labels)}
    return described


RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic")  # in the order of PIL's numbers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The defaults of Hugging Face's image processors.
BIT: dict[str, Any] = dict(do_convert_rgb=True, do_resize=True, do_center_crop=True)
BIT |= dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, size=224, crop_size=224)
BIT |= dict(resample=3, image_mean=CLIP_MEAN, image_std=CLIP_STD)
VIT = BIT | dict(resample=2, do_center_crop=False, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
DEIT = BIT | dict(size=256, image_mean=dinoreg.IMAGENET_MEAN, image_std=dinoreg.IMAGENET_STD)
PROCESSORS = {"Bit": BIT, "CLIP": BIT, "ViT": VIT, "DeiT": DEIT}


def hf_size(size, square: bool = False) -> dict[str, int]:
    """A side or (H, W) as Hugging Face writes it: {"shortest_edge": side} or {"height": H, ...}."""
    if isinstance(size, dict):
        return size
    H, W = dinoreg.pair(size)
    return {"height": H, "width": W} if square or size != H else {"shortest_edge": H}


def hf_preprocessor(transform: Transform) -> dict:
    """The contents of Hugging Face's preprocessor_config.json for a transform."""
    return BIT | {
        "image_processor_type": "BitImageProcessor",
        "size": hf_size(transform.resize),
        "resample": RESAMPLING.index(transform.resampling),
        "do_center_crop": transform.crop is not None,
        "crop_size": hf_size(transform.crop or 224, square=True),
        "image_mean": transform.mean,
        "image_std": transform.std,
    }


def transform_from_hf(described: dict) -> Transform:
    """The transform of Hugging Face's preprocessor_config.json; a ValueError if there is none."""
    kind = described.get("image_processor_type", described.get("feature_extractor_type", "Bit"))
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    require({"image processor": family}, {"image processor": tuple(PROCESSORS)}, "expected")
    values = PROCESSORS[family] | described
    if family == "ViT":
        values["do_center_crop"] = False  # it has no such step, whatever the file says
    values["rescale_factor"] = round(values["rescale_factor"], 8)
    supported: dict[str, Any] = {"do_resize": True, "do_rescale": True}
    supported |= {"rescale_factor": round(1 / 255, 8), "resample": (0, 1, 2, 3)}
    supported |= {key: False for key in values if key.startswith("do_") and key not in BIT}
    supported |= dict.fromkeys(("crop_pct", "size_divisor", "offset", "pad_size"), 0)
    require(values, supported, "expected")
    resize = hf_size(values["size"], square=family in ("ViT", "DeiT"))  # else: the short side
    keys = {"the keys of size": (["shortest_edge"], ["height", "width"])}
    require({"the keys of size": sorted(resize)}, keys, "expected")
    crop = hf_size(values["crop_size"], square=True)
    if not values["do_normalize"]:
        values |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    size = resize.get("shortest_edge") or (resize["height"], resize["width"])
    center = (crop["height"], crop["width"]) if values["do_center_crop"] else None
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return Transform(size, center, RESAMPLING[values["resample"]], mean, std)


def transform_from_timm(described: dict) -> Transform:
    """The transform of `pretrained_cfg` in timm's config.json; a ValueError if there is none."""
    H, W = described.get("input_size", [3, 224, 224])[1:]
    mode, share = described.get("crop_mode", "center"), described.get("crop_pct", 0.875)
    modes = ("center", "squash") if H == W else "squash"
    require({"crop_mode": mode}, {"crop_mode": modes}, f"expected for {H} x {W} pixels:")
    height, width = math.floor(H / share), math.floor(W / share)
    resize = height if mode == "center" else (height, width)
    mean = tuple(described.get("mean", dinoreg.IMAGENET_MEAN))
    std = tuple(described.get("std", dinoreg.IMAGENET_STD))
    resampling = described.get("interpolation", "bicubic")
    return Transform(resize, (H, W), resampling, mean, std)


def read_training_config(checkpoint: Path) -> dict:
    """How the training resized positions, or {} if there is no config.yaml of Meta's code: it lies
    in the folder of the run, checkpoints there or in eval/training_... below."""
    folder = checkpoint.absolute().parent
    path = (folder.parents[1] if folder.parent.name == "eval" else folder) / "config.yaml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = re.findall(r"(?m)^ +(interpolate_(?:antialias|offset)): *([^\s#]+)", text)
    with dinoreg.naming(path):
        found = {key: json.loads(value.lower()) for key, value in lines}
        require(found, {"interpolate_antialias": (True, False)}, "expected")
    if found:
        note(f"positions are resized as {path} says: {found}")
    return found


# Reading and writing files ------------------------------------------------------------------------

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # of files of weights


def hf_folder(repo_id: str) -> Path:
    """The local folder of a repository on the Hugging Face hub, in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download

        for pattern in ("*.safetensors", "pytorch_model*.bin"):  # the second in old repositories
            folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    except Exception as error:
        problem = dinoreg.reason(error)
        if isinstance(error, ImportError):
            problem = "pip install huggingface_hub to look for one on the hub"
        raise OSError(f"{repo_id}: no such file, no such repository ({problem})") from None


def find_files(folder: Path) -> list[Path]:
    """The files of a model in a folder: those that transformers and timm take, or the only one."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (file := folder / f"{stem}.{suffix}").exists():
            return [file]
        if files := sorted(folder.glob(pattern := f"{stem}-*-of-*.{suffix}")):
            count = int(re.findall(r"-of-(\d+)", files[0].name)[0])
            if len(files) != count:
                raise OSError(f"{folder}: only {len(files)} of the {count} files {pattern}")
            return files
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise OSError(f"{folder}: expected one file of weights, found {names or 'none'}")
    return files


def refuse(options: set[str], subject: str) -> None:
    """Raise a ValueError for the first of the options, which would be ignored."""
    for option in sorted(options):
        raise ValueError(f"--{option.replace('_', '-')} does not apply to {subject}")


def read(
    source: str,
    head: str | None = None,
    layers: int | None = None,
    num_heads: int | None = None,
    prefix: str | None = None,
    registers: int | None = None,
    interpolate_antialias: bool | None = None,
    interpolate_offset: float | None = None,
) -> tuple[Model, str]:
    """The model of an official name, a file, a folder or a Hugging Face repository, and its
    dialect. The options are those of the program. Raises OSError or ValueError with the reason,
    also for an option that does not apply, and where the tensors contradict what is stated."""
    given = {key: x for key, x in locals().items() if x is not None and key != "source"}
    if source.removeprefix("dinov2_").removesuffix("_lc") in dinoreg.CONFIGS:
        refuse(given.keys() - ({"layers"} if source.endswith("_lc") else set()), source)
        return dinoreg.load(source, layers or 4, dtype=None), "official"
    path = Path(source)
    repository = (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and path.suffix.lower() not in SUFFIXES
    )
    if repository and not path.parent.exists():
        path = hf_folder(source)
    files = find_files(path) if path.is_dir() else [path]
    with dinoreg.naming(source):
        checkpoint: dict[str, Tensor] = {}
        for file in files:
            tensors, metadata = dinoreg.read_tensors(file)
            if "config" in metadata:
                refuse(set(given), "a file of dinoreg")
                config, transform, labels = dinoreg.read_metadata(metadata)
                return dinoreg.from_state_dict(tensors, config, labels, transform), "dinoreg"
            checkpoint |= tensors
        refuse(given.keys() & {"layers"}, "files, only to official names")
        return build(checkpoint, files[0], given)


def build(checkpoint: dict[str, Tensor], file: Path, options: dict) -> tuple[Model, str]:
    """The model and dialect of a checkpoint in a file, next to which config files may lie."""
    contents = []
    for path in (file.with_name("config.json"), file.with_name("preprocessor_config.json")):
        with dinoreg.naming(path.name):
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            contents.append({key: x for key, x in content.items() if x is not None})
    described, processor = contents
    with dinoreg.naming("config.json"):
        pretrained = described.get("pretrained_cfg", described)  # old files of timm have one level
        stated = pretrained | described | described.get("model_args", {})
    no_embed_class = stated.get("no_embed_class")
    tensors, linear, dialect = to_official(checkpoint, options.get("prefix"), no_embed_class)
    bare = tensors.keys() == checkpoint.keys()  # as in released files
    if options.get("registers") == 0:
        tensors.pop("register_tokens", None)
    if (head := options.get("head")) is not None:
        refuse({"head"} if linear else set(), "a file that has a head")
        with dinoreg.naming(head):
            linear = flatten(dinoreg.read_tensors(head)[0])
            if not head_width(linear, ""):
                raise ValueError(f"no linear head of weight and bias, but {[*linear]!s:.60}")
    heads = stated.get("num_attention_heads", stated.get("num_heads", options.get("num_heads")))
    widths = {config.embed_dim for config in dinoreg.CONFIGS.values()}
    if heads is None and tensors["cls_token"].shape[-1] not in widths:
        heads = TIMM_HEADS.get("".join(stated.get("architecture", "").split("_")[1:2]))
    config = dinoreg.infer_config(tensors, num_heads=heads)
    released, R = config in dinoreg.CONFIGS.values(), config.num_register_tokens
    require(options, {"num_heads": config.num_heads, "registers": R}, "the model has")
    classes = len(linear.get("bias", ()))
    with dinoreg.naming("config.json"):
        config = compare(stated, config, tensors, classes)
        labels = class_names(stated) if classes else None
        transform = transform_from_timm(pretrained) if "architecture" in stated else Transform()
    with dinoreg.naming("preprocessor_config.json"):
        transform = transform_from_hf(processor) if processor else transform
    if head and released and not labels and classes == len(dinoreg.IMAGENET_CLASSES):
        labels = dinoreg.IMAGENET_CLASSES

    # The tensors do not tell how positions are resized at other image sizes.
    resized = read_training_config(file) if dialect == "official" else {}
    resized |= {key: x for key, x in options.items() if key.startswith("interpolate_")}
    if dialect == "official" and R and not resized and not (released and bare):
        note(
            f"took {R} register tokens (--registers 0: none) and resizes positions as the released "
            "models do (Meta's training: --no-interpolate-antialias --interpolate-offset 0.1)"
        )
    config = dataclasses.replace(config, **resized)
    if linear:
        tensors = {f"backbone.{key}": x for key, x in tensors.items()}
        tensors |= {f"linear_head.{key}": x for key, x in linear.items()}
    return dinoreg.from_state_dict(tensors, config, labels, transform), dialect


def write(model: Model, path: str | os.PathLike, dialect: str = "dinoreg") -> None:
    """Write a model in a dialect: a folder for "hf"; else a file, for "official" and "timm" of
    safetensors or of `torch.save`, by its suffix. Raises OSError if it cannot be written, and
    ValueError if the dialect has no such model; then nothing is written."""
    if dialect == "dinoreg":
        return dinoreg.save(model, path)
    tensors, path = from_official(model, dialect), Path(path)
    if dialect != "hf" and path.suffix == ".safetensors":
        return dinoreg.write_tensors(tensors, path, {"format": "pt"})
    with dinoreg.atomic(path) as part:
        if dialect == "hf":
            part.mkdir()
            config, processor = hf_config(model), hf_preprocessor(model.transform)
            (part / "config.json").write_text(json.dumps(config, indent=2))
            (part / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
            return dinoreg.write_tensors(tensors, part / "model.safetensors", {"format": "pt"})
        try:
            torch.save({key: x.contiguous() for key, x in tensors.items()}, part)
        except RuntimeError as error:  # of a full disk
            raise OSError(f"{path}: cannot be written ({dinoreg.reason(error)})") from None


def run(args: argparse.Namespace) -> int:
    source, output, dialect, names = map(vars(args).pop, ("source", "output", "to", "labels"))
    folder = os.path.isdir(output) and (dialect != "hf" or os.listdir(output))
    if folder or Path(output).name in ("", "..") or (dialect == "hf" and os.path.isfile(output)):
        kind = "an empty or new folder" if dialect == "hf" else "a file"
        raise OSError(f"{output!r} cannot be the output: give {kind}")
    if dialect in ("official", "timm") and Path(output).suffix not in SUFFIXES:
        raise ValueError(f"{output}: the name must end in {' or '.join(SUFFIXES)}")
    if names is not None and dialect in ("official", "timm"):
        refuse({"labels"}, f"--to {dialect}, whose files have no class names")
    model, origin = read(source, **vars(args))
    classes = model.linear_head.out_features if isinstance(model, LinearClassifier) else 0
    if names is not None:
        refuse(set() if classes else {"labels"}, f"{source}, which has no head")
        with dinoreg.naming(names):
            labels = Path(names).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
            if len(labels) != classes or not all(map(str.strip, labels)):
                raise ValueError(f"expected {classes} lines, none empty; got {len(labels)}")
            model.labels = labels
    write(model, output, dialect)
    count = sum(x.numel() for x in model.parameters())
    print(dinoreg.printable(f"{output}: {origin} -> {dialect}, {count:,} parameters"))
    print(model.config, model.transform, sep="\n")
    if isinstance(model, LinearClassifier):
        shown = dinoreg.printable(", ".join((model.labels or ["without names"])[:3]))
        print(f"{model.layers} layers -> {classes} classes: {shown}, ...")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert weights of DINOv2 between all formats.")
    parser.epilog = "example: python convert_weights.py model.pth --head head.pth -o m.safetensors"
    add, formats = parser.add_argument, ("dinoreg", "official", "hf", "timm")
    resized = "how positions are resized, if no config.yaml of the training tells"
    add("source", help="an official name, a file, a folder, or a Hugging Face repository")
    add("-o", "--output", required=True, help="a .safetensors or .pth file; for hf, a folder")
    add("--to", default="dinoreg", choices=formats, help="format to write (default: dinoreg)")
    add("--head", metavar="FILE", help="an official linear head, for an official backbone")
    add("--layers", type=int, choices=(1, 4), help="which head of an official name (default: 4)")
    add("--num-heads", type=int, metavar="A", help="attention heads, if no file tells")
    add("--prefix", help="of the backbone's tensors, if there are several: teacher.backbone.")
    add("--registers", type=int, metavar="R", help="0 if the model does not use its registers")
    add("--interpolate-antialias", action=argparse.BooleanOptionalAction, help=resized)
    add("--interpolate-offset", type=float, metavar="X", help=resized)
    add("--labels", metavar="FILE", help="text file with one class name per line")
    return dinoreg.guard("convert_weights", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
