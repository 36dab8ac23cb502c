# SPDX-License-Identifier: Apache-2.0
"""DINOv2 with registers in one file of PyTorch: the model, its weights, its images and a command
line.

    model = dinoreg.load("vits14_reg")                  # official weights, downloaded once
    image = dinoreg.preprocess("photo.jpg")             # (3, 224, 224)
    features = model.forward_features(image[None])      # x_norm_clstoken, x_norm_patchtokens, ...

    $ python -m dinoreg photo.jpg                       # what is in this picture?

The model is lines 69 to 488, to be read from top to bottom; images, weights and the command line
follow it. It needs Python 3.10 and torch 2.4 or newer, numpy, pillow and safetensors. Licence:
Apache-2.0.

Sources:
  - Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision",
    https://arxiv.org/abs/2304.07193
  - Darcet et al., "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588
  - the official code, https://github.com/facebookresearch/dinov2: parameters and methods have its
    names, so that its checkpoints load as they are and code written for its models runs unchanged.

The letters of the shapes, used everywhere below:
    B       images in the batch
    C       channels of an image (3)
    H, W    height and width of an image, in pixels
    h, w    height and width of its grid of patches: H / patch_size, W / patch_size
    R       register tokens (4, or 0)
    N       tokens of an image: 1 CLS + R registers + h * w patches, in this order
    D       width of a token (embed_dim)
    A       attention heads, each D / A wide
"""

import argparse
import contextlib
import ctypes
import dataclasses
import http.client
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__version__ = "0.2.0"

# --------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """The architecture of a model. The defaults are the official ViT-S/14 with registers."""

    embed_dim: int = 384  # D
    depth: int = 12  # transformer blocks
    num_heads: int = 6  # A
    mlp_ratio: float = 4.0  # hidden width of the feed-forward layer, in units of D
    ffn: str = "mlp"  # "mlp" or "swiglu"
    patch_size: int = 14  # pixels
    image_size: int | tuple[int, int] = (
        518  # pixels: side, or (H, W), that the position embedding is stored for
    )
    in_chans: int = 3  # C
    num_register_tokens: int = 4  # R
    layerscale_init: float = 1.0  # as the official models are built; their training began at 1e-5
    drop_path_rate: float = (
        0.0  # stochastic depth: rate of the last block; it rises linearly from 0 in the first
    )
    drop_path_uniform: bool = False  # the same rate in all blocks, as in the official training
    interpolate_antialias: bool = (
        True  # of the position embedding, when it is resized to another grid
    )
    interpolate_offset: float = (
        0.0  # added to that grid's sides before the scale factor is computed
    )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the position embedding."""
        H, W = (
            self.image_size
            if isinstance(self.image_size, tuple)
            else (self.image_size, self.image_size)
        )
        return H // self.patch_size, W // self.patch_size

    @property
    def hidden_dim(self) -> int:
        """Hidden width. SwiGLU has three matrices where the MLP has two: at 2/3 of the width, as
        many parameters.
        """
        hidden = int(self.embed_dim * self.mlp_ratio)
        return hidden if self.ffn == "mlp" else (hidden * 2 // 3 + 7) // 8 * 8


CONFIGS = {
    "vits14_reg": Config(embed_dim=384, depth=12, num_heads=6),
    "vitb14_reg": Config(embed_dim=768, depth=12, num_heads=12),
    "vitl14_reg": Config(embed_dim=1024, depth=24, num_heads=16),
    "vitg14_reg": Config(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}
# The official models without registers, "vits14" and so on, differ also in how they resize the
# position embedding.
CONFIGS |= {
    name.removesuffix("_reg"): dataclasses.replace(
        config, num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1
    )
    for name, config in CONFIGS.items()
}


# --------------------------------------------------------------------------------------------------
# The model, in the order in which an image flows through it


class PatchEmbed(nn.Module):
    """Cut images into square patches and map each to a token: (B, C, H, W) -> (B, h * w, D)."""

    def __init__(self, config: Config):
        super().__init__()
        P, (h, w) = config.patch_size, config.grid
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, P, stride=P)
        # What code written for the official class reads.
        self.img_size = (
            config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
        )
        self.patch_size, self.patches_resolution, self.num_patches = (P, P), (h, w), h * w
        self.in_chans, self.embed_dim = config.in_chans, config.embed_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = (config.embed_dim // config.num_heads) ** -0.5
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.attn_drop, self.proj_drop = (
            0.0,
            nn.Dropout(0.0),
        )  # as in the official class; no released model uses them

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split_heads(self.qkv(x))  # each (B, A, N, D / A)
        # softmax(q @ k.mT * scale) @ v, without ever holding the N x N matrix
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop if self.training else 0.0
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def split_heads(self, qkv: Tensor) -> Tensor:
        """(B, N, 3 D) -> q, k, v, each (B, A, N, D / A)."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class Mlp(nn.Module):
    """Feed-forward layer of S, B and L: D -> mlp_ratio * D -> D, with the exact (erf) GELU
    between.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


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
    """A learnt factor for each channel of a residual branch; training starts it near 0 (Touvron et
    al., 2021).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), config.layerscale_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Transformer block, pre-norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: Config, drop_path_rate: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = SwiGLU(config) if config.ffn == "swiglu" else Mlp(config)
        self.ls2 = LayerScale(config)
        self.sample_drop_ratio = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        drop_rate = self.sample_drop_ratio if self.training else 0.0
        x = add_residual(x, lambda x: self.ls1(self.attn(self.norm1(x))), drop_rate)
        x = add_residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))), drop_rate)
        return x


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor], drop_rate: float) -> Tensor:
    """x + branch(x); in training with stochastic depth (Huang et al., 2016), images drop the branch
    at random.

    Official Implementation: dinov2/layers/block.py, `drop_add_residual_stochastic_depth`. Above a
    rate of 0.1 the branch is computed only for the images that keep it, which makes training
    faster.
    """
    if drop_rate == 0:
        return x + branch(x)
    if drop_rate <= 0.1:
        return x + branch(x) * x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - drop_rate).div_(
            1 - drop_rate
        )
    kept = sample_images(x, drop_rate)
    return x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=x.shape[0] / max(len(kept), 1))


Images = (
    Tensor | list[Tensor] | tuple[Tensor, ...]
)  # a batch (B, C, H, W), or several batches of different sizes


