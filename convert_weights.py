"""Convert weights of DINOv2, with or without registers, between all published formats.

    python convert_weights.py vits14_reg_lc -o classifier.safetensors  # an official model, by name
    python convert_weights.py backbone.pth --head head.pth -o model.safetensors  # official files
    python convert_weights.py facebook/dinov2-with-registers-small -o small.safetensors
    python convert_weights.py classifier.safetensors --to hf -o folder

It reads official files, Hugging Face repositories and folders (of any age, in one file or in
shards), timm files, checkpoints of Meta's training code, and dinoreg's own files. The names of the
tensors tell which format a file has. All but training checkpoints can be written. Every conversion
goes through the official names.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import dinoreg
from dinoreg import Config, DinoVisionTransformer, LinearClassifier, Transform

# The names of the same parameters in each dialect. "#" is the block: "blocks.0", or
# "encoder.layer.0" in Hugging Face's. Braces list the parts that are concatenated into one official
# tensor. "hf" are the names in files on the hub, which all versions of transformers write; the last
# column has the names that version 5 uses in memory, where they differ.
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
NAMES = [dict(zip(DIALECTS, row + row[-1:])) for row in ROWS]
BLOCKS = {"official": "blocks.", "timm": "blocks.", "hf": "encoder.layer.", "hf5": "encoder.layer."}


def rename(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The tensors of a backbone with the names of another dialect, concatenated or split as it
    requires.

    Raises a ValueError for a name that the source dialect does not know, and for a missing part of
    a joined tensor.
    """
    tensors, renamed = dict(tensors), dict[str, Tensor]()
    packed = source == "timm" and is_packed_swiglu(tensors)
    blocks = {
        key.removeprefix(BLOCKS[source]).split(".")[0]
        for key in tensors
        if key.startswith(BLOCKS[source])
    }
    for row in NAMES:
        if packed and row["official"] in ("#.mlp.fc1", "#.mlp.fc2"):
            continue
        for block, suffix in itertools.product(
            blocks if "#" in row[source] else [""], ("", ".weight", ".bias")
        ):
            old, new = (
                [
                    name.replace("#", BLOCKS[dialect] + block) + suffix
                    for name in expand(row[dialect])
                ]
                for dialect in (source, target)
            )
            if found := [key for key in old if key in tensors]:
                if found != old:
                    raise ValueError(
                        f"{min(set(old) - set(found))} is missing; there is {found[0]}"
                    )
                parts = [tensors.pop(key) for key in old]
                renamed |= zip(
                    new, parts if len(new) == len(old) else torch.cat(parts).chunk(len(new))
                )
    if tensors:
        raise ValueError(
            f"{min(tensors)}: a DINOv2 in the {source} dialect has no tensor of this name"
        )
    renamed.pop("-", None)
    return renamed


def expand(name: str) -> list[str]:
    """ "a.{x,y}.b" -> ["a.x.b", "a.y.b"]; a name without braces stands for itself."""
    before, _, rest = name.partition("{")
    parts, _, after = rest.partition("}")
    return [before + part + after for part in parts.split(",")]


