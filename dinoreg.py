# SPDX-License-Identifier: Apache-2.0
"""DINOv2 with registers in one file of PyTorch: model, preprocessing, weights and command line.

    model = dinoreg.load("vits14_reg")               # official weights, downloaded once
    image = dinoreg.preprocess("photo.jpg")          # (3, 224, 224)
    features = model.forward_features(image[None])   # x_norm_clstoken, x_norm_patchtokens, ...

    $ python -m dinoreg photo.jpg                    # what is in this picture?

The model is everything from `Config` to `LinearClassifier`. Sources: DINOv2 (arXiv 2304.07193),
registers (arXiv 2309.16588), and the official code, https://github.com/facebookresearch/dinov2:
parameters and methods have its names, so its checkpoints and code written for it work unchanged.

The letters of the shapes:
    B, C    images in the batch, channels of an image (3)
    H, W    height and width of an image, in pixels
    h, w    height and width of its grid of patches: H / patch_size, W / patch_size
    R       register tokens (4, or 0)
    N       tokens of an image: 1 CLS + R registers + h * w patches, in this order
    D, A    width of a token (embed_dim), attention heads, each D / A wide
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__version__ = "0.3.0"

Images = Tensor | list[Tensor] | tuple[Tensor, ...]  # (B, C, H, W), or batches of several sizes


def pair(x):
    """A number for both sides as (x, x); a pair as it is."""
    return x if isinstance(x, tuple) else (x, x)


# The model: its config, then its parts in the order in which an image flows through them ----------


@dataclasses.dataclass
class Config:
    """The architecture of a model. The defaults are the official ViT-S/14 with registers."""

    embed_dim: int = 384  # D
    depth: int = 12  # transformer blocks
    num_heads: int = 6  # A
    mlp_ratio: float = 4.0  # hidden width of the feed-forward layer, in units of D
    ffn: str = "mlp"  # "mlp" or "swiglu"
    patch_size: int = 14  # pixels
    image_size: int | tuple[int, int] = 518  # pixels: side or (H, W) of the position embedding
    in_chans: int = 3  # C
    num_register_tokens: int = 4  # R
    layerscale_init: float = 1.0  # of new models; the official training starts at 1e-5
    drop_path_rate: float = 0.0  # stochastic depth: rate of the last block, rising linearly from 0
    drop_path_uniform: bool = False  # the same rate in all blocks, as in the official training
    interpolate_antialias: bool = True  # when the position embedding is resized
    interpolate_offset: float = 0.0  # added to the new grid's sides to compute the scale factor

    def __post_init__(self):
        heads = self.num_heads
        if type(heads) is not int or heads < 1 or self.embed_dim % heads:
            raise ValueError(f"num_heads must divide embed_dim {self.embed_dim}, got {heads}")
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f"ffn must be 'mlp' or 'swiglu', got {self.ffn!r}")
        if not (0 <= self.drop_path_rate < 1 and 0 <= self.interpolate_offset < 1):
            raise ValueError("drop_path_rate and interpolate_offset must be in [0, 1)")

    to_dict = dataclasses.asdict  # transformers' Trainer and its loggers call this and the next

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict())

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the position embedding."""
        H, W = pair(self.image_size)
        return H // self.patch_size, W // self.patch_size

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layer."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        # SwiGLU has three matrices where the MLP has two: 2/3 of the width, as many parameters.
        return hidden if self.ffn == "mlp" else (hidden * 2 // 3 + 7) // 8 * 8


CONFIGS = {
    "vits14_reg": Config(embed_dim=384, depth=12, num_heads=6),
    "vitb14_reg": Config(embed_dim=768, depth=12, num_heads=12),
    "vitl14_reg": Config(embed_dim=1024, depth=24, num_heads=16),
    "vitg14_reg": Config(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}
# The models without registers, "vits14" and so on, also resize the position embedding differently.
PLAIN = dict(num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1)
CONFIGS |= {name[:6]: Config(**config.to_dict() | PLAIN) for name, config in CONFIGS.items()}


class PatchEmbed(nn.Module):
    """Cut images into square patches and map each to a token: (B, C, H, W) -> (B, h * w, D)."""

    def __init__(self, config: Config):
        super().__init__()
        P = self.patch_size = pair(config.patch_size)
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, P, stride=P)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        self.to_grid(H, W)  # raises a ValueError unless the sides are multiples of the patch size
        x = self.proj(x)  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)  # (B, h * w, D)
        return self.norm(x)

    def to_grid(self, H: int, W: int) -> tuple[int, int]:
        """The grid (h, w) of H x W pixels; denser if `proj` has a stride below the patch size."""
        P, Q = pair(self.patch_size)
        if H % P or W % Q or H == 0 or W == 0:
            near = f"{max(P, round(H / P) * P)} x {max(Q, round(W / Q) * Q)}"
            raise ValueError(f"{H} x {W} pixels are not multiples of {P}; the nearest are {near}")
        height, width = pair(getattr(self.proj, "kernel_size", (P, Q)))
        down, right = pair(getattr(self.proj, "stride", (P, Q)))
        return (H - height) // down + 1, (W - width) // right + 1


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dim = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = (config.embed_dim // config.num_heads) ** -0.5
        self.attn_drop = 0.0  # no released model uses dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.split_heads(self.qkv(x))  # each (B, A, N, D / A)
        # softmax(q @ k.mT * scale + attn_bias) @ v, without ever holding the N x N matrix
        drop = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_bias, drop, scale=self.scale)
        x = x.transpose(1, 2).flatten(2)  # the heads side by side again: (B, N, D)
        return self.proj_drop(self.proj(x))

    def split_heads(self, qkv: Tensor) -> Tensor:
        """(B, N, 3 D) -> q, k, v, each (B, A, N, D / A)."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, A, D / A)
        return qkv.permute(2, 0, 3, 1, 4)

    def attention_rows(self, x: Tensor, n: int) -> Tensor:
        """Attention of the first n tokens to all tokens: (B, N, D) -> (B, A, n, N), float32."""
        q, k, _ = self.split_heads(self.qkv(x))
        return (q[:, :, :n] @ k.mT * self.scale).softmax(dim=-1, dtype=torch.float32)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale:g}, attn_drop={self.attn_drop}"


class Mlp(nn.Module):
    """Feed-forward layer of S, B and L: D -> mlp_ratio * D -> D, with exact (erf) GELU between."""

    def __init__(self, config: Config):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.hidden_dim, config.embed_dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class SwiGLU(nn.Module):
    """Feed-forward layer of g (Shazeer, 2020): one branch gates the other."""

    def __init__(self, config: Config):
        super().__init__()
        self.w12 = nn.Linear(config.embed_dim, 2 * config.hidden_dim)
        self.w3 = nn.Linear(config.hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al., 2021)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): training drops the branch of an image at random."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)  # so that the expected value is that of x


class Block(nn.Module):
    """Transformer block, pre-norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: Config, drop_path_rate: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config)
        self.drop_path1 = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[config.ffn](config)
        self.ls2 = LayerScale(config)
        self.drop_path2 = DropPath(drop_path_rate)
        self.sample_drop_ratio = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.sample_drop_ratio > 0.1:
            return self.forward_subset(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x

    def forward_subset(self, x: Tensor) -> Tensor:
        """Compute each branch for the images that keep it: faster than `DropPath` at high rates
        (official code: `drop_add_residual_stochastic_depth` in dinov2/layers/block.py)."""
        B = x.shape[0]
        size = max(int(B * (1 - self.sample_drop_ratio)), 1)
        first = (self.norm1, self.attn, self.ls1)
        second = (self.norm2, self.mlp, self.ls2)
        for norm, layer, scale in (first, second):
            kept = torch.randperm(B, device=x.device)[:size]
            residual = scale(layer(norm(x[kept]))).to(x.dtype)
            # The residual of a kept image counts for those that are dropped, too.
            x = x.index_add(0, kept, residual, alpha=B / size)
        return x


class DinoVisionTransformer(nn.Module):
    """DINOv2 with or without registers, a drop-in for the official `torch.hub` model.

    Without registers, large models store global information in a few background patches, whose
    tokens become outliers of high norm and appear as artifacts in feature and attention maps.
    Registers are learned tokens that take over this role and are discarded at the output.

    H and W of images must be multiples of the patch size, else a ValueError is raised. Without
    masks, DistributedDataParallel needs `model.mask_token.requires_grad_(False)`."""

    def __init__(self, config: Config):
        super().__init__()
        D, R, (h, w) = config.embed_dim, config.num_register_tokens, config.grid
        first_rate = config.drop_path_rate if config.drop_path_uniform else 0.0
        rates = np.linspace(first_rate, config.drop_path_rate, config.depth).tolist()

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        # Positions of CLS and of the patches; registers have none.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + h * w, D))
        self.register_tokens = nn.Parameter(torch.empty(1, R, D)) if R else None
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Identity()

        # The config is a copy: the model changes it with its image size.
        self.config = dataclasses.replace(config)
        self.transform = Transform()  # how `preprocess` prepares this model's images
        self.patch_size = config.patch_size
        self.num_register_tokens = R
        self.interpolate_antialias = config.interpolate_antialias
        self.interpolate_offset = config.interpolate_offset
        self.grad_checkpointing = False  # True: training recomputes activations to save memory
        self.init_weights()

        # More attributes that code written for the official class expects.
        self.embed_dim = self.num_features = D
        self.num_heads = config.num_heads
        self.n_blocks = config.depth
        self.num_tokens = 1
        self.chunked_blocks = False
        vars(self.patch_embed).update(img_size=pair(config.image_size), in_chans=config.in_chans)
        vars(self.patch_embed).update(patches_resolution=(h, w), num_patches=h * w, embed_dim=D)

    def init_weights(self) -> None:
        """Random weights as in the official method: a value for every parameter."""
        # CLS and registers start near 0, positions and linear layers small.
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.config.layerscale_init)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()

    def forward(self, x: Images, masks=None, is_training: bool = False):
        """Images (B, C, H, W) -> normalized CLS token (B, D); all features if is_training."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        # The rows of a list of batches are concatenated.
        parts = features if isinstance(features, list) else [features]
        return self.head(torch.cat([part["x_norm_clstoken"] for part in parts]))

    def forward_features(self, x: Images, masks=None):
        """All tokens of images (B, C, H, W); patches are masked where masks (B, h * w) is True.

        x_norm_clstoken (B, D), x_norm_regtokens (B, R, D) and x_norm_patchtokens (B, h * w, D) come
        after the final norm, x_prenorm (B, N, D) before it; masks is the argument. A list of
        batches, with a list of masks or None, returns a list of such dicts."""
        if isinstance(x, (list, tuple)):
            masks = masks or [None] * len(x)
            return [self.forward_features(*batch) for batch in zip(x, masks, strict=True)]
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = self.run_block(block, x)
        names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")
        return dict(zip(names, self.split_tokens(self.norm(x))), x_prenorm=x, masks=masks)

    forward_features_list = forward_features  # the official name of it for lists

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images to tokens: (B, C, H, W) -> (B, N, D)."""
        if not hasattr(x, "is_floating_point"):
            raise TypeError(f"expected images as a tensor, see preprocess; got {type(x).__name__}")
        H, W = x.shape[-2:]
        # Each patch becomes a token. Integers are not converted: nobody has normalized them.
        x = self.patch_embed(x.to(self.pos_embed.dtype) if x.is_floating_point() else x)
        # The mask token takes the place of masked patches, before it gets their position.
        if masks is not None:
            x = torch.where(masks[..., None].bool(), self.mask_token.to(x.dtype), x)
        # CLS comes first, with a position of its own.
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + h * w, D)
        x = x + self.interpolate_pos_encoding(x, H, W)
        # Registers come between CLS and the patches, after the positions: they have none.
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # (B, N, D)
        return x

    def interpolate_pos_encoding(self, x: Tensor, H: int, W: int) -> Tensor:
        """Positions (1, 1 + h * w, D) for CLS and patches x, of images of H x W pixels."""
        size = self.to_grid(H, W)
        stored, patches = self.config.grid, self.pos_embed.shape[1] - 1
        if math.prod(stored) != patches:  # pos_embed was replaced: assume a square grid
            stored = pair(math.isqrt(patches))
        if size == stored or (H == W and stored[0] ** 2 == patches == x.shape[1] - 1):
            return self.pos_embed
        # With an offset, the official code passes a scale factor in place of a size, which shifts
        # the sampling points a little: models without registers were trained so.
        scale = [float(x + self.interpolate_offset) / y for x, y in zip(size, stored)]
        target: dict = {"scale_factor": tuple(scale)} if self.interpolate_offset else {"size": size}
        # In float32: bicubic weights are too coarse in half precision.
        pos_embed = self.pos_embed.float()  # (1, 1 + patches, D)
        # MPS has no antialiased bicubic resize up to torch 2.7, and no gradient for it after that.
        pos_embed = pos_embed.cpu() if pos_embed.device.type == "mps" else pos_embed
        grid = pos_embed[:, 1:].unflatten(1, stored).permute(0, 3, 1, 2)  # (1, D, h, w) as stored
        # PyTorch (2.14) resizes contiguous tensors to a single column of patches wrongly.
        grid = grid.contiguous(memory_format=torch.channels_last)
        grid = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **target)
        pos_embed = torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        return pos_embed.to(x.device, x.dtype)

    def to_grid(self, H: int, W: int) -> tuple[int, int]:
        """The grid (h, w) of patches of images of H x W pixels."""
        if isinstance(self.patch_embed, PatchEmbed):
            return self.patch_embed.to_grid(H, W)
        P, Q = pair(getattr(self.patch_embed, "patch_size", self.patch_size))  # another module
        return H // P, W // Q

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> CLS (B, D), registers (B, R, D), patches (B, h * w, D)."""
        R = self.num_register_tokens
        return x[:, 0], x[:, 1 : 1 + R], x[:, 1 + R :]

    def get_intermediate_layers(
        self, x, n=1, reshape=False, return_class_token=False, norm=True, return_extra_tokens=False
    ) -> tuple:
        """Patch tokens of images (B, C, H, W) after the last n blocks, or after those that n lists.

        Each is (B, h * w, D), or (B, D, h, w) if reshape, with the final norm applied if norm. With
        return_class_token the CLS token (B, D) follows in a tuple, with return_extra_tokens, as in
        DINOv3, the registers (B, R, D). Raises ValueError for a block that does not exist."""
        results = []
        for tokens in self._get_intermediate_layers_not_chunked(x, n):
            cls, registers, patches = self.split_tokens(self.norm(tokens) if norm else tokens)
            if reshape:
                patches = patches.mT.unflatten(2, self.to_grid(*x.shape[-2:])).contiguous()
            extra = [cls] * return_class_token + [registers] * return_extra_tokens
            results.append((patches, *extra) if extra else patches)
        return tuple(results)

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n: int | Collection[int] = 1):
        """All tokens (B, N, D), before the final norm, after each of the blocks that n selects."""
        depth = len(self.blocks)
        n = range(depth - n, depth) if isinstance(n, (int, np.integer)) else n
        layers = [int(i) for i in n]
        if not layers or not set(layers) <= set(range(depth)):
            raise ValueError(f"n must be 1 to {depth} or some of the {depth} blocks: {layers}")
        return self.run_blocks(self.prepare_tokens_with_masks(x), layers)

    def run_blocks(self, x: Tensor, layers: Collection[int]) -> list[Tensor]:
        """Tokens (B, N, D) through the blocks: the tokens after each of these, in their order."""
        outputs = []
        for i, block in enumerate(list(self.blocks)[: max(layers) + 1]):
            x = self.run_block(block, x)
            if i in layers:
                outputs.append(x)
        return outputs

    def attention_maps(self, x: Tensor, layer: int | Sequence[int] = -1) -> Tensor | list[Tensor]:
        """Attention of CLS and registers to the patches: (B, A, 1 + R, h, w), float32.

        layer is the index of a block, or a list of indices, for a list of maps. The softmax is over
        all tokens; only these rows of the attention matrix are computed. Raises ValueError."""
        blocks: list = list(self.blocks)
        layers = [layer] if isinstance(layer, (int, np.integer)) else list(layer)
        if not layers or not all(-len(blocks) <= i < len(blocks) for i in layers):
            raise ValueError(f"layer must name some of the {len(blocks)} blocks: {layer}")
        layers = [i % len(blocks) for i in layers]
        # The blocks run as usual; before each of the chosen ones, its attention is computed.
        special, grid, maps = 1 + self.num_register_tokens, self.to_grid(*x.shape[-2:]), {}
        x = self.prepare_tokens_with_masks(x)
        for i, block in enumerate(blocks[: max(layers) + 1]):
            if i in layers:
                rows = block.attn.attention_rows(block.norm1(x), special)  # (B, A, 1 + R, N)
                maps[i] = rows[..., special:].unflatten(-1, grid)
            x = block(x) if i < max(layers) else x
        return [maps[i] for i in layers] if isinstance(layer, Collection) else maps[layers[0]]

    @torch.no_grad()
    def fix_image_size(self, H: int, W: int) -> None:
        """Resize the position embedding for good: passes of H x W pixels then do not resize it."""
        h, w = self.to_grid(H, W)
        patches = self.pos_embed.new_empty(1, 1 + h * w, 0)
        self.pos_embed.data = self.interpolate_pos_encoding(patches, H, W)
        self.pos_embed.grad = None  # it may have the old shape
        self.config.image_size = (h * self.config.patch_size, w * self.config.patch_size)


class LinearClassifier(nn.Module):
    """A linear layer on features, as the official `dinov2_*_lc`: (B, C, H, W) -> (B, num_classes).

    Its input is the CLS token of each of the last `layers` blocks (officially 1 or 4) and the mean
    patch token of the last, registers excluded; the final norm is applied to all. The rows of a
    list of batches are concatenated. `labels` are the class names, or None."""

    def __init__(self, backbone: DinoVisionTransformer, num_classes: int, layers: int = 1):
        super().__init__()
        depth = len(backbone.blocks)
        if num_classes < 1 or not 1 <= layers <= depth:
            raise ValueError(f"no classifier: {num_classes} classes, {layers} of {depth} layers")
        self.backbone = backbone
        self.layers = layers
        self.linear_head = nn.Linear((layers + 1) * backbone.embed_dim, num_classes)
        self.labels: list[str] | None = None
        nn.init.normal_(self.linear_head.weight, std=0.01)
        nn.init.zeros_(self.linear_head.bias)

    config = property(lambda self: self.backbone.config)
    transform = property(lambda self: self.backbone.transform)

    def forward(self, x: Images) -> Tensor:
        return self.linear_head(self.linear_input(x))

    def linear_input(self, x: Images) -> Tensor:
        """The input of the linear layer for images: (B, C, H, W) -> (B, (layers + 1) * D)."""
        if isinstance(x, (list, tuple)):
            return torch.cat([self.linear_input(batch) for batch in x])
        # Of each of the last blocks the CLS token, of the last one also the mean patch token.
        layers = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        last_patches, _ = layers[-1]  # (B, h * w, D)
        return torch.cat([*(cls for _, cls in layers), last_patches.mean(dim=1)], dim=1)


# Preprocessing ------------------------------------------------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BYTES = (bytes, bytearray, memoryview)  # of an image file
RESAMPLINGS = ("nearest", "bilinear", "bicubic", "lanczos")  # as PIL defines them
# EXIF orientations, and which `Image.Transpose` turns them upright.
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


@contextlib.contextmanager
def naming(subject) -> Iterator[None]:
    """Turn any exception but OSError into a ValueError of one line that begins with subject."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        problem = name + reason(error)
        if "weights_only" in str(error):  # PyTorch advises to let the code in the file run
            problem = "not a checkpoint"
            if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
                problem = f"contains a Python object ({found[1]}): re-save only the tensors"
        kind = OSError if "(os error " in problem else ValueError  # SafetensorError is for both
        raise kind(f"{subject}: {problem}") from None


