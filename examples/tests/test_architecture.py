"""Tests of examples/architecture.py: `python -m pytest examples/tests/test_architecture.py`."""

import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

import architecture
import dinoreg

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["vits14", "vits14_reg", "vitg14_reg"])
def test_operation_counts_match_a_count_by_hand(name):
    config = replace(dinoreg.CONFIGS[name], depth=2)
    D, hidden, matrices = config.embed_dim, config.hidden_dim, 3 if config.ffn == "swiglu" else 2
    for side, found in zip((224, 518), architecture.count(config)[1]):
        patches = (side // 14) ** 2
        N = 1 + config.num_register_tokens + patches
        # qkv and proj, MLP; q @ k and attention @ v.
        block = N * (4 * D * D + matrices * D * hidden) + 2 * N * N * D
        assert found == 2 * (patches * 14 * 14 * 3 * D + config.depth * block)


def test_the_table_of_models(monkeypatch, capsys):
    monkeypatch.setattr(
        dinoreg, "CONFIGS", {name: dinoreg.CONFIGS[name] for name in ("vits14_reg", "vits14")}
    )
    assert architecture.main([]) == 0
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == line.count("|") == 6
    assert rows == [
        "| `vits14_reg` | 22.1 M | 88 MB | 12.5 (1.7%) | 93.8 (0.4%) |",
        "| `vits14` | 22.1 M | 88 MB | 12.2 | 93.4 |",
    ]


def test_the_figure_in_the_repository_is_what_the_script_draws(tmp_path):
    drawn, kept = tmp_path / "tokens.svg", HERE / "pictures" / "tokens.svg"
    assert architecture.main(["-o", str(drawn)]) == 0
    xml.etree.ElementTree.parse(drawn)
    without_pixels = [
        re.sub(r"base64,[^\"]+", "", path.read_text(encoding="utf-8")) for path in (drawn, kept)
    ]
    assert without_pixels[0] == without_pixels[1]  # how Pillow encodes them depends on its version
    assert kept.stat().st_size < 60_000 and without_pixels[0].count("data:image/jpeg") == 9