class DinoVisionTransformer(nn.Module):
    """DINOv2, with or without registers: a drop-in for what
    `torch.hub.load("facebookresearch/dinov2", ...)` returns.

    Without registers, large models store global information in a few background patches, whose
    tokens become outliers of high norm and show up as artifacts in feature and attention maps.
    Registers are extra learnt tokens that take over this role; they go through all blocks like the
    other tokens, and are discarded at the output (Darcet et al., section 2).

    Images are (B, C, H, W), as `preprocess` returns them, in the dtype of the weights or float32; H
    and W are multiples of the patch size. Others raise a ValueError. A new model is initialised for
    training; `load` returns a trained one. Without masks, `mask_token` takes no part in the loss:
    for DistributedDataParallel call `model.mask_token.requires_grad_(False)`.
    """

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        D, R, (h, w) = config.embed_dim, config.num_register_tokens, config.grid
        first_rate = config.drop_path_rate if config.drop_path_uniform else 0.0
        rates = np.linspace(first_rate, config.drop_path_rate, config.depth).tolist()

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(
            torch.empty(1, 1 + h * w, D)
        )  # for CLS and patches; registers have none
        self.register_tokens = nn.Parameter(torch.empty(1, R, D)) if R else None
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

        self.config = config
        self.transform = Transform()  # what `preprocess` does to this model's images
        self.patch_size = config.patch_size
        self.num_register_tokens = R
        self.interpolate_antialias = config.interpolate_antialias
        self.interpolate_offset = config.interpolate_offset
        self.grad_checkpointing = (
            False  # True: training recomputes the blocks' activations instead of keeping them
        )
        # What code written for the official class reads besides.
        self.embed_dim, self.num_features, self.num_heads, self.n_blocks = (
            D,
            D,
            config.num_heads,
            config.depth,
        )
        self.num_tokens, self.chunked_blocks = 1, False

    def forward(self, x: Images, masks=None, is_training: bool = False):
        """Images (B, C, H, W) -> normalised CLS token (B, D), of a list concatenated; if
        is_training, all features.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        parts = features if isinstance(features, list) else [features]
        return self.head(torch.cat([part["x_norm_clstoken"] for part in parts]))

    def forward_features(self, x: Images, masks=None):
        """All output tokens of images (B, C, H, W), as a dict. Patches where masks (B, h * w; bool)
        is True are masked.

        x_norm_clstoken (B, D), x_norm_regtokens (B, R, D) and x_norm_patchtokens (B, h * w, D) are
        the tokens after the final norm, x_prenorm (B, N, D) all tokens before it, and masks the
        argument. Lists return a list of dicts.
        """
        if isinstance(x, (list, tuple)):
            return self.forward_features_list(x, masks)
        x = self.prepare_tokens_with_masks(x, masks)
        (x,) = self.run_blocks(x, wanted=[len(self.blocks) - 1])
        return self.name_features(x, masks)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images to tokens: (B, C, H, W) -> (B, N, D). The mask token replaces patches where masks
        (B, h * w) is True.
        """
        self.image_grid(x)  # raises a ValueError for anything but images
        B, _, H, W = x.shape
        x = self.patch_embed(x.to(self.pos_embed.dtype))  # (B, h * w, D)
        if masks is not None:
            if masks.shape != x.shape[:2]:
                raise ValueError(
                    f"masks must have shape {tuple(x.shape[:2])}, got {tuple(masks.shape)}"
                )
            x = torch.where(masks[..., None].bool(), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1 + h * w, D)
        x = x + self.interpolate_pos_encoding(x, H, W)
        if self.register_tokens is not None:
            x = torch.cat(
                [x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1
            )  # (B, N, D)
        return x

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """The position embedding (1, 1 + h * w, D) of CLS and patches x (B, 1 + h * w, D) of images
        of w x h pixels.

        As in the official method, w is the first side of the images, their height.
        """
        size, patches = self.to_grid(w, h), self.pos_embed.shape[1] - 1
        stored = (
            self.config.grid
            if math.prod(self.config.grid) == patches
            else (math.isqrt(patches),) * 2
        )  # or replaced
        if size == stored:
            return self.pos_embed
        # With an offset, the official code passes a scale factor instead of a size, which shifts
        # the sampling points a little; models without registers were trained so. In float32:
        # bicubic weights are too coarse in half precision.
        scale = (
            float(side + self.interpolate_offset) / length for side, length in zip(size, stored)
        )
        target: dict = {"scale_factor": tuple(scale)} if self.interpolate_offset else {"size": size}
        pos_embed = self.pos_embed.float()
        if (
            pos_embed.device.type == "mps"
        ):  # has no such resize with antialiasing up to torch 2.7, later no gradient of it
            pos_embed = pos_embed.cpu()
        # Channels last, as PyTorch (2.14) computes a wrong result for contiguous tensors and a
        # single column of patches.
        grid = (
            pos_embed[:, 1:]
            .unflatten(1, stored)
            .permute(0, 3, 1, 2)
            .contiguous(memory_format=torch.channels_last)
        )
        grid = F.interpolate(
            grid, mode="bicubic", antialias=self.interpolate_antialias, **target
        )  # (1, D, h, w)
        return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(
            x.device, x.dtype
        )

    def run_blocks(self, x: Tensor, wanted: Collection[int]) -> list[Tensor]:
        """Tokens (B, N, D) through the blocks: the tokens after each of the wanted blocks, in block
        order.
        """
        outputs = []
        for i, block in zip(range(max(wanted) + 1), self.blocks):
            x = self.run(block, x)
            if i in wanted:
                outputs.append(x)
        return outputs

    def run(self, function: Callable[..., Tensor], *args) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def name_features(self, x: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        cls, registers, patches = self.split_tokens(self.norm(x))
        return dict(
            x_norm_clstoken=cls,
            x_norm_regtokens=registers,
            x_norm_patchtokens=patches,
            x_prenorm=x,
            masks=masks,
        )

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> CLS (B, D), registers (B, R, D), patches (B, h * w, D)."""
        R = self.num_register_tokens
        return x[:, 0], x[:, 1 : 1 + R], x[:, 1 + R :]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Collection[int] = 1,
        reshape=False,
        return_class_token=False,
        norm=True,
    ) -> tuple:
        """Patch tokens of images (B, C, H, W) after each of the last n blocks, or of the blocks
        whose indices n lists.

        A tuple in block order: each (B, h * w, D), or (B, D, h, w) if reshape; with the final norm
        applied if norm; paired with the CLS token (B, D) if return_class_token. Raises a ValueError
        for a block that does not exist.
        """
        depth = len(self.blocks)
        wanted = (
            range(depth - n, depth) if isinstance(n, (int, np.integer)) else [int(i) for i in n]
        )
        if not wanted or not set(wanted) <= set(range(depth)):
            raise ValueError(
                f"n must be 1 to {depth}, or list indices of the {depth} blocks, got {n}"
            )
        grid, outputs = (
            self.image_grid(x),
            self.run_blocks(self.prepare_tokens_with_masks(x), wanted),
        )
        split = [self.split_tokens(self.norm(out) if norm else out) for out in outputs]
        if reshape:
            split = [
                (cls, regs, patches.mT.unflatten(2, grid).contiguous())
                for cls, regs, patches in split
            ]
        return tuple((patches, cls) if return_class_token else patches for cls, _, patches in split)

    def attention_maps(self, x: Tensor, layer: int | Sequence[int] = -1) -> Tensor | list[Tensor]:
        """Attention of CLS and of each register to the patches of images (B, C, H, W): (B, A, 1 +
        R, h, w), float32.

        layer is the index of a block, counted from the end if negative, or a list of such, which
        returns a list of maps. The softmax is over all tokens. Only these rows of the attention
        matrix are computed.
        """
        layers, depth = [layer] if isinstance(layer, int) else layer, len(self.blocks)
        if not layers or not all(-depth <= i < depth for i in layers):
            raise ValueError(f"layer must be one or more of the {depth} blocks, got {layer}")
        wanted = [i % depth for i in layers]
        special, grid, maps = 1 + self.num_register_tokens, self.image_grid(x), {}
        x = self.prepare_tokens_with_masks(x)
        for i, block in zip(range(max(wanted) + 1), self.blocks):
            if i in wanted:
                maps[i] = attention_rows(block, x, special)[..., special:].unflatten(-1, grid)
            if i < max(wanted):
                x = block(x)
        return maps[wanted[0]] if isinstance(layer, int) else [maps[i] for i in wanted]

    def embed(self, x: Images) -> Tensor:
        """What `forward` returns, with less work: the last block is computed for the CLS token
        only.
        """
        if isinstance(x, (list, tuple)):
            return self.forward(x)
        *blocks, last = self.blocks
        tokens = self.prepare_tokens_with_masks(x)
        for block in blocks:
            tokens = block(tokens)
        return self.head(self.norm(run_for_cls(last, tokens))[:, 0])

    def forward_features_list(
        self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None] | None = None
    ) -> list[dict]:
        outputs = run_list(self, x_list, masks_list, wanted=[len(self.blocks) - 1])
        return [
            self.name_features(x, masks)
            for (x,), masks in zip(outputs, masks_list or [None] * len(x_list))
        ]

    # The sizes of images and of the position embedding; initialisation

    def image_grid(self, x: Tensor) -> tuple[int, int]:
        """The grid (h, w) of patches of images (B, C, H, W). Raises a ValueError for any other
        input.
        """
        C = getattr(
            getattr(self.patch_embed, "proj", None), "in_channels", None
        )  # None: of another module in its place
        if (
            not isinstance(x, Tensor)
            or x.ndim != 4
            or C not in (None, x.shape[1])
            or not x.is_floating_point()
        ):
            found = (
                f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            )
            raise ValueError(
                f"images must be a floating-point tensor (B, {C or 'C'}, H, W), got {found}"
            )
        return self.to_grid(*x.shape[2:])

    def to_grid(self, H: int, W: int) -> tuple[int, int]:
        """The grid (h, w) of patches of H x W pixels: denser if `patch_embed.proj` has a stride
        below the patch size.
        """
        P = self.patch_size
        if H % P or W % P or H == 0 or W == 0:
            nearest = " x ".join(str(max(P, round(side / P) * P)) for side in (H, W))
            raise ValueError(
                f"image sides must be multiples of {P} pixels, got {H} x {W}; "
                f"the nearest is {nearest}"
            )
        stride = getattr(getattr(self.patch_embed, "proj", None), "stride", (P, P))
        return (H - P) // stride[0] + 1, (W - P) // stride[1] + 1

    @torch.no_grad()
    def fix_image_size(self, H: int, W: int) -> None:
        """Resize the position embedding to images of H x W pixels permanently.

        Exported graphs then contain no bicubic resize, and forward passes at this size do none.
        """
        (h, w), P = self.to_grid(H, W), self.patch_size
        self.pos_embed = nn.Parameter(self.interpolate_pos_encoding(self.pos_embed, H, W))
        self.config = dataclasses.replace(self.config, image_size=(h * P, w * P))

    def init_weights(self) -> None:
        """Random weights as in the official `init_weights`, whose truncation at 100 standard
        deviations changes nothing.
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class LinearClassifier(nn.Module):
    """A linear layer on a backbone's features, as in the official `dinov2_*_lc`: (B, C, H, W) ->
    (B, num_classes).

    Its input is the CLS token of each of the last `layers` blocks (officially 1 or 4) and the mean
    patch token of the last, registers excluded; the final norm is applied to all. The rows of a
    list of images are concatenated. `labels` are the class names, or None.
    """

    def __init__(self, backbone: DinoVisionTransformer, num_classes: int, layers: int = 1):
        super().__init__()
        depth = len(backbone.blocks)
        if num_classes < 1 or not 1 <= layers <= depth:
            raise ValueError(
                f"no classifier of {num_classes} classes on the last {layers} of {depth} layers"
            )
        self.backbone = backbone
        self.layers = layers
        self.linear_head = nn.Linear((layers + 1) * backbone.embed_dim, num_classes)
        self.labels: list[str] | None = None
        nn.init.normal_(self.linear_head.weight, std=0.01)
        nn.init.zeros_(self.linear_head.bias)

    @property
    def config(self) -> Config:
        return self.backbone.config

    @property
    def transform(self) -> "Transform":
        return self.backbone.transform

    def forward(self, x: Images) -> Tensor:
        return self.linear_head(self.linear_input(x))

    def linear_input(self, x: Images) -> Tensor:
        """The input of the linear layer for images: (B, C, H, W) -> (B, (layers + 1) * D)."""
        model, rows = self.backbone, []
        last = range(len(model.blocks) - self.layers, len(model.blocks))
        if isinstance(x, (list, tuple)):
            outputs = run_list(model, x, None, last)
        else:
            outputs = [model.run_blocks(model.prepare_tokens_with_masks(x), last)]
        for layers in outputs:  # of each batch
            split = [model.split_tokens(model.norm(tokens)) for tokens in layers]
            rows.append(torch.cat([*(cls for cls, _, _ in split), split[-1][2].mean(dim=1)], dim=1))
        return torch.cat(rows)


# --------------------------------------------------------------------------------------------------
# Blocks in other ways than `Block.forward`: for the CLS token only, for the rows of an attention
# map, for several sizes


def is_plain(block) -> bool:
    """Whether a block, its attention and its MLP are those of this file: not replaced, wrapped or
    hooked.
    """
    if (
        type(block) is not Block
        or type(block.attn) is not Attention
        or type(block.mlp) not in (Mlp, SwiGLU)
    ):
        return False
    parts = (block, block.attn, block.mlp)
    return not any(
        "forward" in vars(part) or part._forward_pre_hooks or part._forward_hooks for part in parts
    )


def sample_images(x: Tensor, drop_rate: float) -> Tensor:
    """Indices of the images of a batch (B, N, D) that keep a branch: a fixed number of them, at
    least one.
    """
    return torch.randperm(x.shape[0], device=x.device)[: max(int(x.shape[0] * (1 - drop_rate)), 1)]


def attend(attn: Attention, qkv: Tensor, queries: int | None = None) -> Tensor:
    """What `Attention` does between its linear layers: (B, N, 3 D) -> (B, N, D), or the first
    `queries` tokens of it.
    """
    q, k, v = attn.split_heads(qkv)
    x = F.scaled_dot_product_attention(
        q[:, :, :queries], k, v, dropout_p=attn.attn_drop if attn.training else 0.0
    )
    return x.transpose(1, 2).flatten(2)


def attention_rows(block, x: Tensor, queries: int) -> Tensor:
    """The attention of the first `queries` tokens to all tokens: (B, N, D) -> (B, A, queries, N),
    float32.
    """
    q, k, _ = block.attn.split_heads(block.attn.qkv(block.norm1(x)))
    return (q[:, :, :queries] @ k.mT * block.attn.scale).softmax(dim=-1, dtype=torch.float32)


def run_for_cls(block, x: Tensor) -> Tensor:
    """The CLS token after a block: (B, N, D) -> (B, 1, D)."""
    if not is_plain(block) or (block.training and block.sample_drop_ratio):
        return block(x)[:, :1]
    heads = attend(block.attn, block.attn.qkv(block.norm1(x)), queries=1)
    x = x[:, :1] + block.ls1(block.attn.proj_drop(block.attn.proj(heads)))
    return x + block.ls2(block.mlp(block.norm2(x)))


# --------------------------------------------------------------------------------------------------
# Batches of images of different sizes share a pass: their tokens are packed into one matrix (1, sum
# of B * N, D). Norms, linear layers and LayerScale see each token by itself; attention and
# stochastic depth work on one batch at a time.

Shapes = list[tuple[int, int]]  # (B, N) of each batch


def run_list(
    model: DinoVisionTransformer,
    x_list: Sequence[Tensor],
    masks_list: Sequence[Tensor | None] | None,
    wanted: Collection[int],
) -> list[list[Tensor]]:
    """For each batch (B, C, H, W) of a list, its tokens (B, N, D) after each of the wanted
    blocks.
    """
    masks_list = masks_list or [None] * len(x_list)
    if not x_list or len(x_list) != len(masks_list):
        raise ValueError(
            "one or more images are needed, and as many masks; "
            f"got {len(x_list)} and {len(masks_list)}"
        )
    tokens = [model.prepare_tokens_with_masks(*pair) for pair in zip(x_list, masks_list)]
    shapes = [(part.shape[0], part.shape[1]) for part in tokens]
    x, outputs = pack(tokens), []
    for i, block in zip(range(max(wanted) + 1), model.blocks):
        x = model.run(run_packed, block, x, shapes)
        if i in wanted:
            outputs.append(unpack(x, shapes))
    return [list(layers) for layers in zip(*outputs)]


def run_packed(block, x: Tensor, shapes: Shapes) -> Tensor:
    """A block on packed tokens. What somebody put in the place of a `Block` runs on each batch by
    itself.
    """
    if not is_plain(block):
        return pack([block(part) for part in unpack(x, shapes)])
    drop_rate = block.sample_drop_ratio if block.training else 0.0
    for branch in (attention_branch, mlp_branch):
        if drop_rate == 0:
            x = x + branch(block, x, shapes)
            continue
        parts = unpack(x, shapes)
        kept = [sample_images(part, drop_rate) for part in parts]
        shapes_kept = [(len(i), N) for i, (_, N) in zip(kept, shapes)]
        residuals = branch(block, pack([part[i] for part, i in zip(parts, kept)]), shapes_kept).to(
            x.dtype
        )
        added = zip(parts, kept, unpack(residuals, shapes_kept))
        x = pack(
            [
                part.index_add(0, i, residual, alpha=len(part) / max(len(i), 1))
                for part, i, residual in added
            ]
        )
    return x


def attention_branch(block, x: Tensor, shapes: Shapes) -> Tensor:
    qkv = unpack(block.attn.qkv(block.norm1(x)), shapes)
    heads = pack([attend(block.attn, part) for part in qkv])
    return block.ls1(block.attn.proj_drop(block.attn.proj(heads)))


def mlp_branch(block, x: Tensor, shapes: Shapes) -> Tensor:
    return block.ls2(block.mlp(block.norm2(x)))


def pack(parts: list[Tensor]) -> Tensor:
    """[(B, N, D), ...] -> (1, sum of B * N, D)."""
    return torch.cat([part.flatten(0, 1) for part in parts])[None]


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """(1, sum of B * N, D) -> [(B, N, D), ...]."""
    return [
        part.unflatten(0, shape)
        for part, shape in zip(x[0].split([B * N for B, N in shapes]), shapes)
    ]


# --------------------------------------------------------------------------------------------------
# Preprocessing: from a file to the input of the model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLINGS = ("nearest", "bilinear", "bicubic", "lanczos")


def require(config, field: str, valid: bool, allowed: str) -> None:
    """Raise a ValueError about a field of a `Config` or `Transform` unless its value is valid."""
    if not valid:
        raise ValueError(
            f"{type(config).__name__.lower()}: {field} must be {allowed}, "
            f"got {getattr(config, field)!r}"
        )


@dataclass(frozen=True)
class Transform:
    """How an image becomes the input of a model. The default is the official evaluation transform.

    Raises a ValueError that names the first invalid field.
    """

    resize: int | tuple[int, int] = 256  # pixels: the short side, or (H, W)
    crop: tuple[int, int] | None = (
        224,
        224,
    )  # pixels: (H, W) of the centre, which is kept; None: all is kept
    resampling: str = "bicubic"  # as PIL has it: one of RESAMPLINGS
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the channels, for pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        def is_size(x) -> bool:
            return (
                type(x) is tuple
                and len(x) == 2
                and all(type(side) is int and 0 < side <= 16384 for side in x)
            )

        def is_triple(x) -> bool:
            return (
                type(x) is tuple
                and len(x) == 3
                and all(type(y) in (int, float) and math.isfinite(y) for y in x)
            )

        resized = self.resize if type(self.resize) is tuple else (self.resize, self.resize)
        require(self, "resize", is_size(resized), "1 to 16384 pixels, or such a pair (H, W)")
        require(
            self,
            "crop",
            self.crop is None or is_size(self.crop),
            "None or a pair (H, W) of 1 to 16384 pixels",
        )
        fits = self.crop is None or all(x <= y for x, y in zip(self.crop, resized))
        require(self, "crop", fits, f"within {self.resize!r} pixels")
        require(
            self, "resampling", self.resampling in RESAMPLINGS, f"one of {', '.join(RESAMPLINGS)}"
        )
        for field in ("mean", "std"):
            require(self, field, is_triple(getattr(self, field)), "three finite numbers")
        require(self, "std", min(self.std) > 0, "positive")

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the result, or None if it depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def at_size(self, size: int) -> "Transform":
        """The same transform for results of size x size pixels: it shows the same part of an
        image.
        """
        if isinstance(self.resize, int):
            resize: int | tuple[int, int] = (
                self.resize * size // min(self.crop) if self.crop else size
            )
        else:
            h, w = self.crop or self.resize
            resize = (self.resize[0] * size // h, self.resize[1] * size // w)
        return dataclasses.replace(self, resize=resize, crop=self.crop and (size, size))


def preprocess(
    image: str | os.PathLike | bytes | Image.Image,
    size: int | None = None,
    keep_aspect: bool = False,
    patch_size: int = 14,
    fast: bool = False,
    normalized: bool = True,
    transform: Transform = Transform(),
) -> Tensor:
    """An image, given as a path, the bytes of a file or a PIL image, as a normalised float32 tensor
    (3, H, W).

    transform is that of the model, `model.transform`; the default is the official evaluation
    transform, pixel for pixel. size changes the side of its result. With keep_aspect nothing is
    cropped: H and W are multiples of patch_size, close to the image's aspect ratio and to the area
    of the transform's result. With fast, large JPEG files are decoded at reduced size, never below
    what is needed: faster, and slightly less exact. Without normalized the pixels are returned as
    uint8: `normalize` is faster on a whole batch, on the device of the model.

    All PIL modes are accepted; the EXIF orientation is applied. Raises OSError or ValueError if
    decoding fails.
    """
    transform = transform if size is None else transform.at_size(size)
    try:
        if isinstance(image, (str, os.PathLike)) and stat.S_ISFIFO(os.stat(image).st_mode):
            raise ValueError("a pipe, not a file")  # opening it could block forever
        if not isinstance(image, Image.Image):
            image = open_image(image)
            if fast:
                resize = transform.resize
                image.draft("RGB", (resize, resize) if isinstance(resize, int) else resize[::-1])
        image = to_rgb(image)
    except (OSError, ValueError):
        raise
    except Exception as error:  # PIL's decoders raise many other types for broken files
        raise ValueError(f"cannot decode the image: {str(error) or repr(error)}") from error
    if max(image.size) > 100 * min(image.size):  # the resized one could be larger than memory
        raise ValueError(f"an image of {image.width} x {image.height} pixels is too narrow")
    if keep_aspect:
        side = transform.resize if isinstance(transform.resize, int) else 0
        scale = (
            math.sqrt(math.prod(transform.size or (side, side)))
            / math.sqrt(image.width * image.height)
            / patch_size
        )
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
    # Transposed by NumPy: in a worker thread, PyTorch would start a team of OpenMP threads beside
    # the model's.
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, H, W), uint8
    return normalize(pixels, transform) if normalized else pixels


def normalize(pixels: Tensor, transform: Transform = Transform()) -> Tensor:
    """Pixels (..., 3, H, W), uint8 -> float32, by the transform's mean and standard deviation of
    each channel.
    """
    mean, std = torch.tensor([transform.mean, transform.std], device=pixels.device)[..., None, None]
    return (pixels / 255).sub_(mean).div_(std)


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """The image of a file or of its bytes. Raises OSError or ValueError, for HEIC and AVIF with the
    plug-in to install.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        head = source[:12] if isinstance(source, bytes) else open(source, "rb").read(12)  # noqa: SIM115
        if head[4:8] != b"ftyp":
            raise
        try:
            import pillow_heif
        except ImportError:
            raise ValueError(
                "a HEIC or AVIF image, which this Pillow does not read: pip install pillow-heif"
            ) from None
        pillow_heif.register_heif_opener()
        return Image.open(file)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: upright, on white where it is transparent."""
    read_as_8_bits = ";16" in str(
        getattr(image, "tile", "")
    )  # colours of 16 bits in a PNG file, by Pillow
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if (
        tags.get(284) == 2 and tags.get(277, 1) > 1 and max(tags.get(258, (8,))) > 8
    ):  # planes, channels, bits
        raise ValueError(
            "a TIFF file of separate planes with more than 8 bits, which Pillow misreads: "
            "interleave its channels"
        )
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = grey_to_8_bits(image, tags)
    if orientation != 1:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        if read_as_8_bits and isinstance(value := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(x >> 8 for x in value)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_to_8_bits(image: Image.Image, tags) -> Image.Image:
    """A grey image of 16 bits, 32 bits or floats as 8 bits, by the white level that its file (TIFF:
    tags) states.

    Arrays, floats and 32 bits have none: the smallest usual value that no pixel exceeds is taken
    for it.
    """
    bits, signed = (
        max(tags.get(258, (16,))),
        2 in np.atleast_1d(tags.get(339, 1)),
    )  # BitsPerSample, SampleFormat
    pixels = np.asarray(image)
    if pixels.dtype == np.int32 and bits == 32 and not signed:
        pixels = pixels.view(np.uint32)  # Pillow takes them for signed
    grey = np.nan_to_num(pixels.astype(np.float64))
    if 281 in tags:  # MaxSampleValue
        white = np.max(tags[281])
    elif image.format in ("PNG", "PPM", "TIFF", "JPEG2000") and image.mode != "F" and bits <= 16:
        white = 2 ** (bits - signed) - 1
    else:
        white = next(
            (level for level in (1, 255, 65535) if grey.max(initial=0) <= level),
            max(65535, grey.max(initial=0)),
        )
    level = grey.clip(0, white) * (255 / max(white, 1))
    if tags.get(262) == 0:  # PhotometricInterpretation: WhiteIsZero
        level = 255 - level
    if isinstance(value := image.info.get("transparency"), int):
        level[grey == value] = 255
    return Image.fromarray(level.round().astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Weights

HUB_URL = "https://dl.fbaipublicfiles.com/dinov2"


def load(
    name_or_path: str | os.PathLike,
    layers: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> DinoVisionTransformer | LinearClassifier:
    """A trained model, in eval mode.

    Names are those of the official models, with or without "dinov2_" in front: a backbone
    ("vits14_reg", any of `CONFIGS`) or its ImageNet-1k classifier ("vits14_reg_lc"), whose head
    uses 1 or 4 layers. Their files are downloaded into torch.hub's cache unless they are there. A
    path is a file that `save` wrote, or a .pth with the official parameter names. Weights are
    memory-mapped, and copied only to another device or dtype (None keeps the file's).

    Raises OSError if a file is missing or cannot be downloaded, ValueError if its contents are not
    such a model.
    """
    name = str(name_or_path).removeprefix("dinov2_")
    if name.removesuffix("_lc") in CONFIGS:
        return load_official(name, layers).to(device, dtype)
    tensors, metadata = read_tensors(name_or_path)
    try:
        config, transform, labels = read_metadata(metadata)
        model = from_state_dict(tensors, config, labels, transform)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name_or_path}: {error}") from None
    return model.to(device, dtype)


def load_official(name: str, layers: int) -> DinoVisionTransformer | LinearClassifier:
    if layers not in (1, 4):
        raise ValueError(f"the official classifiers look at 1 or 4 layers, not {layers}")
    arch = name.removesuffix("_lc")
    stem = f"{HUB_URL}/dinov2_{arch.removesuffix('_reg')}/dinov2_{arch.replace('_reg', '_reg4')}"
    path = download(f"{stem}_pretrain.pth")
    try:
        tensors, _ = read_tensors(path)
        if name.endswith("_lc"):
            path = download(f"{stem}_linear{'4' if layers == 4 else ''}_head.pth")
            tensors = add_head(tensors, read_tensors(path)[0])
        return from_state_dict(tensors, CONFIGS[arch])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete the file to download it again") from None


def read_metadata(metadata: dict[str, str]) -> tuple[Config | None, "Transform", list[str] | None]:
    """The config, transform and labels in the metadata that `write_metadata` returned; None or
    defaults if absent.
    """
    config, transform, labels = (
        json.loads(metadata.get(key, "null")) for key in ("config", "transform", "labels")
    )
    config, transform = (
        dict((key, tuple(x) if isinstance(x, list) else x) for key, x in dict(fields or {}).items())
        for fields in (config, transform)
    )
    size = config.pop("crop_size", None)  # of version 0.1, which had no transform
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"config: crop_size must be a positive integer, got {size!r}")
    default = Transform(**transform)
    return Config(**config) if config else None, default.at_size(size) if size else default, labels


def write_metadata(
    config: Config, transform: Transform, labels: list[str] | None
) -> dict[str, str]:
    values = {
        "config": dataclasses.asdict(config),
        "transform": dataclasses.asdict(transform),
        "labels": labels,
    }
    return {"format": "pt"} | {key: json.dumps(value) for key, value in values.items()}


def download(url: str) -> Path:
    """The file of a URL in the cache of torch.hub, downloaded atomically if it is not there, with a
    progress bar.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, path.name)
            print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(part))
            if not zipfile.is_zipfile(
                part
            ):  # a checkpoint is a zip file, whose directory comes last
                raise OSError("the response is not a complete checkpoint")
            os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {url}: {error}; put that file at {path} by hand, "
            "or give the path of another"
        ) from None
    return path


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of a .safetensors or .pth file, memory-mapped.

    Raises FileNotFoundError, or ValueError if the file is no checkpoint.
    """
    if not os.path.isfile(path):
        names = ", ".join(CONFIGS)
        raise FileNotFoundError(
            f"{path}: no such file, and no official model: {names}; classifiers: the same with _lc"
        )
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError(
                "it is compressed"
            )  # and may unpack to any size; torch.save never compresses
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)), {}
    except (
        pickle.UnpicklingError
    ) as error:  # torch's own message recommends to load it without weights_only
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path}: not a checkpoint of tensors alone: it holds a Python object "
                f"({found[1]}), which could run code. Save the weights alone where it was made: "
                'torch.save(model.state_dict(), "weights.pth")'
            ) from None
        raise ValueError(f"{path}: not a checkpoint, or a damaged one") from None
    except Exception as error:  # of a dozen types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({reason})") from None