def reason(error: Exception) -> str:
    """An exception in one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or repr(error)
    return text.partition("\n")[0]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How an image becomes the input of a model; by default, the official evaluation transform."""

    resize: int | tuple[int, int] = 256  # pixels: the short side, or (H, W)
    crop: tuple[int, int] | None = (224, 224)  # pixels: (H, W) of the center; None: everything
    resampling: str = "bicubic"  # one of RESAMPLINGS
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the channels, for pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        with naming(f"cannot transform images with {self}"):
            sides = zip(self.crop or (1, 1), pair(self.resize), strict=True)
            fits = all(type(x) is type(y) is int and 0 < x <= y <= 16384 for x, y in sides)
            mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device="cpu")
            finite = mean.shape == (3,) and (mean / std).isfinite().all() and std.isfinite().all()
            if not (fits and finite and std.min() > 0 and self.resampling in RESAMPLINGS):
                raise ValueError("sides must be 1 to 16384, crop within resize, std positive")

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the result, or None if it depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def at_size(self, size: int) -> "Transform":
        """The same transform for results of size x size pixels, which show the same part."""
        h, w = (x * size // y for x, y in zip(pair(self.resize), self.crop or pair(self.resize)))
        resize = max(h, w) if isinstance(self.resize, int) else (h, w)
        return dataclasses.replace(self, resize=resize, crop=self.crop and (size, size))


def preprocess(
    image, size=None, keep_aspect=False, patch_size=14, fast=False, normalized=True, transform=None
) -> Tensor:
    """A path, the bytes of a file, an open file or a PIL image -> (3, H, W), normalized, float32.

    transform is `model.transform` (default: `Transform()`); size changes the side of its result.
    With keep_aspect nothing is cropped: H and W are multiples of patch_size, close to the image's
    aspect ratio and the transform's area. With fast, large JPEG files are decoded at reduced size,
    slightly less exactly. Without normalized, the pixels stay uint8, for `normalize`. Raises
    OSError or ValueError for a broken image, TypeError for anything else."""
    if not isinstance(image, (str, os.PathLike, io.IOBase, Image.Image, *BYTES)):
        raise TypeError(f"not an image file: {type(image)}; Image.fromarray makes images of arrays")
    transform = transform or Transform()
    transform = transform if size is None else transform.at_size(size)
    with naming("cannot decode the image"):
        if not isinstance(image, Image.Image):
            image = open_image(image)
            if fast:
                image.draft("RGB", pair(transform.resize)[::-1])
        image = to_rgb(image)
    if max(image.size) > 100 * min(image.size):  # the resized one could be larger than memory
        raise ValueError(f"aspect ratio above 100:1 ({image.width} x {image.height} pixels)")
    if keep_aspect:
        area = math.prod(transform.size or pair(transform.resize))
        scale = math.sqrt(area) / math.sqrt(image.width * image.height) / patch_size
        width, height = (max(1, round(side * scale)) * patch_size for side in image.size)
    elif isinstance(transform.resize, int):
        width, height = (transform.resize * side // min(image.size) for side in image.size)
    else:
        height, width = transform.resize
    image = image.resize((width, height), Image.Resampling[transform.resampling.upper()])
    if transform.crop and not keep_aspect:
        H, W = transform.crop
        left, top = round((width - W) / 2), round((height - H) / 2)
        image = image.crop((left, top, left + W, top + H))
    # NumPy transposes: in a worker thread, PyTorch would start a team of OpenMP threads.
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, H, W), uint8
    return normalize(pixels, transform) if normalized else pixels


def normalize(pixels: Tensor, transform: Transform = Transform()) -> Tensor:
    """Pixels (..., 3, H, W), uint8 -> float32, by the transform's mean and standard deviation."""
    statistics = torch.tensor([transform.mean, transform.std], dtype=torch.float32)
    mean, std = statistics.to(pixels.device)[..., None, None]  # each (3, 1, 1)
    return (pixels.float() / 255).sub_(mean).div_(std)


def open_image(source) -> Image.Image:
    """The PIL image of a path, of the bytes of a file or of an open file."""
    if isinstance(source, BYTES):
        source = io.BytesIO(source)
    elif not isinstance(source, io.IOBase) and not os.path.isfile(source):  # a pipe could block
        raise FileNotFoundError("no such image file, nor folder with images (download URLs first)")
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        with (
            contextlib.nullcontext(source)
            if hasattr(source, "seek")
            else open(source, "rb") as file
        ):
            file.seek(0)
            if file.read(12)[4:8] != b"ftyp":  # of HEIC and AVIF
                raise
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("a HEIC or AVIF image: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        return Image.open(source)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: upright, on white where it is transparent."""
    color, tiles = image.info.get("transparency"), str(getattr(image, "tile", ""))
    image.load()  # raises what the decoder raises, and turns TIFF files upright
    original, tags = image, getattr(image, "tag_v2", {})  # of a TIFF file
    # Pillow converts PNG files of 16 bits to 8 bits, but not their transparent color.
    if isinstance(color, tuple) and (";16" in tiles or max(color) > 255):
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = tuple(x >> 8 for x in color)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = gray_to_8_bits(image)
    elif tags.get(284) == 2 and np.max(tags.get(258, 8)) > 8:  # PlanarConfiguration, BitsPerSample
        raise ValueError("a TIFF file of separate 16-bit planes, which Pillow misreads")
    with contextlib.suppress(Exception):  # no orientation, or unreadable metadata
        turn = TURNS[original.getexif()[ExifTags.Base.Orientation]]
        image = image.transpose(Image.Transpose(turn))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def gray_to_8_bits(image: Image.Image) -> Image.Image:
    """A gray image of more than 8 bits as 8 bits, by the white level that its file states."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file: BitsPerSample is 258, MaxSampleValue 281
    known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM", "JPEG2000")
    bits = np.max(tags.get(258, 16 if known else 32)) - (2 in np.atleast_1d(tags.get(339, 1)))
    if 281 not in tags and (bits > 16 or image.mode == "F"):
        raise ValueError("32-bit gray levels, and the file does not state which is white")
    gray, white = np.asarray(image), max(np.max(tags.get(281, 2**bits - 1)), 1)
    level = gray.clip(0, white) * (255 / white)
    level = 255 - level if tags.get(262) == 0 else level  # WhiteIsZero
    level[gray == image.info.get("transparency", -1)] = 255
    return Image.fromarray(level.round().astype(np.uint8))


# Weights ------------------------------------------------------------------------------------------

HUB_URL = "https://dl.fbaipublicfiles.com/dinov2"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(name_or_path, layers: int = 4, device="cpu", dtype=torch.float32, mmap: bool = False):
    """A trained `DinoVisionTransformer` or `LinearClassifier`, in eval mode.

    A name is that of an official model, with or without "dinov2_" in front: one of `CONFIGS`, or,
    with "_lc" at the end, its ImageNet-1k classifier, whose head uses 1 or 4 layers; what is not in
    torch.hub's cache is downloaded. A path is a file of `save`, or a .pth with the official names.
    dtype None keeps that of the file. With mmap the file is mapped, not copied: it must not change
    while the model is used. Raises OSError or ValueError."""
    name = str(name_or_path).removeprefix("dinov2_")
    arch = name.removesuffix("_lc")
    if arch not in CONFIGS:
        with naming(name_or_path):
            tensors, metadata = read_tensors(name_or_path, mmap)
            config, transform, labels = read_metadata(metadata)
            model = from_state_dict(tensors, config, labels, transform)
        return model.to(device, dtype)
    if layers not in (1, 4):
        raise ValueError(f"layers must be 1 or 4 for an official classifier, got {layers}")
    stem = f"{HUB_URL}/dinov2_{arch.removesuffix('_reg')}/dinov2_{arch.replace('_reg', '_reg4')}"
    head = f"{stem}_linear{'4' if layers == 4 else ''}_head.pth"
    urls, prefixes, labels, tensors = [f"{stem}_pretrain.pth"], [""], None, {}
    if name != arch:
        urls, prefixes, labels = [*urls, head], ["backbone.", "linear_head."], IMAGENET_CLASSES
    for path, prefix in zip(download(urls), prefixes):
        with naming(f"{path} (delete it to download it again)"):
            tensors |= {prefix + key: x for key, x in read_tensors(path, mmap)[0].items()}
    with naming(f"{', '.join(urls)} as downloaded"):
        return from_state_dict(tensors, CONFIGS[arch], labels).to(device, dtype)


def download(urls: list[str]) -> list[Path]:
    """The files in torch.hub's cache, each downloaded unless it is there: whole, or not at all.
    Checksums are verified after a download, not when a file is loaded from the cache."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    paths = [folder / url.rpartition("/")[2] for url in urls]
    for url, path in [x for x in zip(urls, paths) if not x[1].exists()]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic(path) as part:
                print(f"downloading {url}", file=sys.stderr)
                torch.hub.download_url_to_file(url, str(part))
                # A checkpoint is a zip file, whose directory comes last, with checksums.
                if not zipfile.is_zipfile(part) or zipfile.ZipFile(part).testzip():
                    raise OSError("the response is not a complete checkpoint")
        except Exception as error:
            advice = f"put {' and '.join(urls)} into {folder}, or pass the path of a checkpoint"
            raise OSError(f"cannot download {url}: {error}; {advice}") from None
    return paths


def read_tensors(path: str | os.PathLike, mmap: bool = False) -> tuple[dict, dict[str, str]]:
    """The tensors and metadata of a .safetensors or .pth file, which its contents tell apart."""
    if not os.path.isfile(path):
        installed = shutil.which("dinoreg-convert")
        hint = "; dinoreg-convert reads repositories of Hugging Face" if installed else ""
        names = f"{', '.join(CONFIGS)} (or + _lc)"
        raise FileNotFoundError(f"{path}: no such file, nor one of {names}{hint}")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: 8 bytes with the length of the header, then its JSON
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            owned = tensors if mmap else {key: x.clone() for key, x in tensors.items()}
            return owned, file.metadata() or {}
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
        raise ValueError("compressed, which torch.save never does: it could unpack to any size")
    mmap = mmap and is_zip and Path(path).suffix != ".safetensors"
    with open(path, "rb") as file:  # of a path, torch.load considers that suffix
        source = path if mmap else file
        return dict(torch.load(source, "cpu", weights_only=True, mmap=mmap)), {}


def read_metadata(metadata: dict[str, str]) -> tuple[Config | None, Transform, list[str] | None]:
    """The config, transform and labels that `write_metadata` wrote; None or defaults if absent."""
    keys = ("config", "transform", "labels")
    config, transform, labels = (json.loads(metadata.get(key, "{}")) for key in keys)
    for fields in (config, transform):  # JSON has lists in place of tuples
        fields |= {key: tuple(x) for key, x in fields.items() if isinstance(x, list)}
    return Config(**config) if config else None, Transform(**transform), labels or None


def write_metadata(config: Config, transform: Transform, labels) -> dict[str, str]:
    values = dict(config=config.to_dict(), transform=dataclasses.asdict(transform), labels=labels)
    return {"format": "pt"} | {key: json.dumps(value) for key, value in values.items()}


def from_state_dict(tensors, config: Config | None = None, labels=None, transform=Transform()):
    """A `DinoVisionTransformer` or `LinearClassifier` in eval mode from a state dict with the
    official names. Its parameters are these tensors, not copies. Of the config, only what their
    shapes do not determine is used. Raises a ValueError that names the first wrong tensor."""
    config = infer_config({key.removeprefix("backbone."): x for key, x in tensors.items()}, config)
    with NoMemory():
        model: Any = DinoVisionTransformer(config)
        model.transform, count = transform, 0
        if "linear_head.weight" in tensors:
            count, width = tensors["linear_head.weight"].shape
            model = LinearClassifier(model, count, layers=width // config.embed_dim - 1)
            model.labels = list(labels) if labels else None
    valid = isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels)
    if labels and not (valid and len(labels) == count):
        raise ValueError(f"expected labels of {count} classes, got {labels!s:.60}")
    expected = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    for key in expected | tensors:
        if key not in tensors:
            raise ValueError(f"{key} is missing; expected {expected[key]}")
        x, shape = tensors[key], expected.get(key, "no such tensor")
        if x.shape != shape or not is_plain(x):
            kind = "" if is_plain(x) else f", {x.dtype}, {x.layout}, {x.device}, {type(x)}"
            raise ValueError(f"{key} is {tuple(x.shape)}{kind}; expected {shape}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def is_plain(x) -> bool:
    """Whether x is a dense tensor of floats, of which each has a place in memory."""
    dense = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta
    return dense and x.dtype in FLOATS and x.nbytes <= x.untyped_storage().nbytes()


class NoMemory(torch.overrides.TorchFunctionMode):
    """Create modules whose parameters have no memory yet. `torch.device("meta")` does so, too, but
    its random initialization takes 1.4 s of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def infer_config(tensors, config: Config | None = None, num_heads=None) -> Config:
    """The config of a backbone from its state dict with the official names. What the shapes do not
    determine comes from config. Without one, models of an official width get the official number of
    heads; other widths need num_heads. Raises a ValueError for other names."""
    try:
        D, C, P, _ = tensors["patch_embed.proj.weight"].shape
        patches = tensors["pos_embed"].shape[1] - 1
        ffn = "swiglu" if "blocks.0.mlp.w3.weight" in tensors else "mlp"
        hidden = tensors[f"blocks.0.mlp.{'fc2' if ffn == 'mlp' else 'w3'}.weight"].shape[1]
        R = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    except KeyError as error:
        raise ValueError(f"not a DINOv2 state dict: {error} is missing") from None
    depth = len([key for key in tensors if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)])
    found = dict(embed_dim=D, depth=depth, ffn=ffn, patch_size=P, in_chans=C, num_register_tokens=R)
    if config is None:
        config = CONFIGS["vits14_reg" if R else "vits14"]
        known = {x.embed_dim: x.num_heads for x in CONFIGS.values()}
        if not (num_heads or D in known):
            raise ValueError(f"cannot infer the number of heads from width {D}: give num_heads")
        found["num_heads"] = num_heads or known[D]
    config = Config(**config.to_dict() | found)
    if math.prod(config.grid) != patches:  # only a config knows a grid that is not square
        config.image_size = math.isqrt(max(patches, 0)) * P
    exact = hidden / D * (1 if ffn == "mlp" else 1.5)
    for mlp_ratio in (exact, exact + 0.5 / D):  # the second for a width that rounding would lose
        config.mlp_ratio = config.mlp_ratio if config.hidden_dim == hidden else mlp_ratio
    return config


def save(model: nn.Module, path: str | os.PathLike, labels: Sequence[str] | None = None) -> None:
    """Write a model to a .safetensors file that `load` reads: tensors, config, transform, labels
    (a classifier's class names; default: its own). Wrappers (torch.compile, DataParallel,
    AveragedModel) are removed. Raises a ValueError, and writes nothing, if the file would not be
    the same model: for LoRA, pruning, other layers or strides. Hooks are not saved."""
    saved = rebuild(model, labels)
    metadata = write_metadata(saved.config, saved.transform, getattr(saved, "labels", None))
    write_tensors(saved.state_dict(), path, metadata)


def rebuild(model, labels: Sequence[str] | None = None):
    """The model within its wrappers, made anew from its tensors. Raises as `save` does."""
    while isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = getattr(model, "_orig_mod", None) or model.module
    if not isinstance(model, (DinoVisionTransformer, LinearClassifier)):
        raise ValueError(f"cannot save a {type(model).__name__}, only the models of this file")
    tensors = {key.replace("_orig_mod.", ""): x for key, x in model.state_dict().items()}
    config, backbone = model.config.to_dict(), getattr(model, "backbone", model)
    config |= {x: getattr(backbone, x) for x in ("interpolate_antialias", "interpolate_offset")}
    with naming("cannot save this model as it is"):
        labels = labels or getattr(model, "labels", None)
        rebuilt = from_state_dict(tensors, Config(**config), labels, model.transform)
        parts = [x for x in model.named_modules() if not hasattr(x[1], "_orig_mod")]
        for (name, part), (_, other) in zip(parts, rebuilt.named_modules()):
            found, expected = (f"{type(x).__name__}({x.extra_repr()})" for x in (part, other))
            if found != expected or type(part) is not type(other):
                raise ValueError(f"{name} is {found}; a file could only hold {expected}")
    return rebuilt


def write_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]):
    """Write a .safetensors file atomically. Raises OSError, or ValueError for shared tensors."""
    with naming(path), atomic(path) as part:
        save_file({key: x.contiguous() for key, x in tensors.items()}, part, metadata)


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside the file `path` that takes its place and mode if nothing is raised.
    Those of killed processes are removed after a day. Raises OSError for a device or a pipe."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path}: not a regular file")
    for old in path.parent.glob(".dinoreg-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=".dinoreg-", dir=path.parent) as folder:
        part, new = Path(folder, path.name), Path(folder, ".new")
        yield part
        if part.is_file():
            new.touch()  # with the mode of new files, which part may lack
            shutil.copymode(path if path.is_file() else new, part)
        os.replace(part, path)


# Command line -------------------------------------------------------------------------------------


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Paths with each folder replaced by the images below it, sorted; hidden files are left out."""
    files: list[Path] = []
    for path in map(Path, paths):
        found, seen = [], set()
        for folder, folders, names in os.walk(path, followlinks=True):
            here = os.path.realpath(folder)
            folders[:] = [x for x in folders if here not in seen and not x.startswith(".")]
            found += [Path(folder, x) for x in names if here not in seen and is_image_name(x)]
            seen.add(here)  # for loops of links
        files += sorted(found) or [path]
    return files


def is_image_name(name: str) -> bool:
    """Whether a file is not hidden and has a suffix that Pillow reads, or one of HEIC or AVIF."""
    suffix = os.path.splitext(name)[1].lower()
    kind = Image.registered_extensions().get(suffix, "")
    # Pillow identifies four kinds that it cannot read; the plug-in of JPEG opens MPO.
    readable = kind in {*Image.OPEN, "MPO"} - {"BUFR", "GRIB", "HDF5", "MPEG"}
    return not name.startswith(".") and (readable or suffix in (".heic", ".heif", ".hif", ".avif"))


@torch.inference_mode()
def classify(model, paths: Sequence, size=None, keep_aspect=False, fast=False, batch_size=8):
    """Class probabilities (num_classes,), float32, of each image file in order, or the exception
    that it raised. For size, keep_aspect and fast see `preprocess`."""
    transform, weight = model.transform, model.linear_head.weight
    options = (size, keep_aspect, model.backbone.patch_size, fast, False, transform)
    ahead: list[Future] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths) + batch_size, batch_size):
            images = [read.exception() or read.result() for read in ahead]
            # Threads read the next batch while the model computes this one.
            batch = paths[start : start + batch_size]
            ahead = [pool.submit(preprocess, path, *options) for path in batch]
            pixels = [image for image in images if isinstance(image, Tensor)]
            same = len({x.shape for x in pixels}) == 1
            batches = [torch.stack(pixels)] if same else [x[None] for x in pixels]
            batches = [normalize(x.to(weight.device), transform) for x in batches]
            logits = iter(model(batches).float().cpu() if batches else ())
            for image in images:
                if isinstance(image, Exception):
                    yield image
                elif (row := next(logits)).isfinite().all():
                    yield row.softmax(dim=-1)
                else:
                    yield ValueError(f"the model returns NaN or infinity (in {weight.dtype})")


def describe(path: Path, result: Tensor | Exception, labels: Sequence, top: int) -> dict:
    """The JSON record of one image: its most probable classes, or the error."""
    if isinstance(result, Exception):
        return {"image": str(path), "error": reason(result)}
    best = zip(*(x.tolist() for x in result.topk(min(top, len(result)))))
    predictions = [{"index": i, "label": str(labels[i]), "probability": p} for p, i in best]
    return {"image": str(path), "predictions": predictions}


def print_record(record: dict, width: int) -> None:
    """Print a record as text, with file names in a column of this width; errors as `complain`."""
    name = printable(record["image"])
    if "error" in record:
        complain(f"{name}: {record['error']}")
    for x in record.get("predictions", ()):
        print(f"{name:{width}}  {x['probability']:6.1%}  {printable(x['label'])}", flush=True)
        name = ""


def complain(text: str, program: str = "dinoreg") -> None:
    """Print one line to standard error, which may be closed or full."""
    try:
        print(f"{program}: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (exiting would fail to flush the other)


def printable(text: str) -> str:
    """Text on one line, with escapes for characters that standard output cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", module="PIL")  # these messages do not name the file
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(Exception):  # keep freed memory: glibc would return each layer's
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX; old releases have no large M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

    dtype = best_dtype(args.device) if args.fast else torch.float32
    dtype = getattr(torch, args.dtype) if args.dtype else dtype
    backbone = args.model.removeprefix("dinov2_") in CONFIGS  # fail before a download
    model = None if backbone else load(args.model, args.layers, args.device, dtype, mmap=True)
    if not isinstance(model, LinearClassifier) or model.linear_head.out_features == 1:
        raise ValueError(f"{args.model} has no classifier of 2+ classes; official ones end in _lc")
    size = (args.size, args.size) if args.size else model.transform.size
    if size and not args.keep_aspect:
        model.backbone.fix_image_size(*size)

    paths = find_images(args.images)
    labels = model.labels or range(model.linear_head.out_features)
    width = max(len(printable(str(path))) for path in paths)
    progress = sys.stderr.isatty() and len(paths) > args.batch_size
    results = classify(model, paths, args.size, args.keep_aspect, args.fast, args.batch_size)
    failed, start = False, time.perf_counter()
    for done, result in enumerate(results, 1):
        record = describe(paths[done - 1], result, labels, args.top)
        failed |= "error" in record
        if progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(json.dumps(record), flush=True) if args.json else print_record(record, width)
        if progress:
            speed = f"{done}/{len(paths)}, {done / (time.perf_counter() - start):.1f} images/s"
            print(speed, end="" if done < len(paths) else "\n", file=sys.stderr, flush=True)
    return int(failed)


def best_device() -> str:
    """The type of the best device available: "cuda", "mps" or "cpu"."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if torch.cuda.is_available() else mps


def best_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the processor reports support for it, else float32."""
    cuda, info = str(device).startswith("cuda"), Path("/proc/cpuinfo")
    flags = info.read_text() if str(device) == "cpu" and info.exists() else ""
    stated = re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", flags)  # of x86; of Arm
    stated = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else stated
    return torch.bfloat16 if stated else torch.float32


def guard(program: str, function, *args) -> int:
    """Exit status of a program: what function(*args) returns, 130 if it was interrupted, else 2 and
    one line about the error, or its traceback if DINOREG_TRACEBACK is set."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (if it is closed)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        status = function(*args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        try:
            sys.stdout.flush()
        except OSError:  # closed, as in `dinoreg ... | head`, or full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        if os.environ.get("DINOREG_TRACEBACK"):
            raise
        known = isinstance(error, OSError | ValueError)  # of a file, the network or an option
        hint = "" if known else " (DINOREG_TRACEBACK=1 shows where)"
        complain((str(error).partition("\n")[0] or repr(error)) + hint, program)
        return 2


MODELS = """\
official models           parameters   download
vits14_reg, vits14              22 M      88 MB
vitb14_reg, vitb14              87 M     346 MB
vitl14_reg, vitl14             304 M     1.2 GB
vitg14_reg, vitg14           1,137 M     4.5 GB
with _lc, as in vits14_reg_lc: the same with a head for ImageNet-1k, 3 to 31 MB more"""


def main(argv: list[str] | None = None) -> int:
    """Classify images. Returns 0; 1 if some of them failed; 2 if the run could not start."""
    parser = argparse.ArgumentParser("dinoreg", description="Classify images with DINOv2.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # for the lines of MODELS
    parser.epilog = "example: python -m dinoreg photo.jpg holidays/ --model vitb14_reg_lc --top 3"
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add("--model", "--weights", default="vits14_reg_lc", help="name or file (default: %(default)s)")
    add("--layers", type=int, choices=(1, 4), default=4, help="of an official model (default: 4)")
    add("--top", type=int, default=5, metavar="K", help="classes to print (default: 5)")
    add("--size", type=int, metavar="PIXELS", help="side of the crop (default: the model's)")
    add("--keep-aspect", action="store_true", help="resize the whole image; crop nothing")
    add("--fast", action="store_true", help="reduced-size JPEG decoding; bfloat16 where supported")
    add("--device", default=best_device(), help="cpu, cuda, mps, ... (default here: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--batch-size", type=int, default=8, metavar="B", help="images a pass (default: 8)")
    add("--json", action="store_true", help="print one JSON object per line, for each image")
    add("--models", action="version", version=MODELS, help="list the official models and exit")
    add("--version", action="version", version=f"dinoreg {__version__}")
    args = parser.parse_args(argv)
    if min(args.top, args.batch_size, 1 if args.size is None else args.size) < 1:
        parser.error("--top, --size and --batch-size must be at least 1")
    return guard("dinoreg", run, args)


# The classes of ImageNet-1k, in the order of the logits -------------------------------------------

IMAGENET_CLASSES = (
    """
tench, goldfish, great white shark, tiger shark, hammerhead, electric ray, stingray, rooster, hen,
ostrich, brambling, goldfinch, house finch, junco, indigo bunting, robin, bulbul, jay, magpie,
chickadee, water ouzel, kite (bird), bald eagle, vulture, great grey owl, European fire salamander,
common newt, eft, spotted salamander, axolotl, bullfrog, tree frog, tailed frog, loggerhead,
leatherback turtle, mud turtle, terrapin, box turtle, banded gecko, common iguana, American
chameleon, whiptail, agama, frilled lizard, alligator lizard, Gila monster, green lizard, African
chameleon, Komodo dragon, African crocodile, American alligator, triceratops, thunder snake,
ringneck snake, hognose snake, green snake, king snake, garter snake, water snake, vine snake, night
snake, boa constrictor, rock python, Indian cobra, green mamba, sea snake, horned viper,
diamondback, sidewinder, trilobite, harvestman, scorpion, black and gold garden spider, barn spider,
garden spider, black widow, tarantula, wolf spider, tick, centipede, black grouse, ptarmigan, ruffed
grouse, prairie chicken, peacock, quail, partridge, African grey, macaw, sulphur-crested cockatoo,
lorikeet, coucal, bee eater, hornbill, hummingbird, jacamar, toucan, drake, red-breasted merganser,
goose, black swan, tusker, echidna, platypus, wallaby, koala, wombat, jellyfish, sea anemone, brain
coral, flatworm, nematode, conch, snail, slug, sea slug, chiton, chambered nautilus, Dungeness crab,
rock crab, fiddler crab, king crab, American lobster, spiny lobster, crayfish, hermit crab, isopod,
white stork, black stork, spoonbill, flamingo, little blue heron, American egret, bittern, crane
(bird), limpkin, European gallinule, American coot, bustard, ruddy turnstone, red-backed sandpiper,
redshank, dowitcher, oystercatcher, pelican, king penguin, albatross, grey whale, killer whale,
dugong, sea lion, Chihuahua, Japanese spaniel, Maltese dog, Pekinese, Shih-Tzu, Blenheim spaniel,
papillon, toy terrier, Rhodesian ridgeback, Afghan hound, basset, beagle, bloodhound, bluetick,
black-and-tan coonhound, Walker hound, English foxhound, redbone, borzoi, Irish wolfhound, Italian
greyhound, whippet, Ibizan hound, Norwegian elkhound, otterhound, Saluki, Scottish deerhound,
Weimaraner, Staffordshire bullterrier, American Staffordshire terrier, Bedlington terrier, Border
terrier, Kerry blue terrier, Irish terrier, Norfolk terrier, Norwich terrier, Yorkshire terrier,
wire-haired fox terrier, Lakeland terrier, Sealyham terrier, Airedale, cairn, Australian terrier,
Dandie Dinmont, Boston bull, miniature schnauzer, giant schnauzer, standard schnauzer, Scotch
terrier, Tibetan terrier, silky terrier, soft-coated wheaten terrier, West Highland white terrier,
Lhasa, flat-coated retriever, curly-coated retriever, golden retriever, Labrador retriever,
Chesapeake Bay retriever, German short-haired pointer, vizsla, English setter, Irish setter, Gordon
setter, Brittany spaniel, clumber, English springer, Welsh springer spaniel, cocker spaniel, Sussex
spaniel, Irish water spaniel, kuvasz, schipperke, groenendael, malinois, briard, kelpie, komondor,
Old English sheepdog, Shetland sheepdog, collie, Border collie, Bouvier des Flandres, Rottweiler,
German shepherd, Doberman, miniature pinscher, Greater Swiss Mountain dog, Bernese mountain dog,
Appenzeller, EntleBucher, boxer, bull mastiff, Tibetan mastiff, French bulldog, Great Dane, Saint
Bernard, Eskimo dog, malamute, Siberian husky, dalmatian, affenpinscher, basenji, pug, Leonberg,
Newfoundland, Great Pyrenees, Samoyed, Pomeranian, chow, keeshond, Brabancon griffon, Pembroke Welsh
corgi, Cardigan Welsh corgi, toy poodle, miniature poodle, standard poodle, Mexican hairless, timber
wolf, white wolf, red wolf, coyote, dingo, dhole, African hunting dog, hyena, red fox, kit fox,
Arctic fox, grey fox, tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat, cougar, lynx,
leopard, snow leopard, jaguar, lion, tiger, cheetah, brown bear, American black bear, ice bear,
sloth bear, mongoose, meerkat, tiger beetle, ladybug, ground beetle, long-horned beetle, leaf
beetle, dung beetle, rhinoceros beetle, weevil, fly, bee, ant, grasshopper, cricket, walking stick,
cockroach, mantis, cicada, leafhopper, lacewing, dragonfly, damselfly, admiral, ringlet, monarch,
cabbage butterfly, sulphur butterfly, lycaenid, starfish, sea urchin, sea cucumber, wood rabbit,
hare, Angora, hamster, porcupine, fox squirrel, marmot, beaver, guinea pig, sorrel, zebra, hog, wild
boar, warthog, hippopotamus, ox, water buffalo, bison, ram, bighorn, ibex, hartebeest, impala,
gazelle, Arabian camel, llama, weasel, mink, polecat, black-footed ferret, otter, skunk, badger,
armadillo, three-toed sloth, orangutan, gorilla, chimpanzee, gibbon, siamang, guenon, patas, baboon,
macaque, langur, colobus, proboscis monkey, marmoset, capuchin, howler monkey, titi, spider monkey,
squirrel monkey, Madagascar cat, indri, Indian elephant, African elephant, lesser panda, giant
panda, barracouta, eel, coho, rock beauty, anemone fish, sturgeon, gar, lionfish, puffer, abacus,
abaya, academic gown, accordion, acoustic guitar, aircraft carrier, airliner, airship, altar,
ambulance, amphibian, analog clock, apiary, apron, ashcan, assault rifle, backpack, bakery, balance
beam, balloon, ballpoint, Band Aid, banjo, bannister, barbell, barber chair, barbershop, barn,
barometer, barrel, barrow, baseball, basketball, bassinet, bassoon, bathing cap, bath towel,
bathtub, beach wagon, beacon, beaker, bearskin, beer bottle, beer glass, bell cote, bib,
bicycle-built-for-two, bikini, binder, binoculars, birdhouse, boathouse, bobsled, bolo tie, bonnet,
bookcase, bookshop, bottlecap, bow, bow tie, brass, brassiere, breakwater, breastplate, broom,
bucket, buckle, bulletproof vest, bullet train, butcher shop, cab, caldron, candle, cannon, canoe,
can opener, cardigan, car mirror, carousel, carpenter's kit, carton, car wheel, cash machine,
cassette, cassette player, castle, catamaran, CD player, cello, cellular telephone, chain, chainlink
fence, chain mail, chain saw, chest, chiffonier, chime, china cabinet, Christmas stocking, church,
cinema, cleaver, cliff dwelling, cloak, clog, cocktail shaker, coffee mug, coffeepot, coil,
combination lock, computer keyboard, confectionery, container ship, convertible, corkscrew, cornet,
cowboy boot, cowboy hat, cradle, crane (machine), crash helmet, crate, crib, Crock Pot, croquet
ball, crutch, cuirass, dam, desk, desktop computer, dial telephone, diaper, digital clock, digital
watch, dining table, dishrag, dishwasher, disk brake, dock, dogsled, dome, doormat, drilling
platform, drum, drumstick, dumbbell, Dutch oven, electric fan, electric guitar, electric locomotive,
entertainment center, envelope, espresso maker, face powder, feather boa, file, fireboat, fire
engine, fire screen, flagpole, flute, folding chair, football helmet, forklift, fountain, fountain
pen, four-poster, freight car, French horn, frying pan, fur coat, garbage truck, gasmask, gas pump,
goblet, go-kart, golf ball, golfcart, gondola, gong, gown, grand piano, greenhouse, grille, grocery
store, guillotine, hair slide, hair spray, half track, hammer, hamper, hand blower, hand-held
computer, handkerchief, hard disc, harmonica, harp, harvester, hatchet, holster, home theater,
honeycomb, hook, hoopskirt, horizontal bar, horse cart, hourglass, iPod, iron, jack-o'-lantern,
jeans, jeep, jersey, jigsaw puzzle, jinrikisha, joystick, kimono, knee pad, knot, lab coat, ladle,
lampshade, laptop, lawn mower, lens cap, letter opener, library, lifeboat, lighter, limousine,
liner, lipstick, Loafer, lotion, loudspeaker, loupe, lumbermill, magnetic compass, mailbag, mailbox,
maillot, tank suit, manhole cover, maraca, marimba, mask, matchstick, maypole, maze, measuring cup,
medicine chest, megalith, microphone, microwave, military uniform, milk can, minibus, miniskirt,
minivan, missile, mitten, mixing bowl, mobile home, Model T, modem, monastery, monitor, moped,
mortar, mortarboard, mosque, mosquito net, motor scooter, mountain bike, mountain tent, computer
mouse, mousetrap, moving van, muzzle, nail, neck brace, necklace, nipple, notebook, obelisk, oboe,
ocarina, odometer, oil filter, organ, oscilloscope, overskirt, oxcart, oxygen mask, packet, paddle,
paddlewheel, padlock, paintbrush, pajama, palace, panpipe, paper towel, parachute, parallel bars,
park bench, parking meter, passenger car, patio, pay-phone, pedestal, pencil box, pencil sharpener,
perfume, Petri dish, photocopier, pick, pickelhaube, picket fence, pickup, pier, piggy bank, pill
bottle, pillow, ping-pong ball, pinwheel, pirate, pitcher, hand plane, planetarium, plastic bag,
plate rack, plow, plunger, Polaroid camera, pole, police van, poncho, pool table, pop bottle,
flowerpot, potter's wheel, power drill, prayer rug, printer, prison, projectile, projector, puck,
punching bag, purse, quill, quilt, racer, racket, radiator, radio, radio telescope, rain barrel,
recreational vehicle, reel, reflex camera, refrigerator, remote control, restaurant, revolver,
rifle, rocking chair, rotisserie, rubber eraser, rugby ball, rule, running shoe, safe, safety pin,
saltshaker, sandal, sarong, saxophone, scabbard, scale, school bus, schooner, scoreboard, screen,
screw, screwdriver, seat belt, sewing machine, shield, shoe shop, shoji, shopping basket, shopping
cart, shovel, shower cap, shower curtain, ski, ski mask, sleeping bag, slide rule, sliding door,
slot, snorkel, snowmobile, snowplow, soap dispenser, soccer ball, sock, solar dish, sombrero, soup
bowl, space bar, space heater, space shuttle, spatula, speedboat, spider web, spindle, sports car,
spotlight, stage, steam locomotive, steel arch bridge, steel drum, stethoscope, stole, stone wall,
stopwatch, stove, strainer, streetcar, stretcher, studio couch, stupa, submarine, suit, sundial,
sunglass, sunglasses, sunscreen, suspension bridge, swab, sweatshirt, swimming trunks, swing,
switch, syringe, table lamp, tank, tape player, teapot, teddy, television, tennis ball, thatch,
theater curtain, thimble, thresher, throne, tile roof, toaster, tobacco shop, toilet seat, torch,
totem pole, tow truck, toyshop, tractor, trailer truck, tray, trench coat, tricycle, trimaran,
tripod, triumphal arch, trolleybus, trombone, tub, turnstile, typewriter keyboard, umbrella,
unicycle, upright, vacuum, vase, vault, velvet, vending machine, vestment, viaduct, violin,
volleyball, waffle iron, wall clock, wallet, wardrobe, warplane, washbasin, washer, water bottle,
water jug, water tower, whiskey jug, whistle, wig, window screen, window shade, Windsor tie, wine
bottle, wing, wok, wooden spoon, wool, worm fence, wreck, yawl, yurt, web site, comic book,
crossword puzzle, street sign, traffic light, book jacket, menu, plate, guacamole, consomme, hot
pot, trifle, ice cream, ice lolly, French loaf, bagel, pretzel, cheeseburger, hotdog, mashed potato,
head cabbage, broccoli, cauliflower, zucchini, spaghetti squash, acorn squash, butternut squash,
cucumber, artichoke, bell pepper, cardoon, mushroom, Granny Smith, strawberry, orange, lemon, fig,
pineapple, banana, jackfruit, custard apple, pomegranate, hay, carbonara, chocolate sauce, dough,
meat loaf, pizza, potpie, burrito, red wine, espresso, cup, eggnog, alp, bubble, cliff, coral reef,
geyser, lakeside, promontory, sandbar, seashore, valley, volcano, ballplayer, groom, scuba diver,
rapeseed, daisy, yellow lady's slipper, corn, acorn, rose hip, buckeye, coral fungus, agaric,
gyromitra, stinkhorn, earthstar, hen-of-the-woods, bolete, ear of corn, toilet tissue
""".replace("\n", " ")
    .strip()
    .split(", ")
)


if __name__ == "__main__":
    sys.exit(main())
