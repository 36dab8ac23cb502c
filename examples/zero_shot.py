"""Classify and segment photos by text: dino.txt on the ViT-L/14 with registers (Jose et al., 2024).

    pip install -e ".[examples]"
    python examples/zero_shot.py PHOTO... --classes "a cat" "a dog" "a bird"
    python examples/zero_shot.py PHOTO... --classes classes.txt --templates imagenet --segment

Probabilities are the softmax of 100 times the cosines of photo and text, as in the official
notebook: they add up to 1, even if no class is in the photo. --segment looks at the whole photo
instead of its centre, and draws the most similar class of each patch. The text encoder (2.15 GB) is
loaded only for classes whose vectors are not in the cache, ~/.cache/dinoreg.
Official Implementation: dinov2/hub/dinotxt.py and dinov2/hub/text; "DINOv2 Meets Text",
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
from tqdm import tqdm

import common
import dinoreg
import masks
import segment

FILE = "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l_{}.pth"  # of the vision_head, of the text_encoder


class SwiGLU(nn.Module):
    """`dinoreg.SwiGLU` with its two input layers apart, and a hidden width that is a multiple of
    64.
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 63) // 64 * 64
        self.w1, self.w2, self.w3 = (
            nn.Linear(dim, hidden),
            nn.Linear(dim, hidden),
            nn.Linear(hidden, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class VisionHead(nn.Module):
    """More blocks for the normalised tokens of the backbone: (B, N, D) -> (B, N, D)."""

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
    """Transformer block, pre-norm, in which tokens attend to themselves and to those before
    them.
    """

    def __init__(self, config: dinoreg.Config):
        super().__init__()
        self.attention_norm, self.attention = (
            nn.LayerNorm(config.embed_dim),
            dinoreg.Attention(config),
        )
        self.attention.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=False)
        self.ffn_norm, self.feed_forward = nn.LayerNorm(config.embed_dim), dinoreg.Mlp(config)

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
        self,
        embed_dim=2048,
        context_length=77,
        vocab_size=49408,
        dim=1280,
        num_heads=20,
        num_layers=24,
    ):
        super().__init__()
        config = dinoreg.Config(embed_dim=dim, num_heads=num_heads)
        self.backbone = nn.Module()
        self.backbone.token_embedding = nn.Embedding(vocab_size, dim)
        self.backbone.positional_embedding = nn.Parameter(torch.zeros(context_length, dim))
        self.backbone.blocks = nn.Sequential(*(TextBlock(config) for _ in range(num_layers)))
        self.backbone.ln_final = nn.LayerNorm(dim)
        self.head = nn.ModuleDict({"linear_projection": nn.Linear(dim, embed_dim, bias=False)})

    def forward(self, token_ids: Tensor) -> Tensor:
        x = (
            self.backbone.token_embedding(token_ids)
            + self.backbone.positional_embedding[: token_ids.shape[1]]
        )
        x = self.backbone.ln_final(self.backbone.blocks(x))  # (K, n, dim)
        return self.head.linear_projection(
            x[torch.arange(len(x), device=x.device), token_ids.argmax(dim=1)]
        )


class DinoTxt(nn.Module):
    """Images and texts as vectors of 2 D, the first half for the CLS token, the second for the mean
    of the patches.
    """

    def __init__(
        self,
        backbone: dinoreg.DinoVisionTransformer,
        head: VisionHead,
        text_model: TextEncoder | None = None,
    ):
        super().__init__()
        self.visual_model = nn.ModuleDict(
            {"backbone": nn.ModuleDict({"model": backbone}), "head": head}
        )
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
        features = torch.cat([cls, patches.mean(dim=1)], dim=1)
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return F.normalize(self.text_model(text), dim=1) if normalize else self.text_model(text)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of images (B, C, H, W) and token ids (K, n): (B, K), and the same
        transposed.
        """
        logits = (
            self.logit_scale.exp()
            * self.encode_image(image, normalize=True)
            @ self.encode_text(text, normalize=True).T
        )
        return logits, logits.T


def fetch(part: str) -> Path:
    """The official file of the vision_head or the text_encoder, downloaded into torch.hub's cache
    unless it is there.
    """
    try:
        return dinoreg.download([f"{dinoreg.HUB_URL}/dinov2_vitl14/{FILE.format(part)}"])[0]
    except OSError as error:
        files = (
            f"{FILE.format('vision_head')}, {FILE.format('text_encoder')}, "
            "dinov2_vitl14_reg4_pretrain.pth"
        )
        raise OSError(
            f"{str(error).rpartition(';')[0]}; needed in {torch.hub.get_dir()}/checkpoints: {files}"
        ) from None


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
    lines = (
        Path(classes[0]).read_text(encoding="utf-8-sig").splitlines()
        if len(classes) == 1
        else classes
    )
    if templates == ["imagenet"]:
        import open_clip

        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < 2 or not all("{}" in template for template in templates):
        raise ValueError(
            "--classes must name two or more different classes, and --templates must contain {}"
        )
    return {name: [template.replace("{}", name) for template in templates] for name in names}


@torch.inference_mode()
def encode_classes(prompts: list[list[str]], args: argparse.Namespace) -> Tensor:
    """The mean of the vectors of each class's prompts (K, 2 D), normalised; from the cache if they
    were computed before.
    """
    path, T, vectors = fetch("text_encoder"), len(prompts[0]), []
    key = json.dumps([str(path.resolve()), common.stamp(path), prompts])
    cache = common.cache_folder() / f"text-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if cache.exists() and not args.no_cache:
        with dinoreg.naming(cache):
            return dinoreg.read_tensors(cache)[0]["features"]
    tokens, encoder = (
        tokenize([prompt for texts in prompts for prompt in texts]),
        load(TextEncoder, path).to(args.device),
    )
    # All prompts of some classes at a time.
    for ids in tqdm(tokens.split(max(1, 64 // T) * T), "text", disable=None):
        ids = ids[:, : ids.argmax(dim=1).max() + 1].to(args.device)  # no token sees what follows it
        vectors.append(F.normalize(encoder(ids), dim=1).unflatten(0, (-1, T)).mean(dim=1).cpu())
    features = F.normalize(torch.cat(vectors), dim=1)
    if not args.no_cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        dinoreg.write_tensors({"features": features}, cache, {})
    return features


def compare(model: DinoTxt, images: list[Tensor], text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each image (3, H, W), the cosines with classes (K, 2 D) of the whole and of its patches:
    (K,) and (h, w, K).
    """
    same = len({image.shape for image in images}) == 1
    # More at once need more memory.
    for x in torch.stack(images).split(4) if same else [image[None] for image in images]:
        cls, patches = model.get_visual_class_and_patch_tokens(x.to(text.device))
        whole = F.normalize(torch.cat([cls, patches.mean(dim=1)], dim=1), dim=1) @ text.T
        local = F.normalize(patches, dim=2) @ F.normalize(text[:, cls.shape[1] :], dim=1).T
        grid = model.visual_model.backbone.model.to_grid(*x.shape[-2:])
        yield from zip(whole.cpu(), local.unflatten(1, grid).cpu())