def add_head(backbone: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `LinearClassifier` from the two official files, those of its backbone and
    of its head.
    """
    halves = {"backbone": backbone, "linear_head": head}
    return {
        f"{half}.{key}": tensor
        for half, tensors in halves.items()
        for key, tensor in tensors.items()
    }


def from_state_dict(
    tensors: dict[str, Tensor],
    config: Config | None = None,
    labels: list[str] | None = None,
    transform: Transform = Transform(),
) -> DinoVisionTransformer | LinearClassifier:
    """A model in eval mode from a state dict with the official names. Its parameters are these
    tensors, not copies.

    The config is inferred from the shapes if None. A classifier of 1,000 classes without labels
    gets ImageNet's. Raises a ValueError that names the config field that contradicts the shapes, or
    the first tensor that is missing, unknown, or of a wrong shape or dtype.
    """
    if config is not None:
        check_config(config)
    inferred = infer_config(
        {str(key).removeprefix("backbone."): x for key, x in tensors.items()}, config
    )
    for field, value in dataclasses.asdict(
        inferred
    ).items():  # before anything of that size is allocated
        if config is not None and getattr(config, field) != value:
            raise ValueError(
                f"config: {field} is {getattr(config, field)}, "
                f"but the shapes of the tensors give {value}"
            )
    model: DinoVisionTransformer | LinearClassifier
    with _SkipInit():
        model = DinoVisionTransformer(inferred)
        model.transform = transform
        if "linear_head.weight" in tensors:
            num_classes, width = (*tensors["linear_head.weight"].shape, 0, 0)[:2]
            model = LinearClassifier(model, num_classes, layers=width // inferred.embed_dim - 1)
            default = IMAGENET_CLASSES if num_classes == len(IMAGENET_CLASSES) else None
            model.labels = check_labels(labels, num_classes) or default
    expected, found = (
        {key: tuple(x.shape) for key, x in state.items()} for state in (model.state_dict(), tensors)
    )
    for key in expected | found:
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{key} is {found.get(key, 'missing')}; "
                f"expected {expected.get(key, 'no such tensor')}"
            )
        if tensors[key].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(
                f"{key} is {tensors[key].dtype}; expected float32, bfloat16, float16 or float64"
            )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def check_labels(labels: object, num_classes: int) -> list[str] | None:
    """The labels, or None if there are none. Raises a ValueError unless they are a list of
    num_classes strings.
    """
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    ):
        raise ValueError(f"labels must be a list of strings, got {labels!s:.60}")
    if labels and len(labels) != num_classes:
        raise ValueError(f"{len(labels)} labels for {num_classes} classes")
    return labels or None


def check_config(config: Config) -> None:
    """Raise a ValueError that names the first invalid field."""
    for field in ("embed_dim", "depth", "num_heads", "patch_size", "in_chans"):
        value = getattr(config, field)
        require(config, field, type(value) is int and value > 0, "a positive integer")
    for field in ("mlp_ratio", "layerscale_init", "drop_path_rate", "interpolate_offset"):
        value = getattr(config, field)
        require(
            config, field, type(value) in (int, float) and math.isfinite(value), "a finite number"
        )
    P, R = config.patch_size, config.num_register_tokens
    sides = config.image_size if type(config.image_size) is tuple else (config.image_size,) * 2
    require(
        config,
        "num_heads",
        config.embed_dim % config.num_heads == 0,
        f"a divisor of embed_dim, {config.embed_dim}",
    )
    require(config, "ffn", config.ffn in ("mlp", "swiglu"), "'mlp' or 'swiglu'")
    require(config, "mlp_ratio", config.hidden_dim > 0, "positive")
    require(
        config,
        "image_size",
        len(sides) == 2 and all(type(x) is int and x >= P for x in sides),
        f"{P} pixels or more",
    )
    require(config, "num_register_tokens", type(R) is int and R >= 0, "0 or a positive integer")
    for field in ("drop_path_rate", "interpolate_offset"):
        require(config, field, 0 <= getattr(config, field) < 1, "at least 0 and below 1")
    for field in ("interpolate_antialias", "drop_path_uniform"):
        require(config, field, type(getattr(config, field)) is bool, "True or False")


class _SkipInit(torch.overrides.TorchFunctionMode):
    """Skips the random initialisation of parameters that are replaced right after."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


def infer_config(
    tensors: dict[str, Tensor], config: Config | None = None, num_heads: int | None = None
) -> Config:
    """The config of a backbone from its state dict with the official names. Raises a ValueError for
    other names.

    Fields that the shapes do not determine come from config. Without one, models of an official
    width get the official number of heads; other widths need num_heads.
    """
    try:
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        D, C, P, _ = shapes["patch_embed.proj.weight"]
        num_patches = shapes["pos_embed"][1] - 1
        depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
        ffn = "swiglu" if "blocks.0.mlp.w3.weight" in shapes else "mlp"
        hidden = shapes["blocks.0.mlp.w3.weight" if ffn == "swiglu" else "blocks.0.mlp.fc2.weight"][
            1
        ]
        R = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    except (KeyError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"no state dict with the official names: {error!r}") from None
    if config is None:
        num_heads = num_heads or {
            known.embed_dim: known.num_heads for known in CONFIGS.values()
        }.get(D)
        if num_heads is None:
            raise ValueError(
                f"the number of heads cannot be inferred from width {D}: give num_heads"
            )
        config = dataclasses.replace(CONFIGS["vits14_reg" if R else "vits14"], num_heads=num_heads)
    config = dataclasses.replace(
        config, embed_dim=D, depth=depth, ffn=ffn, patch_size=P, in_chans=C, num_register_tokens=R
    )
    if (
        math.prod(config.grid) != num_patches
    ):  # the sides of a grid that is not square are known to the config alone
        config = dataclasses.replace(config, image_size=math.isqrt(max(num_patches, 0)) * P)
    exact = hidden / D * (1.5 if ffn == "swiglu" else 1)
    for mlp_ratio in (exact, exact + 0.5 / D):  # the second for a width that rounding would lose
        if config.hidden_dim != hidden:
            config = dataclasses.replace(config, mlp_ratio=mlp_ratio)
    return config


def save(model: nn.Module, path: str | os.PathLike, labels: list[str] | None = None):
    """Write a model atomically to a .safetensors file that `load` reads: tensors, config, transform
    and class names.

    labels are a classifier's class names, in the order of its logits (default: the model's own).
    What torch.compile, DistributedDataParallel and AveragedModel wrap is unwrapped. Raises a
    ValueError, and writes nothing, if the file would not be the model: for unmerged LoRA, pruning
    masks, replaced layers, another stride.
    """
    model, config, tensors = describe_model(model)
    num_classes = model.linear_head.out_features if isinstance(model, LinearClassifier) else 0
    labels = check_labels(labels or getattr(model, "labels", None), num_classes)
    write_tensors(tensors, path, write_metadata(config, model.transform, labels))


def describe_model(
    model: nn.Module,
) -> tuple[DinoVisionTransformer | LinearClassifier, Config, dict[str, Tensor]]:
    """The model within its wrappers, the config of its present shape, and its tensors. Raises as
    `save` does.
    """
    while isinstance(
        inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
    ):
        model = inner
    if not isinstance(model, (DinoVisionTransformer, LinearClassifier)):
        raise ValueError(
            f"a {type(model).__name__} is neither a DinoVisionTransformer nor a LinearClassifier"
        )
    backbone = model.backbone if isinstance(model, LinearClassifier) else model
    tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in model.state_dict().items()}
    attributes = {
        field: getattr(backbone, field) for field in ("interpolate_antialias", "interpolate_offset")
    }
    try:
        inferred = infer_config(
            {key.removeprefix("backbone."): x for key, x in tensors.items()}, backbone.config
        )
        config = dataclasses.replace(inferred, **attributes)
        rebuilt = from_state_dict(tensors, config)
    except ValueError as error:
        raise ValueError(f"the model was edited, and cannot be saved as it is: {error}") from None
    for (name, ours), (_, theirs) in zip(named_parts(model), named_parts(rebuilt)):
        if type(ours) is not type(theirs) or getattr(ours, "stride", None) != getattr(
            theirs, "stride", None
        ):
            found, expected = (str(module).partition("\n")[0] for module in (ours, theirs))
            raise ValueError(
                "the model was edited, and cannot be saved as it is: "
                f"{name} is {found}, not {expected}"
            )
    return model, config, tensors