def is_packed_swiglu(tensors: dict[str, Tensor]) -> bool:
    """Whether timm's fc1 and fc2 are the matrices of a SwiGLU: fc1 then returns both branches."""
    first, second = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return first is not None and second is not None and len(first) == 2 * second.shape[1]


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose names begin with a prefix; return them, without the prefix."""
    return {
        key.removeprefix(prefix): tensors.pop(key)
        for key in list(tensors)
        if key.startswith(prefix)
    }


# What stands at the end of the name of the tensor by which a backbone is found; what stands before
# it is the prefix.
PATCHES = re.compile(
    r"(?:^|(?<=\.))(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight$"
)
WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
AVERAGED = re.compile(r"(?:^|[._])(?:teacher|ema|swa|averaged|momentum|target)(?:[._]|$)")


def flatten(checkpoint: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, with the names that PyTorch would give them, without those of
    wrapping modules.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            tensors[WRAPPERS.sub("", f"{prefix}{key}")] = value
    return tensors


def find_backbone(tensors: dict[str, Tensor], wanted: str | None) -> str:
    """The prefix of the names of the backbone's tensors. Raises a ValueError unless there is one
    that is to be taken.
    """
    prefixes = sorted({PATCHES.sub("", key) for key in tensors if PATCHES.search(key)})
    if not prefixes:
        raise ValueError(
            "no DINOv2: patch_embed.proj.weight is missing; "
            f"the first tensor is {min(tensors, default=None)}"
        )
    if wanted is not None:
        if wanted not in prefixes:
            raise ValueError(
                f"no backbone has the prefix {wanted!r}; there are {', '.join(map(repr, prefixes))}"
            )
        return wanted
    if len(prefixes) == 1:
        return prefixes[0]
    averaged = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
    if len(averaged) != 1:
        raise ValueError(
            f"several backbones, choose one with --prefix: {', '.join(map(repr, prefixes))}"
        )
    note(
        f"took the averaged weights {averaged[0]!r}, "
        f"not {', '.join(repr(x) for x in prefixes if x != averaged[0])}"
    )
    return averaged[0]


def note(text: str) -> None:
    print(f"convert_weights: {text}", file=sys.stderr)


def to_official(
    checkpoint: dict, prefix: str | None = None, no_embed_class: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """A checkpoint of any dialect as (backbone, head or {}, dialect), with official names.

    prefix selects one of several backbones. no_embed_class is timm's argument of that name; None
    infers it from the shapes. Tensors beside the backbone are left out and reported. Raises a
    ValueError that names a tensor unknown to the dialect.
    """
    beside = flatten(checkpoint)
    prefix = find_backbone(beside, prefix)
    tensors = take(beside, prefix) if prefix else beside
    if not prefix:
        beside = {}
    hugging_face = "embeddings.patch_embeddings.projection.weight" in tensors
    dialect = (
        "hf"
        if hugging_face
        else "timm"
        if "reg_token" in tensors or is_packed_swiglu(tensors)
        else "official"
    )
    if any(".attention.q_proj." in key for key in tensors):
        dialect = "hf5"
    if other := sorted(key for key in tensors if key.split(".")[0] in OTHER_MODELS):
        raise ValueError(
            f"{other[0]}: a DINOv2 has no such layer, and would not give what this model gives"
        )

    parent = ".".join([*prefix.split(".")[:-2], ""])  # of "model.backbone.": "model."
    name = "classifier." if hugging_face else "linear_head."
    head = take(tensors, name) or take(beside, parent + name)
    cls_head = {} if hugging_face else take(tensors, "head.")
    known = {row[dialect].replace("#", BLOCKS[dialect]).split(".")[0] for row in NAMES}
    beside |= {
        prefix + key: tensors.pop(key) for key in list(tensors) if key.split(".")[0] not in known
    }
    # Training checkpoints keep blocks in chunks: blocks.<chunk>.<index>, where the index is global.
    tensors = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): x for key, x in tensors.items()
    }
    tensors = add_absent(rename(tensors, dialect, "official"))
    if "reg_token" in known and "register_tokens" in tensors:
        place_registers(tensors, no_embed_class)

    D = tensors["cls_token"].shape[-1]
    if head and (
        head_width(head) <= D
        or head_width(head) % D
        or (hugging_face and head_width(head) != 2 * D)
    ):
        beside |= {prefix + name: head.popitem()[1]}
        head = {}
    if cls_head and head_width(cls_head) == D:
        # The input is the CLS token only: the weights for the mean patch token are 0.
        head = cls_head | {
            "weight": torch.cat([cls_head["weight"], torch.zeros_like(cls_head["weight"])], dim=1)
        }
    elif cls_head:
        beside |= {prefix + "head": cls_head.popitem()[1]}
    if beside:
        names = [key.split(".") for key in [prefix, *beside]]
        shared = next(i for i, parts in enumerate(zip(*names)) if len(set(parts)) > 1)
        modules = sorted({name[shared] for name in names[1:]})
        note(
            "left out, beside the backbone: "
            f"{', '.join(modules[:8])}{', ...' if len(modules) > 8 else ''}"
        )
    return tensors, head, dialect


# Layers of timm's and DINOv3's models that change what the backbone computes.
OTHER_MODELS = {"norm_pre", "fc_norm", "dist_token", "rope", "rope_embed", "storage_tokens"}


def head_width(head: dict[str, Tensor]) -> int:
    """The width of the input of a linear layer, or 0 if these are not the tensors of one."""
    linear = set(head) == {"weight", "bias"} and head["weight"].ndim == 2
    return head["weight"].shape[1] if linear else 0


def add_absent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbone with those that its model does without: masks and biases that are
    0, LayerScale of 1.
    """
    weight = tensors["patch_embed.proj.weight"]
    D, absent = len(weight), {"mask_token": weight.new_zeros(1, len(weight))}
    blocks = {key.removesuffix(".norm1.weight") for key in tensors if key.endswith(".norm1.weight")}
    for name, value in (
        ("attn.qkv.bias", weight.new_zeros(3 * D)),
        ("ls1.gamma", weight.new_ones(D)),
        ("ls2.gamma", weight.new_ones(D)),
    ):
        if not any(key.endswith(name) for key in tensors):  # one block without it is a damaged file
            absent |= {f"{block}.{name}": value.clone() for block in blocks}
    return absent | tensors