def run(args: argparse.Namespace) -> int:
    prompts = make_prompts(args.classes, args.templates)
    colours = {name: masks.default_colour(i) for i, name in enumerate(prompts)}
    if args.segment and len(prompts) > masks.IGNORED:
        raise ValueError(f"--segment takes at most {masks.IGNORED} classes, got {len(prompts)}")
    head, backbone = (
        load(VisionHead, fetch("vision_head")),
        common.load_backbone(args.model, args.device),
    )
    text = encode_classes(list(prompts.values()), args).to(args.device)
    model, paths, failed = (
        DinoTxt(backbone, head).to(args.device),
        dinoreg.find_images(args.images),
        0,
    )
    size = args.resolution if args.segment else args.size
    read = partial(
        common.read_image,
        size=size,
        keep_aspect=args.segment,
        normalized=False,
        transform=backbone.transform,
    )
    results = common.compute(
        lambda images: compare(model, images, text), read, paths, backbone.transform
    )
    for path, picture, result in zip(
        paths, common.name_pictures(paths, args.output, "classes"), results
    ):
        scores = ValueError(result) if isinstance(result, str) else (100 * result[0]).softmax(dim=0)
        record = dinoreg.describe(path, scores, list(prompts), args.top)
        failed += "error" in record
        if args.segment and "error" not in record:
            photo = dinoreg.to_rgb(dinoreg.open_image(path))
            mask = segment.classify_pixels(result[1].permute(2, 0, 1), photo.height, photo.width)
            counts = torch.from_numpy(mask).flatten().bincount(minlength=len(prompts)) / mask.size
            record |= {"picture": str(picture), "shares": dict(zip(prompts, counts.tolist()))}
            picture.parent.mkdir(parents=True, exist_ok=True)
            with dinoreg.atomic(picture) as part:
                masks.draw(
                    [(photo, None), (photo, mask)], record["shares"], colours, width=1000
                ).save(part)
        if args.json:
            print(json.dumps(record), flush=True)
        elif "error" in record:
            print(f"zero_shot: {path}: {result}", file=sys.stderr)
        else:
            dinoreg.print_record(record, width=max(len(str(path)) for path in paths))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if some images could not be read, 2 if the run could not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="PHOTO|FOLDER", help="image files, or folders of them")
    add(
        "--classes",
        nargs="+",
        required=True,
        metavar="CLASS|FILE",
        help="two or more, or a file with one on each line",
    )
    add(
        "--templates",
        nargs="+",
        default=["{}"],
        metavar="TEXT",
        help='with {} for the class, or "imagenet": those of CLIP',
    )
    add(
        "--model",
        default="vitl14_reg",
        help="the backbone: an official model or a file (default: %(default)s)",
    )
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the central crop, without --segment (default: the model's)",
    )
    add(
        "--top",
        type=int,
        default=5,
        metavar="K",
        help="number of classes to print (default: %(default)s)",
    )
    add(
        "--segment",
        action="store_true",
        help="draw the most similar class of each patch of the whole photo",
    )
    add(
        "--resolution",
        type=int,
        default=518,
        metavar="PIXELS",
        help="of --segment: as many pixels as this square has",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("pictures"),
        metavar="FOLDER",
        help="of --segment (default: %(default)s)",
    )
    add(
        "--no-cache",
        action="store_true",
        help="neither read nor write vectors of classes in ~/.cache/dinoreg",
    )
    add("--json", action="store_true", help="print one JSON object per line, for each photo")
    common.add_device(parser)
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
