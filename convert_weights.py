"""Convert weights of DINOv2, with or without registers, between all published formats.

    python convert_weights.py vits14_reg_lc -o classifier.safetensors                  # an official model, by name
    python convert_weights.py backbone.pth --head head.pth -o classifier.safetensors   # official files
    python convert_weights.py facebook/dinov2-with-registers-small -o small.safetensors
    python convert_weights.py classifier.safetensors --to hf -o folder

It reads official files, Hugging Face repositories and folders (of any age, in one file or in shards), timm files,
checkpoints of Meta's training code, and dinoreg's own files. The names of the tensors tell which format a file has. All but
training checkpoints can be written. Every conversion goes through the official names.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import dinoreg
from dinoreg import Config, DinoVisionTransformer, LinearClassifier

# The names of the same parameters in each dialect. "#" is the block: "blocks.0", or "encoder.layer.0" in Hugging Face's.
# Braces list the parts that are concatenated into one official tensor. "hf" are the names in files on the hub, which all
# versions of transformers write; the last column has the names that version 5 uses in memory, where they differ.
TABLE = """
official          timm              hf                                       hf5
cls_token         cls_token         embeddings.cls_token
mask_token        -                 embeddings.mask_token
register_tokens   reg_token         embeddings.register_tokens
pos_embed         pos_embed         embeddings.position_embeddings
patch_embed.proj  patch_embed.proj  embeddings.patch_embeddings.projection
#.norm1           #.norm1           #.norm1
#.attn.qkv        #.attn.qkv        #.attention.attention.{query,key,value}  #.attention.{q,k,v}_proj
#.attn.proj       #.attn.proj       #.attention.output.dense                 #.attention.o_proj
#.ls1.gamma       #.ls1.gamma       #.layer_scale1.lambda1
#.norm2           #.norm2           #.norm2
#.mlp.fc1         #.mlp.fc1         #.mlp.fc1
#.mlp.fc2         #.mlp.fc2         #.mlp.fc2
#.mlp.w12         #.mlp.fc1         #.mlp.weights_in                         #.mlp.{gate,up}_proj
#.mlp.w3          #.mlp.fc2         #.mlp.weights_out                        #.mlp.down_proj
#.ls2.gamma       #.ls2.gamma       #.layer_scale2.lambda1
norm              norm              layernorm
"""
DIALECTS, *ROWS = (line.split() for line in TABLE.strip().splitlines())
NAMES = [dict(zip(DIALECTS, row + row[-1:])) for row in ROWS]
BLOCKS = {"official": "blocks.", "timm": "blocks.", "hf": "encoder.layer.", "hf5": "encoder.layer."}


def rename(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The tensors of a backbone with the names of another dialect, concatenated or split as it requires.

    Raises a ValueError for a name that the source dialect does not know, and for a missing part of a joined tensor.
    """
    tensors, renamed = dict(tensors), dict[str, Tensor]()
    packed = source == "timm" and is_packed_swiglu(tensors)
    blocks = {key.removeprefix(BLOCKS[source]).split(".")[0] for key in tensors if key.startswith(BLOCKS[source])}
    for row in NAMES:
        if packed and row["official"] in ("#.mlp.fc1", "#.mlp.fc2"):
            continue
        for block, suffix in itertools.product(blocks if "#" in row[source] else [""], ("", ".weight", ".bias")):
            old, new = (
                [name.replace("#", BLOCKS[dialect] + block) + suffix for name in expand(row[dialect])]
                for dialect in (source, target)
            )
            if found := [key for key in old if key in tensors]:
                if found != old:
                    raise ValueError(f"{min(set(old) - set(found))}: found none, beside {found[0]}")
                parts = [tensors.pop(key) for key in old]
                renamed |= zip(new, parts if len(new) == len(old) else torch.cat(parts).chunk(len(new)))
    if tensors:
        raise ValueError(f"{min(tensors)}: a DINOv2 in the {source} dialect has no tensor of this name")
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
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def to_official(checkpoint: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """A checkpoint of any dialect as (backbone, head or {}, dialect), with official names.

    Raises a ValueError that names a tensor unknown to the dialect.
    """
    for key in ("teacher", "student", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            return to_official(checkpoint[key])
    tensors = {str(key).removeprefix("module."): tensor for key, tensor in checkpoint.items()}

    if any("patch_embeddings" in key for key in tensors):
        head = take(tensors, "classifier.")
        tensors = take(tensors, "dinov2_with_registers.") or take(tensors, "dinov2.") or tensors
        dialect = "hf5" if any(".q_proj." in key for key in tensors) else "hf"
        return rename(tensors, dialect, "official"), head, dialect

    if "patch_embed.proj.weight" in tensors and "mask_token" not in tensors:
        head = take(tensors, "head.")
        tensors = rename(tensors, "timm", "official")
        zeros = torch.zeros_like(tensors["cls_token"])
        if "register_tokens" in tensors:  # then timm has added the CLS token's position to it already
            tensors["pos_embed"] = torch.cat([zeros, tensors["pos_embed"]], dim=1)
        if head:  # its input is the CLS token only: the weights for the mean patch token are 0
            head["weight"] = torch.cat([head["weight"], torch.zeros_like(head["weight"])], dim=1)
        return tensors | {"mask_token": zeros[0]}, head, "timm"

    head = take(tensors, "linear_head.")
    backbone = take(tensors, "backbone.")
    if backbone and tensors:
        modules = sorted({key.split(".")[0] for key in tensors})
        print(f"left out, beside the backbone: {', '.join(modules)}", file=sys.stderr)
    # Training checkpoints keep blocks in chunks: blocks.<chunk>.<index>, where the index is global.
    backbone = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): x for key, x in (backbone or tensors).items()}
    return rename(backbone, "official", "official"), head, "official"