def place_registers(tensors: dict[str, Tensor], no_embed_class: bool | None) -> None:
    """Move timm's positions to where the official model has them.

    With no_embed_class, timm has added the position of CLS to it, and pos_embed has rows for
    patches only. Without it, the rows are those of CLS, of the registers, which have no position
    here, and of the patches.
    """
    registers, positions = tensors["register_tokens"], tensors["pos_embed"]
    R, rows = registers.shape[1], positions.shape[1]
    if no_embed_class is None:
        no_embed_class = math.isqrt(rows) ** 2 == rows
    if no_embed_class:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    else:
        tensors["register_tokens"] = registers + positions[:, 1 : 1 + R]
        tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, 1 + R :]], dim=1)


def from_official(
    model: DinoVisionTransformer | LinearClassifier, dialect: str
) -> dict[str, Tensor]:
    """The state dict of a model in another dialect. Raises a ValueError if the dialect has no such
    classifier.
    """
    model = dinoreg.rebuild(model)
    tensors = model.state_dict()
    h, w = model.config.grid
    if h != w:
        raise ValueError(
            f"a position embedding of {h} x {w} patches is not square: "
            "only dinoreg's own files can hold it"
        )
    if dialect == "official":
        return tensors
    head = take(tensors, "linear_head.")
    tensors = take(tensors, "backbone.") or tensors
    D = tensors["cls_token"].shape[-1]
    if dialect == "timm":
        if "register_tokens" in tensors:
            cls_position, tensors["pos_embed"] = tensors["pos_embed"].split(
                [1, tensors["pos_embed"].shape[1] - 1], dim=1
            )
            tensors["cls_token"] = tensors["cls_token"] + cls_position
        if head and (head["weight"].shape[1] != 2 * D or head["weight"][:, D:].any()):
            raise ValueError(
                "timm's classifiers use the CLS token only, this one more; "
                "write its backbone instead"
            )
        if head:
            head["weight"] = head["weight"][:, :D]
        return rename(tensors, "official", "timm") | {
            f"head.{key}": tensor for key, tensor in head.items()
        }

    if head and head["weight"].shape[1] != 2 * D:
        raise ValueError(
            "Hugging Face's classifiers use one layer, this one more (official models: --layers 1)"
        )
    tensors = rename(tensors, "official", dialect)
    if head:
        tensors = {f"{hf_type(model.config)}.{key}": tensor for key, tensor in tensors.items()}
    return tensors | {f"classifier.{key}": tensor for key, tensor in head.items()}


# --------------------------------------------------------------------------------------------------
# Hugging Face's folders


def hf_type(config: Config) -> str:
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def hf_config(model: DinoVisionTransformer | LinearClassifier) -> dict:
    """The contents of Hugging Face's config.json for a model. Raises a ValueError if it cannot
    describe the model.
    """
    model = dinoreg.rebuild(model)
    config = model.config
    mlp_ratio = round(config.mlp_ratio)  # an integer there
    if dataclasses.replace(config, mlp_ratio=mlp_ratio).hidden_dim != config.hidden_dim:
        raise ValueError(
            f"mlp_ratio is {config.mlp_ratio:g}, "
            "which Hugging Face's config.json, with integers only, cannot say"
        )
    stem = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    described = {
        "architectures": [
            stem + ("ForImageClassification" if isinstance(model, LinearClassifier) else "Model")
        ],
        "model_type": hf_type(config),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": mlp_ratio,
        "use_swiglu_ffn": config.ffn == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": config.layerscale_init,
        "drop_path_rate": config.drop_path_rate,
        "qkv_bias": True,
        "image_size": config.grid[0] * config.patch_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if config.num_register_tokens:
        described["num_register_tokens"] = config.num_register_tokens
    if isinstance(model, LinearClassifier):
        labels = model.labels or [f"LABEL_{i}" for i in range(model.linear_head.out_features)]
        described["id2label"] = dict(enumerate(labels))
        described["label2id"] = {label: i for i, label in enumerate(labels)}
    return described


RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def hf_preprocessor(transform: Transform) -> dict:
    """The contents of Hugging Face's preprocessor_config.json for a transform."""
    described = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": hf_size(transform.resize),
        "resample": next(
            number for number, name in RESAMPLING.items() if name == transform.resampling
        ),
        "do_center_crop": transform.crop is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": transform.mean,
        "image_std": transform.std,
    }
    if transform.crop:
        described["crop_size"] = hf_size(transform.crop)
    return described


