"""Classify and segment photos by text: dino.txt on the ViT-L/14 with registers (Jose et al., 2024).

Never run with the official files (3.5 GB), so its accuracy was not measured. It was compared with
the official code on a small model, and run in the official sizes, both with random weights.

    pip install -e ".[examples]"
    python examples/zero_shot.py PHOTO... --classes "a cat" "a dog" "a bird"
    python examples/zero_shot.py PHOTO... --classes classes.txt --templates imagenet --segment

Probabilities are the softmax of 100 times the cosines of photo and text, as in the official
notebook: they add up to 1 even if no class is in the photo. --segment looks at the whole photo
instead of its center and draws the most similar class of each patch. The text encoder (2.15 GB) is
loaded only for classes whose vectors are not in the cache, ~/.cache/dinoreg.

Official code: dinov2/hub/dinotxt.py and dinov2/hub/text; "DINOv2 Meets Text",
https://arxiv.org/abs/2412.16334.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import dinoreg
import features
import outputs
import segmentation

BACKBONE = "dinov2_vitl14_reg4_pretrain.pth"
FILE = "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l_{}.pth"  # of the vision_head, of the text_encoder


class SwiGLU(nn.Module):
    """`dinoreg.SwiGLU` with two separate input layers; its hidden width is a multiple of 64."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 63) // 64 * 64
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class VisionHead(nn.Module):
    """More blocks for the normalized tokens of the backbone: (B, N, D) -> (B, N, D)."""

    def __init__(self, input_dim: int = 1024, num_heads: int = 16, num_blocks: int = 2):
        super().__init__()
        config = dinoreg.Config(embed_dim=input_dim, num_heads=num_heads)
        self.block_list = nn.Sequential(*(dinoreg.Block(config) for _ in range(num_blocks)))
        for block in self.block_list:
            block.norm1, block.norm2 = nn.LayerNorm(input_dim), nn.LayerNorm(input_dim)  # eps 1e-5
            block.attn.qkv = nn.Linear(input_dim, 3 * input_dim, bias=False)
            block.mlp = SwiGLU(input_dim)
        self.ln_final = nn.LayerNorm(input_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_final(self.block_list(x))


class TextBlock(nn.Module):
    """Transformer block, pre-norm; tokens attend to themselves and to those before them."""

    def __init__(self, config: dinoreg.Config):
        super().__init__()
        dim = config.embed_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = dinoreg.Attention(config)
        self.attention.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.ffn_norm = nn.LayerNorm(dim)
        self.feed_forward = dinoreg.Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.split_heads(self.attention.qkv(self.attention_norm(x)))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention.proj(heads.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.ffn_norm(x))


class TextEncoder(nn.Module):
    """Token ids of texts (K, n) to vectors (K, embed_dim): the token of the highest id, which ends
    a text, projected.
    """

    def __init__(
        self, embed_dim=2048, context_length=77, vocab_size=49408, dim=1280, num_heads=20, depth=24
    ):
        super().__init__()
        config = dinoreg.Config(embed_dim=dim, num_heads=num_heads)
        self.backbone = nn.Module()
        self.backbone.token_embedding = nn.Embedding(vocab_size, dim)
        self.backbone.positional_embedding = nn.Parameter(torch.zeros(context_length, dim))
        self.backbone.blocks = nn.Sequential(*(TextBlock(config) for _ in range(depth)))
        self.backbone.ln_final = nn.LayerNorm(dim)
        self.head = nn.ModuleDict({"linear_projection": nn.Linear(dim, embed_dim, bias=False)})

    def forward(self, token_ids: Tensor) -> Tensor:
        positions = self.backbone.positional_embedding[: token_ids.shape[1]]
        x = self.backbone.token_embedding(token_ids) + positions
        x = self.backbone.ln_final(self.backbone.blocks(x))  # (K, n, dim)
        texts = torch.arange(len(x), device=x.device)
        return self.head.linear_projection(x[texts, token_ids.argmax(dim=1)])


class DinoTxt(nn.Module):
    """Images and texts as vectors of 2 D: half for the CLS token, half for the mean of patches."""

    def __init__(self, backbone: nn.Module, head: VisionHead, text_model: nn.Module | None = None):
        super().__init__()
        backbone = nn.ModuleDict({"model": backbone})  # as the parameters are named officially
        self.visual_model = nn.ModuleDict({"backbone": backbone, "head": head})
        self.text_model = text_model
        self.logit_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())

    def get_visual_class_and_patch_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> CLS (B, D) and patches (B, h * w, D), after the head."""
        model = self.visual_model["backbone"]["model"]
        (tokens,) = model._get_intermediate_layers_not_chunked(image)
        cls, _, patches = model.split_tokens(self.visual_model["head"](model.norm(tokens)))
        return cls, patches

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        cls, patches = self.get_visual_class_and_patch_tokens(image)
        x = torch.cat([cls, patches.mean(dim=1)], dim=1)
        return F.normalize(x, dim=1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(self.text_model(text), dim=1) if normalize else self.text_model(text)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of images (B, C, H, W) and token ids (K, n): (B, K) and its transpose."""
        images = self.encode_image(image, normalize=True)
        texts = self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * images @ texts.T
        return logits, logits.T