def from_official(model: DinoVisionTransformer | LinearClassifier, dialect: str) -> dict[str, Tensor]:
    """The state dict of a model in another dialect. Raises a ValueError if the dialect has no such classifier."""
    tensors = dict(model.state_dict())
    if dialect == "official":
        return tensors
    head = take(tensors, "linear_head.")
    tensors = take(tensors, "backbone.") or tensors
    D = tensors["cls_token"].shape[-1]
    if dialect == "timm":
        if "register_tokens" in tensors:
            cls_position, tensors["pos_embed"] = tensors["pos_embed"].split([1, tensors["pos_embed"].shape[1] - 1], dim=1)
            tensors["cls_token"] = tensors["cls_token"] + cls_position
        if head and (head["weight"].shape[1] != 2 * D or head["weight"][:, D:].any()):
            raise ValueError("timm's classifiers use the CLS token only, this one more; write its backbone instead")
        if head:
            head["weight"] = head["weight"][:, :D]
        return rename(tensors, "official", "timm") | {f"head.{key}": tensor for key, tensor in head.items()}

    if head and head["weight"].shape[1] != 2 * D:
        raise ValueError("Hugging Face's classifiers use one layer, this one more (official models: --layers 1)")
    tensors = rename(tensors, "official", dialect)
    if head:
        tensors = {f"{hf_type(model.config)}.{key}": tensor for key, tensor in tensors.items()}
    return tensors | {f"classifier.{key}": tensor for key, tensor in head.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders


def hf_type(config: Config) -> str:
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def hf_config(model: DinoVisionTransformer | LinearClassifier) -> dict:
    """The contents of Hugging Face's config.json for a model."""
    config = model.config
    stem = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    described = {
        "architectures": [stem + ("ForImageClassification" if isinstance(model, LinearClassifier) else "Model")],
        "model_type": hf_type(config),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": int(config.mlp_ratio),
        "use_swiglu_ffn": config.ffn == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": config.layerscale_init,
        "drop_path_rate": config.drop_path_rate,
        "qkv_bias": True,
        "image_size": config.image_size,
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


def hf_preprocessor(config: Config) -> dict:
    """The contents of Hugging Face's preprocessor_config.json: the official evaluation transform."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.crop_size * 8 // 7},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.crop_size, "width": config.crop_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": dinoreg.IMAGENET_MEAN,
        "image_std": dinoreg.IMAGENET_STD,
    }


def hf_folder(repo_id: str) -> Path:
    """The local folder of a repository on the Hugging Face hub, downloaded into the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{repo_id}: no such file; to get a repository of this name, pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an old repository
            folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "pytorch_model*.bin"]))
        return folder
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{repo_id}: no such file, and no such repository on the Hugging Face hub ({reason})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing files


