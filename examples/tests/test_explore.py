"""Tests of the page that examples/explore.py writes, in a headless Chromium.

    pip install -e ".[browser,examples,test]"
    python -m pytest -m slow examples/tests/test_explore.py

They are skipped without Debian's chromium and chromium-driver.
"""

import contextlib
import io
import shutil
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
import patches

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
no_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"
)
pytestmark = [pytest.mark.slow, no_chromium]

DIGITS = HERE / "digits.safetensors"  # patch size 4, 3 blocks, 4 registers
SIZE = 56  # pixels: 14 x 14 patches of 4 pixels, 8 x 8 of 7
NAMES = [
    "<script>document.title='run'<.png",
    '"><img src=x onerror=alert(1)>&amp;.png',
    "plain.png",
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
]


def write_page(*args) -> str:
    """Run the script in this process, without an error; return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert explore.main([*map(str, args)]) == 0
    return out.getvalue()


def save_random_model(path: Path) -> None:
    """A model without registers; one of its patch tokens is far longer than the others in a bright
    image.
    """
    torch.manual_seed(0)
    config = Config(
        embed_dim=64, depth=2, num_heads=2, patch_size=7, image_size=SIZE, num_register_tokens=0
    )
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
    out = write_page(
        *images, "--model", *models, "--layers", 0, -1, "--resolution", SIZE, "-o", page
    )
    assert f"{page}: 3 photos, " in out
    assert out.count("its cosine similarities are within 0.0") == 2
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
    """The page as it opens from a file: address; a test fails if anything is written to the
    console.
    """
    driver.get((folder / "page.html").as_uri())
    settle(driver)
    yield driver
    assert driver.get_log("browser") == []


def settle(browser) -> None:
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    )


def photos(browser) -> list:
    return browser.find_elements(By.CLASS_NAME, "photo")


def move(browser, photo: int, x: float, y: float, release: bool | None = None) -> None:
    """The mouse moves to a point, in fractions of a photo; before that a button is released, or
    pressed after it.
    """
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
        if (node.type === "checkbox") node.checked = value === "true";
        else node.value = value;
        form.dispatchEvent(new Event("input", { bubbles: true }));
    """
    browser.execute_script(script, name, value)
    settle(browser)


def maps(browser) -> list[torch.Tensor]:
    return [
        torch.tensor(x) for x in browser.execute_script("return shown.maps.map((map) => [...map])")
    ]


def text(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def drawn(browser) -> str:
    """The overlays and marks, as text."""
    script = """
        const canvases = [...document.querySelectorAll(".photo canvas")];
        const marks = [...document.querySelectorAll(".photo svg")].map((node) => node.innerHTML);
        return canvases.map(\
(node) => node.toDataURL() + node.style.opacity + node.className).join() + marks.join();
    """
    return browser.execute_script(script)


def features(folder: Path, model: DinoVisionTransformer) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.forward_features(x)["x_norm_patchtokens"][0] for x in inputs(folder, model)]


def inputs(folder: Path, model: DinoVisionTransformer) -> list[torch.Tensor]:
    return [dinoreg.preprocess(folder / name, SIZE, True, model.patch_size)[None] for name in NAMES]


def assert_cosines(browser, query: torch.Tensor, patches: list[torch.Tensor]) -> None:
    for shown, own in zip(maps(browser), patches):
        assert (
            shown - F.cosine_similarity(query[None], own)
        ).abs().max() < explore.TOLERANCE + 1e-4


# --------------------------------------------------------------------------------------------------
# The page


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
        assert (
            text(browser, "status") == f"1.00 at row {row + 1}, column {column + 1} of {NAMES[1]}"
        )

        notes = [
            node.text for node in browser.find_elements(By.CSS_SELECTOR, "figcaption span + span")
        ]
        circles = browser.find_elements(By.CSS_SELECTOR, ".match")
        assert notes[1] == "" and len(circles) == 2
        for photo, circle in zip((0, 2), circles):
            cosines = F.cosine_similarity(query[None], patches[photo])
            assert (
                abs(float(notes[photo].removeprefix("best ")) - cosines.max())
                < explore.TOLERANCE + 0.006
            )
            column, row = (int(float(circle.get_attribute(name))) for name in ("cx", "cy"))
            assert cosines[row * w + column] > cosines.max() - 2 * explore.TOLERANCE