def named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a model and their names, without what torch.compile wraps around them."""
    return [
        (name, module) for name, module in model.named_modules() if not hasattr(module, "_orig_mod")
    ]


def write_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]):
    """Write a .safetensors file atomically."""
    with atomic(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part, metadata)
        part.chmod(mode)  # safetensors leaves it readable by its owner alone


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that replaces `path` unless an exception is raised. Leftovers of a killed
    process are removed.
    """
    folder = Path(f"{path}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / Path(path).name
        os.replace(folder / Path(path).name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Command line


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Image files: paths with each folder replaced by all images below it, sorted.

    Images are files with a suffix that Pillow reads, or of HEIC. Links are followed; hidden files
    and folders are left out.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found, seen = [], set()
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if (here := os.path.realpath(folder)) in seen:  # a loop of links
                folders.clear()
            else:
                seen.add(here)
                found += [Path(folder, name) for name in names if is_image_name(name)]
        files += sorted(found) or [path]
    return files


def is_image_name(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in Image.EXTENSION:  # the plug-ins of rarer formats are not loaded yet
        Image.init()
    stubs = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow knows these, but cannot read them
    kind = Image.EXTENSION.get(suffix)
    readable = kind == "MPO" or (
        kind in Image.OPEN and kind not in stubs
    )  # the plug-in of JPEG opens MPO
    return not name.startswith(".") and (readable or suffix in (".heic", ".heif", ".hif", ".avif"))


@torch.inference_mode()
def classify(
    model: LinearClassifier,
    paths: Sequence[str | os.PathLike],
    size: int | None = None,
    keep_aspect: bool = False,
    fast: bool = False,
    batch_size: int = 8,
) -> Iterator[Tensor | Exception]:
    """Class probabilities (num_classes,), float32, of each image file in order, or the exception
    raised by reading it.

    For size, keep_aspect and fast see `preprocess`; the transform is the model's.
    """

    def read(path: str | os.PathLike) -> Tensor | Exception:
        try:
            if os.path.isdir(path):
                raise ValueError("no images in this folder")
            if re.match("https?:/", str(path)):
                raise ValueError("a URL; images are files: download it first")
            return preprocess(
                path, size, keep_aspect, model.backbone.patch_size, fast, False, model.transform
            )
        except (OSError, ValueError) as error:
            return error

    device = model.linear_head.weight.device
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor() as pool:
        ahead: Iterable[Tensor | Exception] = ()
        for batch in [*batches, ()]:
            images, ahead = (
                list(ahead),
                pool.map(read, batch),
            )  # in the background, while the model computes `images`
            pixels = [image for image in images if isinstance(image, Tensor)]
            if pixels:
                same = all(x.shape == pixels[0].shape for x in pixels)
                parts = [torch.stack(pixels)] if same else [x[None] for x in pixels]
                parts = [normalize(part.to(device), model.transform) for part in parts]
                logits = model(parts[0] if same else parts)
                probabilities = iter(logits.float().softmax(dim=-1).cpu())
            for image in images:
                yield next(probabilities) if isinstance(image, Tensor) else image


def describe(path: Path, result: Tensor | Exception, labels: Sequence, top: int) -> dict:
    """The JSON record of one image: its most probable classes, or the error."""
    record: dict = {"image": re.sub("^(https?):/", r"\1://", str(path))}  # a Path has one slash
    if isinstance(result, Exception):
        return record | {"error": getattr(result, "strerror", None) or str(result) or repr(result)}
    best = zip(*(x.tolist() for x in result.topk(min(top, len(result)))))
    return record | {
        "predictions": [{"index": i, "label": str(labels[i]), "probability": p} for p, i in best]
    }


def print_record(record: dict, width: int) -> None:
    """Print a record as text, with file names in a column of this width; errors go to standard
    error.
    """
    name = printable(record["image"])
    if "error" in record:
        print(f"dinoreg: {name}: {printable(record['error'])}", file=sys.stderr, flush=True)
    for prediction in record.get("predictions", ()):
        print(
            f"{name:{width}}  {prediction['probability']:6.1%}  {printable(prediction['label'])}",
            flush=True,
        )
        name = ""


def printable(text: str) -> str:
    """Text on one line, with escapes for characters that standard output cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", module="PIL")  # these messages do not name the file
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # keep freed memory: by default glibc returns that of each layer, which then page-faults again
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX; old releases refuse large values of M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

    source = args.weights or args.model
    dtype = getattr(torch, args.dtype or "float32")
    if args.fast and not args.dtype:
        dtype = best_dtype(args.device)
    model = load(source, args.layers, args.device, dtype)
    if not isinstance(model, LinearClassifier):
        raise ValueError(
            f"{source} has no classifier; official models with one have names that end in _lc"
        )
    if model.linear_head.out_features == 1:
        raise ValueError(
            f"{source}: its head has one output, which is not a probability of classes"
        )
    size = (args.size, args.size) if args.size else model.transform.size
    if size and not args.keep_aspect:
        model.backbone.fix_image_size(*size)
    labels = model.labels or range(model.linear_head.out_features)

    paths = find_images(args.images)
    width = max(len(printable(str(path))) for path in paths)
    progress = sys.stderr.isatty() and len(paths) > args.batch_size
    failed = 0
    for done, result in enumerate(
        classify(model, paths, args.size, args.keep_aspect, args.fast, args.batch_size)
    ):
        record = describe(paths[done], result, labels, args.top)
        failed += "error" in record
        if progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps(record), flush=True)
        else:
            print_record(record, width)
        if progress and done + 1 < len(paths):
            print(f"{done + 1}/{len(paths)}", end="", file=sys.stderr, flush=True)
    return 1 if failed else 0


def best_device() -> str:
    """The type of the best device available: "cuda", "mps" or "cpu"."""
    return (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


def best_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 if this device multiplies matrices faster in it than in float32, else float32:
    measured in milliseconds.
    """

    def seconds(dtype: torch.dtype) -> float:
        try:
            x, weight = (torch.ones(side, 768, device=device, dtype=dtype) for side in (512, 768))
        except TypeError:  # older versions of macOS have no bfloat16
            return math.inf
        times = []
        for _ in range(4):  # the first run also initialises the device
            start = time.perf_counter()
            F.linear(x, weight)[0, 0].item()  # .item() waits for the result
            times.append(time.perf_counter() - start)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)


def main(argv: list[str] | None = None) -> int:
    """Classify images. Returns 0; 1 if some images could not be read; 2 if the run could not
    start.
    """

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="dinoreg",
        description="Classify images with DINOv2 with registers.",
        epilog="example: python -m dinoreg photo.jpg holidays/ --model vitb14_reg_lc --top 3",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    add("--model", default="vits14_reg_lc", help="an official classifier (default: %(default)s)")
    add("--weights", metavar="FILE", help="a file of another classifier, in place of --model")
    add(
        "--layers",
        type=int,
        choices=(1, 4),
        default=4,
        help="layers that the official classifier uses (default: 4)",
    )
    add(
        "--top",
        type=positive,
        default=5,
        metavar="K",
        help="number of classes to print (default: 5)",
    )
    add(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="side of the central crop (default: the model's)",
    )
    add(
        "--keep-aspect",
        action="store_true",
        help="use the whole image, resized to as many pixels, without cropping",
    )
    add(
        "--fast",
        action="store_true",
        help="reduced-size JPEG decoding, and bfloat16 if it is faster on this device",
    )
    device = best_device()
    add(
        "--device",
        default=device,
        help="cpu, cuda, cuda:1, mps, ... (default: the best available, here %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: float32, or as --fast chooses)",
    )
    add(
        "--batch-size",
        type=positive,
        default=8,
        metavar="B",
        help="images in a forward pass (default: 8)",
    )
    add("--json", action="store_true", help="print one JSON object per line, for each image")
    add("--version", action="version", version=f"dinoreg {__version__}")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except BrokenPipeError:  # as in `dinoreg ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
    ) as error:  # a file, the network, a device
        print("dinoreg:", str(error).partition("\n")[0], file=sys.stderr)
        return 2


# --------------------------------------------------------------------------------------------------
# The classes of ImageNet-1k, in the order of the logits

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
