"""Tests of examples/explore.py in a headless Chromium.

    pip install -e ".[browser,examples,test]"
    python -m pytest examples/tests/test_explore.py

Those of the page are skipped without Debian's chromium and chromium-driver.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinoreg
from dinoreg import Config, DinoVisionTransformer

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("tqdm")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

HERE = Path(__file__).parents[1]
import common
import explore

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")

DIGITS = HERE / "digits.safetensors"  # patch size 4, 3 blocks, 4 registers
SIZE = 56  # pixels: 14 x 14 patches of 4 pixels, 8 x 8 of 7
NAMES = ["<script>document.title='run'<.png", '"><img src=x onerror=alert(1)>&amp;.png', "plain.png"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def run(*args) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, HERE / "explore.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def save_random_model(path: Path) -> None:
    """A model without registers; one of its patch tokens is far longer than the others in a bright image."""
    torch.manual_seed(0)
    config = Config(embed_dim=64, depth=2, num_heads=2, patch_size=7, image_size=SIZE, num_register_tokens=0)
    model = DinoVisionTransformer(config)
    with torch.no_grad():
        model.pos_embed.normal_()
        model.pos_embed[0, 1 + 11] = 40
    dinoreg.save(model, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    generator = np.random.default_rng(0)
    for name in NAMES:
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 90), Image.Resampling.BICUBIC).save(folder / name)
    save_random_model(folder / "random.safetensors")
    models = [DIGITS, folder / "random.safetensors"]
    images = [folder / name for name in NAMES]
    page = folder / "page.html"
    result = run(*images, "--model", *models, "--layers", 0, -1, "--size", SIZE, "-o", page)
    assert result.returncode == 0, result.stderr
    assert f"{page}: {page.stat().st_size:,} bytes" in result.stdout
    assert result.stdout.count("largest cosine error 0.0") == 2
    return folder


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1200, 800)
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, folder):
    """The page as it opens from a file: address; a test fails if anything is written to the console."""
    driver.get((folder / "page.html").as_uri())
    settle(driver)
    yield driver
    assert driver.get_log("browser") == []


def settle(browser) -> None:
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")


def photos(browser) -> list:
    return browser.find_elements(By.CLASS_NAME, "photo")


def move(browser, photo: int, x: float, y: float, release: bool | None = None) -> None:
    """The mouse moves to a point, in fractions of a photo; before that a button is released, or pressed after it."""
    node = photos(browser)[photo]
    actions = webdriver.ActionChains(browser, duration=0)
    width, height = node.size["width"], node.size["height"]
    actions.move_to_element_with_offset(node, round((x - 0.5) * width), round((y - 0.5) * height))
    if release is not None:
        actions = actions.release() if release else actions.click_and_hold()
    actions.perform()
    settle(browser)


def choose(browser, name: str, value: str) -> None:
    script = """
        const [name, value] = arguments;
        const node = form.elements[name];
        node.value = value;
        form.dispatchEvent(new Event("input", { bubbles: true }));
    """
    browser.execute_script(script, name, value)
    settle(browser)


def maps(browser) -> list[torch.Tensor]:
    return [torch.tensor(x) for x in browser.execute_script("return shown.maps.map((map) => [...map])")]


def text(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def drawn(browser) -> str:
    """The overlays and marks, as text."""
    script = """
        const canvases = [...document.querySelectorAll(".photo canvas")];
        const marks = [...document.querySelectorAll(".photo svg")].map((node) => node.innerHTML);
        return canvases.map((node) => node.toDataURL() + node.style.opacity + node.className).join() + marks.join();
    """
    return browser.execute_script(script)


def features(folder: Path, model: DinoVisionTransformer) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.forward_features(x)["x_norm_patchtokens"][0] for x in inputs(folder, model)]


def inputs(folder: Path, model: DinoVisionTransformer) -> list[torch.Tensor]:
    return [dinoreg.preprocess(folder / name, SIZE, True, model.patch_size)[None] for name in NAMES]


def assert_cosines(browser, query: torch.Tensor, patches: list[torch.Tensor]) -> None:
    for shown, own in zip(maps(browser), patches):
        assert (shown - F.cosine_similarity(query[None], own)).abs().max() < explore.TOLERANCE + 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The page


@needs_chromium
def test_similarity_is_that_of_the_models_features(browser, folder):
    for index, source in enumerate([DIGITS, folder / "random.safetensors"]):
        model = common.load_backbone(source)
        patches = features(folder, model)
        choose(browser, "model", str(index))
        move(browser, 1, 0.3, 0.7)
        w = SIZE // model.patch_size
        row, column = int(0.7 * w), int(0.3 * w)
        query = patches[1][row * w + column]
        assert_cosines(browser, query, patches)
        assert text(browser, "status") == f"{NAMES[1]}, row {row + 1}, column {column + 1}: 1.00"

        notes = [node.text for node in browser.find_elements(By.CSS_SELECTOR, "figcaption span + span")]
        circles = browser.find_elements(By.CSS_SELECTOR, ".match")
        assert notes[1] == "" and len(circles) == 2
        for photo, circle in zip((0, 2), circles):
            cosines = F.cosine_similarity(query[None], patches[photo])
            assert abs(float(notes[photo].removeprefix("best match ")) - cosines.max()) < explore.TOLERANCE + 0.006
            column, row = (int(float(circle.get_attribute(name))) for name in ("cx", "cy"))
            assert cosines[row * w + column] > cosines.max() - 2 * explore.TOLERANCE


@needs_chromium
def test_overlay_has_the_colours_of_the_values(browser):
    move(browser, 0, 0.5, 0.5)
    choose(browser, "colours", "grey")
    script = "return [...document.querySelector('.photo canvas').getContext('2d').getImageData(0, 0, 14, 14).data]"
    pixels = torch.tensor(browser.execute_script(script)).view(-1, 4)
    assert (pixels[:, 0] - maps(browser)[0].clamp(0, 1) * 255).abs().max() <= 1
    assert (pixels[:, 3] == 255).all()


@needs_chromium
def test_click_pins_drag_takes_the_mean_and_escape_lets_go(browser, folder):
    patches = features(folder, common.load_backbone(DIGITS))
    release = browser.find_element(By.ID, "release")
    move(browser, 0, 0.3, 0.3, release=False)
    move(browser, 0, 0.3, 0.3, release=True)
    before = drawn(browser)
    move(browser, 2, 0.6, 0.6)
    assert drawn(browser) == before and release.is_displayed()
    cosine = F.cosine_similarity(patches[0][4 * 14 + 4], patches[2][8 * 14 + 8], dim=0)
    assert abs(float(text(browser, "status").split()[-1]) - cosine) < explore.TOLERANCE + 0.006

    move(browser, 0, 0.25, 0.53, release=False)
    move(browser, 0, 0.75, 0.53, release=True)
    query = F.normalize(patches[0][7 * 14 + 3 : 7 * 14 + 11], dim=1).mean(dim=0)
    for shown, own in zip(maps(browser), patches):  # the errors of 8 patches
        assert (shown - F.cosine_similarity(query[None], own)).abs().max() < 2 * explore.TOLERANCE
    assert "mean of 8 patches" in text(browser, "about")

    webdriver.ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    settle(browser)
    assert text(browser, "status") == "No patch is selected." and not release.is_displayed()
    assert not browser.find_elements(By.CSS_SELECTOR, ".patch, .match")
    move(browser, 1, 0.5, 0.5)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".patch")) == 1


@needs_chromium
def test_keyboard_alone(browser):
    def press(*keys):
        webdriver.ActionChains(browser).send_keys(*keys).perform()
        settle(browser)

    views = browser.find_element(By.CSS_SELECTOR, "#views input")
    browser.execute_script("arguments[0].focus()", views)
    press(Keys.ARROW_RIGHT)
    assert "Principal components" in text(browser, "about")
    press(Keys.ARROW_LEFT, Keys.TAB)
    for _ in range(5):
        if browser.switch_to.active_element.get_attribute("class") == "photo":
            break
        press(Keys.TAB)
    press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert f"{NAMES[0]}, row 9, column 9" in text(browser, "status")
    press(Keys.ENTER)
    assert text(browser, "status").startswith("Pinned.")
    webdriver.ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(Keys.SHIFT).perform()
    settle(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".patch")) == 2
    press(Keys.ESCAPE)
    assert text(browser, "status") == "No patch is selected."


@needs_chromium
def test_every_switch_changes_what_is_drawn(browser):
    move(browser, 0, 0.5, 0.5)
    seen = [drawn(browser)]
    switches = [("view", "components"), ("view", "norms"), ("view", "attention"), ("layer", "1"), ("token", "2")]
    switches += [("head", "1"), ("opacity", "40"), ("colours", "viridis"), ("interpolation", "none"), ("model", "1")]
    for name, value in switches:
        choose(browser, name, value)
        seen.append(drawn(browser))
    assert len(set(seen)) == len(seen)


@needs_chromium
def test_attention_and_norms_are_those_of_the_model(browser, folder):
    model = common.load_backbone(DIGITS)
    choose(browser, "view", "attention")
    choose(browser, "layer", "1")
    choose(browser, "token", "3")
    with torch.inference_mode():
        own = [model.attention_maps(x)[0, :, 3].flatten(1) for x in inputs(folder, model)]
    for head, expected in {"-1": [x.mean(dim=0) for x in own], "2": [x[2] for x in own]}.items():
        choose(browser, "head", head)
        for shown, attention in zip(maps(browser), expected):
            assert (shown - attention).abs().max() < 0.005 * max(x.max() for x in own)
    assert "register 3" in text(browser, "about") and "block 3 of 3" in text(browser, "about")

    model = common.load_backbone(folder / "random.safetensors")
    choose(browser, "model", "1")
    choose(browser, "view", "norms")
    with torch.inference_mode():
        tokens = torch.cat([model.forward_features(x)["x_prenorm"][:, 1:] for x in inputs(folder, model)])
    own = tokens.norm(dim=2)
    assert torch.allclose(torch.stack(maps(browser)), own, rtol=1e-4)
    outliers = own > common.OUTLIER * own.median()
    marks = browser.find_elements(By.CSS_SELECTOR, ".outlier")
    assert len(marks) == outliers.sum() == 3
    assert {(mark.get_attribute("x"), mark.get_attribute("y")) for mark in marks} == {("3", "1")}


@needs_chromium
def test_names_are_text_and_nothing_is_fetched(browser):
    captions = [node.text for node in browser.find_elements(By.CSS_SELECTOR, "figcaption span:first-child")]
    assert captions == NAMES
    assert browser.title == "Patch features of digits"
    resources = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("data:") for name in resources)


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(browser, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for view in ("similarity", "components", "attention", "norms"):
        choose(browser, "view", view)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
def test_a_move_is_drawn_within_a_frame(driver, tmp_path):
    torch.manual_seed(0)
    model = DinoVisionTransformer(Config(embed_dim=384, depth=1, patch_size=4, image_size=148))
    dinoreg.save(model, tmp_path / "model.safetensors")
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (148, 148, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    page = tmp_path / "page.html"
    assert run(tmp_path, "--model", tmp_path / "model.safetensors", "-o", page).returncode == 0
    driver.get(page.as_uri())
    script = """
        const times = [];
        for (let i = 0; i < 60; i++) {
            const start = performance.now();
            point(i % 4, [(i % 37 + 0.5) / 37, 0.3]);
            draw();
            times.push(performance.now() - start);
        }
        return times.sort((a, b) => a - b)[30];
    """
    assert [model["h"] for model in driver.execute_script("return data.models[0].photos")] == [37] * 4
    milliseconds = driver.execute_script(script)
    print(f"{milliseconds:.1f} ms")
    assert milliseconds < 16


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_compressed_features_keep_the_cosines():
    torch.manual_seed(0)
    x = torch.randn(300, 64) * 0.9 ** torch.arange(64) + 0.1
    compressed, error = explore.compress(x)
    assert compressed.dtype == torch.int8 and compressed.shape[1] < 64
    own, kept = (F.cosine_similarity(y[:, None], y[None], dim=2) for y in (x, compressed.float()))
    assert abs((own - kept).abs().max().item() - error) < 1e-5
    assert error <= explore.TOLERANCE < explore.cosine_error(x, compressed[:, :-1].float())


@pytest.mark.parametrize("count, dim", [(1, 8), (3, 8), (5, 1)])
def test_few_features_are_compressed(count, dim):
    torch.manual_seed(0)
    compressed, error = explore.compress(torch.randn(count, dim))
    assert len(compressed) == count and error <= explore.TOLERANCE


def test_bad_input_is_reported(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    page = tmp_path / "page.html"
    result = run(HERE / "images" / "two.png", tmp_path / "broken.png", "--model", DIGITS, "-o", page)
    assert result.returncode == 1 and "broken.png: cannot identify" in result.stderr and page.exists()
    page.unlink()
    result = run(tmp_path / "broken.png", "--model", DIGITS, "-o", page)
    assert result.returncode == 1 and not page.exists() and "Traceback" not in result.stderr
    result = run(HERE / "images" / "two.png", "--model", DIGITS, "--layers", 3, "-o", page)
    assert result.returncode == 2 and "layer must be one or more of the 3 blocks" in result.stderr
    assert "Traceback" not in result.stderr