def hf_size(size: int | tuple[int, int]) -> dict[str, int]:
    return (
        {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
    )


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The defaults of Hugging Face's image processors; the first value says whether an integer size is
# the side of a square.
BIT = {
    "size": 224,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
VIT = {
    "size": 224,
    "resample": 2,
    "do_center_crop": False,
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
}
DEIT = BIT | {"size": 256, "image_mean": dinoreg.IMAGENET_MEAN, "image_std": dinoreg.IMAGENET_STD}
PROCESSORS = {"Bit": (False, BIT), "CLIP": (False, BIT), "ViT": (True, VIT), "DeiT": (True, DEIT)}


def transform_from_hf(described: dict) -> Transform:
    """The transform of Hugging Face's preprocessor_config.json. Raises a ValueError that names what
    it cannot express.
    """
    kind = (
        described.get("image_processor_type")
        or described.get("feature_extractor_type")
        or "BitImageProcessor"
    )
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if family not in PROCESSORS:
        raise ValueError(
            f"preprocessor_config.json: {kind} is not supported; known are {', '.join(PROCESSORS)}"
        )
    square, defaults = PROCESSORS[family]
    values = defaults | {key: value for key, value in described.items() if value is not None}
    if family == "ViT":
        values["do_center_crop"] = False  # it has no such step, whatever the file says
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    for key, value in values.items():
        unknown = key.startswith("do_") and value and key not in steps
        needed = key in ("do_resize", "do_rescale") and not value
        factor = key == "rescale_factor" and abs(value * 255 - 1) > 1e-6
        other = key in ("crop_pct", "size_divisor", "offset", "pad_size") and value
        if unknown or needed or factor or other:
            raise ValueError(
                f"preprocessor_config.json: {key} = {json.dumps(value)} is not supported"
            )
    size, crop = values["size"], values.get("crop_size", 0)
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f"preprocessor_config.json: size = {json.dumps(size)} is not supported")
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if values["resample"] not in RESAMPLING:
        raise ValueError(
            "preprocessor_config.json: "
            f"resample = {values['resample']} is not supported; known are {RESAMPLING}"
        )
    normal = values.get("do_normalize", True)
    return Transform(
        resize=size["shortest_edge"]
        if "shortest_edge" in size
        else (size["height"], size["width"]),
        crop=(crop["height"], crop["width"]) if values["do_center_crop"] else None,
        resampling=RESAMPLING[values["resample"]],
        mean=tuple(values["image_mean"]) if normal else (0.0, 0.0, 0.0),
        std=tuple(values["image_std"]) if normal else (1.0, 1.0, 1.0),
    )


def transform_from_timm(described: dict) -> Transform:
    """The transform of `pretrained_cfg` in timm's config.json. Raises a ValueError that names what
    it cannot express.
    """
    crop = described.get("input_size", [3, 224, 224])[1:]
    mode, share = described.get("crop_mode", "center"), described.get("crop_pct", 0.875)
    resize = [math.floor(side / share) for side in crop]
    resampling = described.get("interpolation", "bicubic")
    if mode not in ("center", "squash") or (mode == "center" and crop[0] != crop[1]):
        raise ValueError(
            f"config.json: crop_mode = {mode!r} for {crop[0]} x {crop[1]} pixels is not supported"
        )
    return Transform(
        resize=resize[0] if mode == "center" else (resize[0], resize[1]),
        crop=(crop[0], crop[1]),
        resampling=resampling,
        mean=tuple(described.get("mean", dinoreg.IMAGENET_MEAN)),
        std=tuple(described.get("std", dinoreg.IMAGENET_STD)),
    )


# Heads of timm's architectures of other widths than the official ones:
# "vit_huge_patch14_224" has 16.
TIMM_HEADS = {
    "vit_tiny": 3,
    "vit_small": 6,
    "vit_base": 12,
    "vit_large": 16,
    "vit_huge": 16,
    "vit_giant": 16,
    "vit_gigantic": 16,
}


def check_described(described: dict) -> None:
    """Raise a ValueError for a setting in config.json that changes the outputs and is not supported
    here.
    """
    arguments = described.get("model_args", {})
    fixed = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "problem_type": "single_label_classification",
    }
    for key, only in fixed.items():
        value = described.get(key)
        swiglu = key == "hidden_act" and described.get("use_swiglu_ffn")  # then it is not used
        if value is not None and value != only and not swiglu:
            raise ValueError(f"config.json: {key} is {value!r}; supported is {only!r} only")
    if described.get("id2label") and len(described["id2label"]) == 1:
        raise ValueError(
            "config.json: a head of one class (id2label) is a regression, not a classifier"
        )
    for key, allowed in {
        "global_pool": ("token", ""),
        "act_layer": ("gelu", "silu"),
        "qk_norm": (False,),
        "class_token": (True,),
    }.items():
        if key in arguments and arguments[key] not in allowed:
            raise ValueError(
                f"config.json: {key} is {arguments[key]!r}; supported is {allowed[0]!r} only"
            )