def test_overlay_has_the_colors_of_the_values(browser):
    move(browser, 0, 0.5, 0.5)
    choose(browser, "colors", "gray")
    script = (
        "return [...document.querySelector('.photo canvas').getContext('2d')"
        ".getImageData(0, 0, 14, 14).data]"
    )
    pixels = torch.tensor(browser.execute_script(script)).view(-1, 4)
    assert (pixels[:, 0] - maps(browser)[0].clamp(0, 1) * 255).abs().max() <= 1
    assert (pixels[:, 3] == 255).all()


def test_click_pins_drag_averages_and_escape_releases(browser, folder):
    patches = features(folder, common.load_backbone(DIGITS))
    release = browser.find_element(By.ID, "release")
    move(browser, 0, 0.3, 0.3, release=False)
    move(browser, 0, 0.3, 0.3, release=True)
    before = drawn(browser)
    move(browser, 2, 0.6, 0.6)
    assert drawn(browser) == before and release.is_displayed()
    cosine = F.cosine_similarity(patches[0][4 * 14 + 4], patches[2][8 * 14 + 8], dim=0)
    assert abs(float(text(browser, "status").split()[1]) - cosine) < explore.TOLERANCE + 0.006

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


def test_keyboard_navigation(browser):
    def press(*keys):
        webdriver.ActionChains(browser).send_keys(*keys).perform()
        settle(browser)

    views = browser.find_element(By.CSS_SELECTOR, "#views input:checked")
    browser.execute_script("arguments[0].focus()", views)
    press(Keys.ARROW_RIGHT)
    assert "Principal components" in text(browser, "about")
    press(Keys.ARROW_LEFT, Keys.TAB)
    for _ in range(5):
        if browser.switch_to.active_element.get_attribute("class") == "photo":
            break
        press(Keys.TAB)
    press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert f" at row 9, column 9 of {NAMES[0]}" in text(browser, "status")
    press(Keys.ENTER)
    assert text(browser, "status").startswith("Pinned: ")
    webdriver.ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(
        Keys.SHIFT
    ).perform()
    settle(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".patch")) == 2
    press(Keys.ESCAPE)
    assert text(browser, "status") == "No patch is selected."


def test_every_switch_changes_what_is_drawn(browser):
    move(browser, 0, 0.5, 0.5)
    seen = [drawn(browser)]
    switches = [
        ("view", "photo"),
        ("view", "components"),
        ("view", "norms"),
        ("view", "attention"),
        ("layer", "0"),
        ("token", "2"),
    ]
    switches += [
        ("head", "1"),
        ("opacity", "40"),
        ("colors", "viridis"),
        ("smooth", "false"),
        ("model", "1"),
    ]
    for name, value in switches:
        choose(browser, name, value)
        seen.append(drawn(browser))
    assert len(set(seen)) == len(seen)


def test_attention_and_norms_are_those_of_the_model(browser, folder):
    model = common.load_backbone(DIGITS)
    choose(browser, "view", "attention")
    assert "block 3 of 3" in text(browser, "about")  # the page opens on the last block
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
        tokens = torch.cat(
            [model.forward_features(x)["x_prenorm"][:, 1:] for x in inputs(folder, model)]
        )
    own = tokens.norm(dim=2)
    assert torch.allclose(torch.stack(maps(browser)), own, rtol=1e-4)
    outliers = own > patches.OUTLIER * own.median()
    marks = browser.find_elements(By.CSS_SELECTOR, ".outlier")
    assert len(marks) == outliers.sum() == 3
    assert {(mark.get_attribute("x"), mark.get_attribute("y")) for mark in marks} == {("3", "1")}


