"""Print the parameters, size and operations of the official models, or draw the sequence of tokens.

    python examples/architecture.py                                       # the table, as Markdown
    python examples/architecture.py -o examples/pictures/tokens.svg       # the figure

For the table, the models are built on PyTorch's meta device, without weights. Of the operations of
a forward pass, a multiply-add counts as two; those of the patch embedding, of linear layers and of
the two products of attention are counted, and no others. The share of the registers is in brackets.
"""

import argparse
import base64
import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common
import dinoreg

SIDES = (224, 518)  # pixels
PHOTO = Path(__file__).parent / "images" / "chelsea.jpg"
WINDOW = (118, 15, 364, 261)  # of the photo: left, top, right, bottom
# Colours that are as clear on white as on black.
CLS, REGISTER, PATCH, GREY = "#d97a1e", "#8f63d6", "#2f8fd0", "#777f88"


def count(config: dinoreg.Config) -> tuple[int, list[int]]:
    """The parameters of a model, and the operations of a forward pass for one image of each
    side.
    """
    operations = []
    with torch.device("meta"):
        model = dinoreg.DinoVisionTransformer(config).eval()
        for side in SIDES:
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, side, side))
            operations.append(counter.get_total_flops())
    return sum(parameter.numel() for parameter in model.parameters()), operations


def print_table() -> None:
    counts = {name: count(config) for name, config in dinoreg.CONFIGS.items()}
    print(
        "| model | parameters | float32 file |",
        " | ".join(f"GFLOPs at {side} (registers)" for side in SIDES),
        "|",
    )
    print("|---" * (3 + len(SIDES)) + "|")
    for name, (parameters, operations) in counts.items():
        plain = counts[name.removesuffix("_reg")][1]
        cells = [
            f"{x / 1e9:,.1f}" + f" ({1 - y / x:.1%})" * (x > y) for x, y in zip(operations, plain)
        ]
        print(
            f"| `{name}` | {parameters / 1e6:,.1f} M | {4 * parameters / 1e6:,.0f} MB |",
            " | ".join(cells),
            "|",
        )


def text(x: float, y: float, words: str, colour: str = GREY, kind: str = "small") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, fill: str) -> str:
    stroke = f'fill="{fill}" stroke="{colour}" stroke-width="1.5"'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" {stroke}/>'


def arrow(path: str) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def draw() -> str:
    """An SVG: a photo of 3 x 3 patches, the tokens before and after the blocks, and the names of
    the outputs.
    """
    tip = f'<path d="M0 0L6 3L0 6z" fill="{GREY}"/>'
    definitions = [
        '<marker id="tip" orient="auto" refX="5" refY="3" markerWidth="6" markerHeight="6">'
        f"{tip}</marker>"
    ]
    shapes = [text(71, 24, "image", kind="bold"), text(366, -8, "linear layer")]
    # An arrow from the image to the patches.
    shapes.append(arrow("M128 50H146Q156 50 156 40V10Q156 0 166 0H566Q576 0 576 9V11"))
    with Image.open(PHOTO) as photo:
        # The pixels are at twice their size in the figure.
        pixels = photo.convert("RGB").crop(WINDOW).resize((192, 192))
    for i in range(9):
        x, y, file = i % 3, i // 3, io.BytesIO()
        pixels.crop((64 * x, 64 * y, 64 * x + 64, 64 * y + 64)).save(file, "JPEG", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        definitions.append(
            f'<image id="patch{i}" width="1" height="1" href="data:image/jpeg;base64,{data}"/>'
        )
        shapes.append(
            f'<use href="#patch{i}" transform="translate({20 + 35 * x} {34 + 35 * y}) scale(32)"/>'
        )
    captions = (
        "h &#215; w patches",
        "CLS and registers are",
        "learnt; a position",
        "embedding is added to",
        "CLS and patches",
    )
    shapes += [text(71, y, caption) for y, caption in zip((156, 190, 207, 224, 241), captions)]

    for x, tokens, colour, label, output, shape, use in (
        (200, 1, CLS, "CLS", "x_norm_clstoken", "(B, D)", "the image"),
        (282, 4, REGISTER, "registers", "x_norm_regtokens", "(B, R, D)", "discarded"),
        (430, 9, PATCH, "patches", "x_norm_patchtokens", "(B, h&#183;w, D)", "each place"),
    ):
        middle, fill = x + (33 * tokens - 5) / 2, "none" if use == "discarded" else colour
        shapes += [
            text(middle, 24, label, colour, "bold"),
            arrow(f"M{middle} 66V82"),
            arrow(f"M{middle} 156V174"),
        ]
        shapes += [text(middle, 224, output, colour, "code"), text(middle, 241, f"{shape}: {use}")]
        for i in range(tokens):
            shapes += [
                box(x + 33 * i, 34, 28, 28, colour, colour),
                box(x + 33 * i, 178, 28, 28, colour, fill),
            ]
            if label == "patches":
                shapes.append(
                    f'<use href="#patch{i}" transform="translate({x + 33 * i + 3} 37) scale(22)"/>'
                )
    shapes += [
        box(196, 86, 530, 66, GREY, "none"),
        text(461, 112, "transformer blocks", kind="bold"),
    ]
    shapes += [
        text(461, 134, "in each, every token attends to every token; then the final norm", kind="")
    ]
    shapes += [
        arrow("M730 192H754"),
        box(762, 178, 28, 28, CLS, CLS),
        box(795, 178, 28, 28, PATCH, PATCH),
    ]
    shapes += [
        text(792, 166, "classifier", kind="bold"),
        text(792, 224, "CLS, mean patch", kind=""),
    ]
    shapes += [text(792, 241, "&#8594; linear layer &#8594; classes")]

    style = "text{font:13px -apple-system,Segoe UI,Helvetica,Arial,sans-serif;text-anchor:middle}"
    style += ".bold{font-weight:600}.small{font-size:12px}"
    style += ".code{font:600 12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    lines = [f"<style>{style}</style>", "<defs>", *definitions, "</defs>", *shapes]
    return "\n".join(
        ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 870 276">', *lines, "</svg>", ""]
    )


def run(args: argparse.Namespace) -> int:
    if args.output is None:
        print_table()
    else:
        with dinoreg.atomic(args.output) as part:
            part.write_text(draw(), encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="draw the figure into this .svg file instead",
    )
    return common.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