def fetch(part: str) -> Path:
    """The official file of the vision_head or text_encoder, downloaded if torch.hub lacks it."""
    try:
        return dinoreg.download([f"{dinoreg.HUB_URL}/dinov2_vitl14/{FILE.format(part)}"])[0]
    except OSError as error:
        files = [FILE.format("vision_head"), FILE.format("text_encoder"), BACKBONE]
        advice = f"needed in {torch.hub.get_dir()}/checkpoints: {', '.join(files)}"
        raise OSError(f"{str(error).rpartition(';')[0]}; {advice}") from None


def load(kind: type[nn.Module], path: Path) -> nn.Module:
    """A `VisionHead` or `TextEncoder` of the official size from a file, memory-mapped."""
    with dinoreg.NoMemory():
        module = kind()
    with dinoreg.naming(path):
        module.load_state_dict(dinoreg.read_tensors(path, mmap=True)[0], assign=True)
    return module.float().eval()


def tokenize(texts: list[str], context_length: int = 77) -> Tensor:
    """CLIP's token ids of texts (K, context_length), filled up with zeros; longer texts are cut."""
    import open_clip  # here, since it takes seconds

    return open_clip.tokenize(texts, context_length)


def make_prompts(classes: list[str], templates: list[str]) -> dict[str, list[str]]:
    """The prompts of each class. A single value of classes is a file with one on each line."""
    if len(classes) == 1:
        with dinoreg.naming(classes[0]):
            classes = Path(classes[0]).read_text(encoding="utf-8-sig").splitlines()
    if templates == ["imagenet"]:
        import open_clip

        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    names = [line.strip() for line in classes if line.strip()]
    if len(set(names)) < 2:
        raise ValueError("--classes must name two or more different classes")
    if not all("{}" in template for template in templates):
        raise ValueError("--templates must contain {}")
    return {name: [template.replace("{}", name) for template in templates] for name in names}