def hf_folder(repo_id: str) -> Path:
    """The local folder of a repository on the Hugging Face hub, downloaded into the hub's own
    cache.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{repo_id}: no such file; "
            "to get a repository of this name, pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an old repository
            folder = Path(
                snapshot_download(repo_id, allow_patterns=["*.json", "pytorch_model*.bin"])
            )
        return folder
    except Exception as error:
        raise OSError(
            f"{repo_id}: no such file, and no such repository on the Hugging Face hub "
            f"({dinoreg.reason(error)})"
        ) from None


# --------------------------------------------------------------------------------------------------
# Reading and writing files


def find_files(folder: Path) -> list[Path]:
    """The files of a model in a folder: those that transformers and timm would take, or the only
    one.
    """
    for pattern in (
        "model.safetensors",
        "model-*-of-*.safetensors",
        "pytorch_model.bin",
        "pytorch_model-*-of-*.bin",
    ):
        if files := sorted(folder.glob(pattern)):
            count = re.search(r"-of-(\d+)\.", files[0].name)
            if count and len(files) != int(count[1]):
                raise FileNotFoundError(
                    f"{folder}: only {len(files)} of the {int(count[1])} files {pattern}"
                )
            return files
    files = [
        file
        for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt")
        for file in sorted(folder.glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(
            f"{folder}: neither *.safetensors nor pytorch_model*.bin in this folder"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise FileNotFoundError(f"{folder}: several files of weights, name one: {names}")
    return files


def read(
    source: str,
    head: str | None = None,
    layers: int = 4,
    num_heads: int | None = None,
    prefix: str | None = None,
) -> tuple[DinoVisionTransformer | LinearClassifier, str]:
    """The model of an official name, a file, a folder or a Hugging Face repository, and its
    dialect.

    head is an official linear head for a backbone, as a file. num_heads is needed for widths that
    are not official, unless config.json has it. prefix is what the names of the backbone's tensors
    begin with, if the file holds several. The transform comes from config.json or
    preprocessor_config.json beside the weights. Raises OSError or ValueError with the reason.
    """
    if source.removeprefix("dinov2_").removesuffix("_lc") in dinoreg.CONFIGS:
        return dinoreg.load(source, layers, dtype=None), "official"
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        path = hf_folder(source)
    files = find_files(path) if path.is_dir() else [path]
    with dinoreg.naming(source):
        checkpoint: dict[str, Tensor] = {}
        for file in files:
            tensors, metadata = dinoreg.read_tensors(file)
            if "config" in metadata:
                config, transform, labels = dinoreg.read_metadata(metadata)
                return dinoreg.from_state_dict(tensors, config, labels, transform), "dinoreg"
            checkpoint |= tensors
        described, processor = (
            json.loads(file.read_text(encoding="utf-8"))
            if (file := files[0].with_name(name)).exists()
            else {}
            for name in ("config.json", "preprocessor_config.json")
        )
        check_described(described)
        arguments = described.get("model_args", {})
        tensors, own_head, dialect = to_official(
            checkpoint, prefix, arguments.get("no_embed_class")
        )
        architecture = described.get("architecture", "")
        width = tensors["cls_token"].shape[-1]
        if num_heads is None:
            num_heads = described.get("num_attention_heads") or arguments.get("num_heads")
        if num_heads is None and width not in {
            config.embed_dim for config in dinoreg.CONFIGS.values()
        }:
            num_heads = TIMM_HEADS.get("_".join(architecture.split("_")[:2]))
        config = dinoreg.infer_config(tensors, num_heads=num_heads)
        transform = Transform()
        if processor:
            transform = transform_from_hf(processor)
        elif "pretrained_cfg" in described:
            transform = transform_from_timm(described["pretrained_cfg"])
        labels = [
            label
            for _, label in sorted(
                described.get("id2label", {}).items(), key=lambda item: int(item[0])
            )
        ]
        if head:
            with dinoreg.naming(head):
                own_head, _ = dinoreg.read_tensors(head)
            if not labels and len(own_head.get("bias", ())) == len(dinoreg.IMAGENET_CLASSES):
                labels = dinoreg.IMAGENET_CLASSES
        if own_head:
            tensors = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
            tensors |= {f"linear_head.{key}": tensor for key, tensor in own_head.items()}
        return dinoreg.from_state_dict(
            tensors, config, labels if own_head else None, transform
        ), dialect


def write(
    model: DinoVisionTransformer | LinearClassifier,
    path: str | os.PathLike,
    dialect: str = "dinoreg",
) -> None:
    """Write a model in a dialect: a folder for "hf"; else a file, .safetensors or what `torch.save`
    writes; or nothing.

    Raises OSError if it cannot be written, ValueError if the dialect has no such model.
    """
    path = Path(path)
    if dialect == "dinoreg":
        return dinoreg.save(model, path)
    tensors = from_official(model, dialect)
    if dialect != "hf" and path.suffix == ".safetensors":
        return dinoreg.write_tensors(tensors, path, {"format": "pt"})
    with dinoreg.atomic(path) as part:
        if dialect == "hf":
            part.mkdir()
            (part / "config.json").write_text(json.dumps(hf_config(model), indent=2))
            (part / "preprocessor_config.json").write_text(
                json.dumps(hf_preprocessor(model.transform), indent=2)
            )
            dinoreg.write_tensors(tensors, part / "model.safetensors", {"format": "pt"})
        else:
            try:
                torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
            except RuntimeError as error:  # of a full disk
                raise OSError(f"{path}: {dinoreg.reason(error)}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(
            "Convert weights of DINOv2, with or without registers, between all their public forms."
        ),
        epilog=(
            "example: "
            "python convert_weights.py facebook/dinov2-with-registers-small -o small.safetensors"
        ),
    )
    parser.add_argument(
        "source", help="an official name, a file, a folder, or a Hugging Face repository"
    )
    parser.add_argument(
        "-o", "--output", required=True, help="the file to write; for hf, the folder"
    )
    parser.add_argument(
        "--to",
        default="dinoreg",
        choices=("dinoreg", "official", "hf", "timm"),
        help="(default: dinoreg)",
    )
    parser.add_argument(
        "--head", metavar="FILE", help="an official linear head, for an official backbone"
    )
    parser.add_argument(
        "--layers",
        type=int,
        choices=(1, 4),
        default=4,
        help="which head of an official name (default: 4)",
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="A",
        help="attention heads, where neither width nor config.json tell",
    )
    parser.add_argument(
        "--prefix", help="of the backbone's tensors, if the file holds several: teacher.backbone."
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="a text file of the classes' names, one a line"
    )
    args = parser.parse_args(argv)
    try:
        model, dialect = read(args.source, args.head, args.layers, args.num_heads, args.prefix)
        if args.labels:
            model.labels = Path(args.labels).read_text(encoding="utf-8").splitlines()
        write(model, args.output, args.to)
    except (OSError, ValueError) as error:
        print("convert_weights:", error, file=sys.stderr)
        return 2
    count, size = (
        sum(f(p) for p in model.parameters()) for f in (Tensor.numel, lambda p: p.nbytes)
    )
    print(f"{args.output}: {dialect} -> {args.to}, {count:,} parameters, {size / 1e6:,.1f} MB")
    print(model.config)
    print(model.transform)
    if isinstance(model, LinearClassifier):
        labels = dinoreg.printable(", ".join((model.labels or [])[:3]))
        print(f"{model.layers} layers -> {model.linear_head.out_features} classes: {labels}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