def test_names_are_escaped_and_nothing_is_fetched(browser):
    captions = [
        node.text for node in browser.find_elements(By.CSS_SELECTOR, "figcaption span:first-child")
    ]
    assert captions == NAMES
    assert browser.title == "Patch features of digits"
    resources = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(name.startswith("data:") for name in resources)


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(browser, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for view in ("photo", "similarity", "components", "attention", "norms"):
        choose(browser, "view", view)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_photo_view_hides_the_overlays(browser):
    move(browser, 0, 0.5, 0.5)
    choose(browser, "view", "photo")
    script = """
        const canvases = [...document.querySelectorAll(".photo canvas")].map(\
(node) => node.style.opacity);
        const filters = [...document.querySelectorAll(".photo img")].map(\
(node) => getComputedStyle(node).filter);
        return [...canvases, ...filters, document.querySelectorAll(".photo svg *").length];
    """
    assert browser.execute_script(script) == ["0"] * 3 + ["none"] * 3 + [0]


@pytest.mark.parametrize("width, height", [(360, 640), (1200, 800)])
def test_controls_stay_visible_and_photos_form_even_rows(driver, tmp_path, width, height):
    sides = [(120, 60), (60, 120), (90, 90), (160, 50), (70, 100), (100, 70), (50, 110)] * 3
    for i, side in enumerate(sides):
        Image.new("RGB", side, (9 * i, 90, 90)).save(
            tmp_path / f"photo {i:02} of a rather long name.png"
        )
    page = tmp_path / "page.html"
    write_page(tmp_path, "--model", DIGITS, "--resolution", 32, "-o", page)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(page.as_uri())
    settle(driver)
    script = """
        const box = ({ top, left, right, height }) => [top, left, right, height];
        const nodes = [document.getElementById("photos"), ...document.querySelectorAll(".photo")];
        return nodes.map((node) => box(node.getBoundingClientRect()));
    """
    (_, left, right, _), *boxes = driver.execute_script(script)
    rows = [[box for box in boxes if box[0] == top] for top in sorted({box[0] for box in boxes})]
    assert len(rows) > 2
    for row in rows:
        assert row[0][1] == pytest.approx(left, abs=1)
        assert [box[3] for box in row] == pytest.approx([row[0][3]] * len(row), abs=1.5)
        if row is not rows[-1]:
            assert row[-1][2] == pytest.approx(right, abs=1)

    driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    settle(driver)
    for view in ("similarity", "attention"):
        choose(driver, "view", view)
        controls = driver.find_elements(By.CSS_SELECTOR, "#bar label, #bar select, #status, #ramp")
        bottoms = [node.rect["y"] + node.rect["height"] for node in controls if node.is_displayed()]
        scrolled = driver.execute_script("return window.scrollY")
        assert scrolled > 0 and len(bottoms) > 8
        assert min(node.rect["y"] for node in controls if node.is_displayed()) >= scrolled
        assert max(bottoms) < scrolled + height / 3
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_move_is_drawn_within_a_frame(driver, tmp_path):
    torch.manual_seed(0)
    model = DinoVisionTransformer(Config(embed_dim=384, depth=1, patch_size=4, image_size=148))
    dinoreg.save(model, tmp_path / "model.safetensors")
    for i in range(4):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (148, 148, 3), dtype=np.uint8)
        ).save(tmp_path / f"{i}.png")
    page = tmp_path / "page.html"
    write_page(tmp_path, "--model", tmp_path / "model.safetensors", "-o", page)
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
    assert [model["h"] for model in driver.execute_script("return data.models[0].photos")] == [
        37
    ] * 4
    milliseconds = driver.execute_script(script)
    print(f"{milliseconds:.1f} ms")
    assert milliseconds < 16