def read(
    source: str, head: str | None = None, layers: int = 4, num_heads: int | None = None
) -> tuple[DinoVisionTransformer | LinearClassifier, str]:
    """The model of an official name, a file, a folder or a Hugging Face repository, and its dialect.

    head is an official linear head for a backbone, as a file. num_heads is needed for widths that are not official, unless
    config.json has it. Raises OSError or ValueError with the reason.
    """
    if source.removeprefix("dinov2_").removesuffix("_lc") in dinoreg.CONFIGS:
        return dinoreg.load(source, layers, dtype=None), "official"
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        path = hf_folder(source)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"{path}: neither *.safetensors nor pytorch_model*.bin in this folder")
    checkpoint: dict[str, Tensor] = {}
    for file in files:
        tensors, metadata = dinoreg.read_tensors(file)
        if "config" in metadata:
            return dinoreg.load(file, dtype=None), "dinoreg"
        checkpoint |= tensors
    try:
        described, processor = (
            json.loads(file.read_text(encoding="utf-8")) if (file := files[0].with_name(name)).exists() else {}
            for name in ("config.json", "preprocessor_config.json")
        )
        backbone, own_head, dialect = to_official(checkpoint)
        config = dinoreg.infer_config(backbone, num_heads=num_heads or described.get("num_attention_heads"))
        if "crop_size" in processor:
            config = dataclasses.replace(config, crop_size=processor["crop_size"]["height"])
        labels = [label for _, label in sorted(described.get("id2label", {}).items(), key=lambda item: int(item[0]))]
        if head:
            own_head, _ = dinoreg.read_tensors(head)
        state_dict = dinoreg.add_head(backbone, own_head) if own_head else backbone
        return dinoreg.from_state_dict(state_dict, config, labels or None), dialect
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of another structure
        raise ValueError(f"{source}: config.json or preprocessor_config.json is not as Hugging Face's ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def write(model: DinoVisionTransformer | LinearClassifier, path: str | os.PathLike, dialect: str = "dinoreg") -> None:
    """Write a model in a dialect: a folder for "hf"; else a file, .safetensors or what `torch.save` writes; or nothing.

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
            dinoreg.write_tensors(tensors, part / "model.safetensors", {"format": "pt"})
            config = model.config
            (part / "config.json").write_text(json.dumps(hf_config(model), indent=2))
            (part / "preprocessor_config.json").write_text(json.dumps(hf_preprocessor(config), indent=2))
        else:
            torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, part)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert weights of DINOv2, with or without registers, between all their public forms.",
        epilog="example: python convert_weights.py facebook/dinov2-with-registers-small -o small.safetensors",
    )
    parser.add_argument("source", help="an official name, a file, a folder, or a Hugging Face repository")
    parser.add_argument("-o", "--output", required=True, help="the file to write; for hf, the folder")
    parser.add_argument("--to", default="dinoreg", choices=("dinoreg", "official", "hf", "timm"), help="(default: dinoreg)")
    parser.add_argument("--head", metavar="FILE", help="an official linear head, for an official backbone")
    parser.add_argument("--layers", type=int, choices=(1, 4), default=4, help="which head of an official name (default: 4)")
    parser.add_argument(
        "--num-heads", type=int, metavar="A", help="attention heads, where neither width nor config.json tell"
    )
    parser.add_argument("--labels", metavar="FILE", help="a text file of the classes' names, one a line")
    args = parser.parse_args(argv)
    try:
        model, dialect = read(args.source, args.head, args.layers, args.num_heads)
        if args.labels:
            model.labels = Path(args.labels).read_text(encoding="utf-8").splitlines()
        write(model, args.output, args.to)
    except (OSError, ValueError) as error:
        print("convert_weights:", error, file=sys.stderr)
        return 2
    count, size = (sum(f(p) for p in model.parameters()) for f in (Tensor.numel, lambda p: p.nbytes))
    print(f"{args.output}: {dialect} -> {args.to}, {count:,} parameters, {size / 1e6:,.1f} MB")
    print(model.config)
    if isinstance(model, LinearClassifier):
        print(
            f"{model.layers} layers -> {model.linear_head.out_features} classes: {', '.join((model.labels or [])[:3])}, ..."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