@torch.inference_mode()
def encode_classes(prompts: list[list[str]], device: str, use_cache: bool) -> Tensor:
    """The mean of the vectors of each class's prompts (K, 2 D), normalized, which are cached."""
    path, T = fetch("text_encoder"), len(prompts[0])
    key = json.dumps([str(path.resolve()), features.stamp(path), prompts])
    name = f"text-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    cache = features.cache_folder() / name if use_cache else None
    if cache and cache.exists():
        with dinoreg.naming(cache):
            return dinoreg.read_tensors(cache)[0]["features"]
    tokens = tokenize([prompt for texts in prompts for prompt in texts])
    encoder, vectors = load(TextEncoder, path).to(device), []
    # All prompts of some classes at a time.
    for ids in features.progress(tokens.split(max(1, 64 // T) * T), desc="text"):
        ids = ids[:, : ids.argmax(dim=1).max() + 1].to(device)  # no token sees what follows it
        vectors.append(F.normalize(encoder(ids), dim=1).unflatten(0, (-1, T)).mean(dim=1).cpu())
    text = F.normalize(torch.cat(vectors), dim=1)
    if not text.isfinite().all():
        raise ValueError(f"{path}: {features.NOT_FINITE}")
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        dinoreg.write_tensors({"features": text}, cache, {})
    return text


def compare(model: DinoTxt, text: Tensor, images: list[Tensor]) -> Iterator[Tensor]:
    """Of each image (3, H, W), the cosines with classes (K, 2 D), in one tensor (1 + h, w, K): the
    first row has those of the whole image, repeated, the others those of its patches.
    """
    same = len({image.shape for image in images}) == 1
    # More at once need more memory.
    for x in torch.stack(images).split(4) if same else [image[None] for image in images]:
        cls, patches = model.get_visual_class_and_patch_tokens(x.to(text.device))
        h, w = model.visual_model.backbone.model.to_grid(*x.shape[-2:])
        whole = F.normalize(torch.cat([cls, patches.mean(dim=1)], dim=1), dim=1) @ text.T
        local = F.normalize(patches, dim=2) @ F.normalize(text[:, cls.shape[1] :], dim=1).T
        rows = whole[:, None, None].expand(-1, 1, w, -1), local.unflatten(1, (h, w))
        yield from torch.cat(rows, dim=1).cpu()


def draw_classes(path: Path, cosines: Tensor, names: list[str], picture: Path) -> dict[str, float]:
    """Draw the most similar class of each patch; return the share of each class in the pixels."""
    photo = dinoreg.to_rgb(dinoreg.open_image(path))
    mask = segmentation.classify_pixels(cosines.permute(2, 0, 1), photo.height, photo.width)
    counts = torch.from_numpy(mask).flatten().bincount(minlength=len(names))
    shares = dict(zip(names, (counts / mask.size).tolist()))
    colors = {name: segmentation.default_color(i) for i, name in enumerate(names)}
    overlay = segmentation.draw([(photo, None), (photo, mask)], shares, colors, width=1000)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with dinoreg.atomic(picture) as part:
        overlay.save(part)
    return shares


def print_record(record: dict, width: int) -> None:
    """Print a record as text, with file names in a column of this width."""
    if "error" in record:
        dinoreg.complain(f"{record['image']}: {record['error']}", "zero_shot")
    else:
        dinoreg.print_record(record, width)
    if "picture" in record:
        print(dinoreg.printable(f"{record['picture']} written"), flush=True)


def run(args: argparse.Namespace) -> int:
    prompts = make_prompts(args.classes, args.templates)
    names = [*prompts]
    if args.segment and len(names) > segmentation.IGNORED:
        raise ValueError(f"--segment takes at most 255 classes, got {len(names)}")
    paths, failed = dinoreg.find_images(args.images), False
    pictures = common.name_pictures(paths, args.output, "classes")
    outputs.check_outputs(pictures if args.segment else (), paths)
    head = load(VisionHead, fetch("vision_head"))
    size = args.resolution if args.segment else args.size
    backbone = common.load_backbone(args.model, args.device, size=size, whole=args.segment)
    if (D := backbone.embed_dim) != (needed := len(head.ln_final.weight)):
        raise ValueError(f"{args.model}: expected a model of width {needed}, got {D}")
    text = encode_classes([*prompts.values()], args.device, not args.no_cache).to(args.device)
    model = DinoTxt(backbone, head).to(args.device)

    options = {"keep_aspect": args.segment, "patch_size": backbone.patch_size, "normalized": False}
    read = partial(features.read_image, transform=backbone.transform, **options)
    results = features.compute(partial(compare, model, text), read, paths, backbone.transform)
    width = max(len(dinoreg.printable(str(path))) for path in paths)
    bar = features.progress(paths, unit="image")
    for path, picture, result in zip(bar, pictures, results):
        broken = isinstance(result, str)
        scores = ValueError(result) if broken else (100 * result[0, 0]).softmax(dim=0)
        record, failed = dinoreg.describe(path, scores, names, args.top), failed or broken
        if args.segment and not broken:
            shares = draw_classes(path, result[1:], names, picture)
            record |= {"picture": str(picture), "shares": shares}
        with bar.external_write_mode():
            print(json.dumps(record), flush=True) if args.json else print_record(record, width)
    return int(failed)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    common.add_images(parser)
    text = "two or more, or a file with one on each line"
    add("--classes", nargs="+", required=True, metavar="CLASS|FILE", help=text)
    text = 'with {} for the class, or "imagenet": those of CLIP'
    add("--templates", nargs="+", default=["{}"], metavar="TEXT", help=text)
    text = "the backbone: an official model or a file (default: %(default)s)"
    add("--model", default="vitl14_reg", help=text)
    text = "side of the central crop, without --segment (default: the model's)"
    add("--size", type=common.positive, metavar="PIXELS", help=text)
    text = "number of classes to print (default: %(default)s)"
    add("--top", type=common.positive, default=5, metavar="K", help=text)
    text = "draw the most similar class of each patch of the whole photo"
    add("--segment", action="store_true", help=text)
    common.add_resolution(parser, default=518)
    text = "for the pictures of --segment (default: %(default)s)"
    add("-o", "--output", type=common.output, default=Path("pictures"), metavar="FOLDER", help=text)
    text = "neither read nor write vectors of classes in ~/.cache/dinoreg"
    add("--no-cache", action="store_true", help=text)
    add("--json", action="store_true", help="print one JSON object per line, for each photo")
    common.add_device(parser)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    return common.main(run, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
