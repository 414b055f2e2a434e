"""The pages of a study, made from made-up results: as files, and in a browser where there is one."""

import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import made_up_result

from eatlib import steps
from eatlib.config import Study
from eatlib.hardware import HARDWARE

PAGES = ["tradeoff", "explore"]
TITLES = {"tradeoff": "s: accuracy against energy", "explore": "s: all runs"}
LABEL = "Costs $5 to $9, <b>0 < 1</b> & \\\n" + "a long label " * 20 + "of" * 60
BLOCK = {"model": "resnet18", "epochs": 1, "width": 0.0625, "sigma": 1e-2}
RUNS = {  # by data set: accuracy and energy ratio for each lambda
    "digits": {0: (0.95, 0.80), 1: (0.94, 0.70), 2: (0.93, 0.60)},
    "gtsrb": {0: (0.90, 0.85), 1: (0.89, 0.75)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study's folder with its pages, of one network on two data sets, one of them with two values of sigma."""
    values = [
        BLOCK | {"dataset": data, "lambda": value, "accuracy": accuracy, "ratio": ratio}
        for data, runs in RUNS.items()
        for value, (accuracy, ratio) in runs.items()
    ]
    values += [values[1] | {"sigma": 1e-4, "ratio": 0.75}, values[2] | {"sigma": 1e-4, "ratio": 0.65}]
    results = [made_up_result(**own | {"fused": own["ratio"] - 0.2, "products": 1.0}) for own in values]
    study = Study(name="s", label=LABEL, blocks=[{"fixed": result.config.to_dict()} for result in results])
    folder = tmp_path_factory.mktemp("results") / "s"
    folder.mkdir()
    (folder / "study.yaml").write_text(study.to_yaml())
    for name, result in zip(study.runs(), results, strict=True):
        result.save(folder / f"{name}.json")
    steps.draw(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def look(browser, folder):
    """Open a page of the study; it and all that it asked for and complained of."""
    contexts = []

    def open_page(name, width=1300, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page, said = contexts[-1].new_page(), []
        page.on("request", lambda request: said.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((folder / f"{name}.html").as_uri())
        page.wait_for_selector("svg .mark-symbol" if name == "explore" else "img")
        return page, said

    yield open_page
    for context in contexts:
        context.close()


class Elements(HTMLParser):
    """The attributes of the elements of a page, by tag."""

    def __init__(self, text):
        super().__init__()
        self.found = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_a_title_and_fetches_nothing(name, folder):
    text = (folder / f"{name}.html").read_text()
    found = Elements(text).found
    assert re.findall(r"<title>(.*?)</title>", text.partition("<body>")[0]) == [TITLES[name]]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found["meta"]
    addresses = [own.get(key) or "" for every in found.values() for own in every for key in ("src", "href", "srcset")]
    others = [address for address in addresses if address and not address.startswith("data:")]
    assert others == [f"{other}.html" for other in PAGES if other != name]
    assert ("script" in found) == (name == "explore")
    assert "b" not in found, "the label is text, not HTML"


def test_figures_have_alternative_texts_with_their_numbers(folder):
    tradeoff, ways, firing, ablation = (
        image["alt"] for image in Elements((folder / "tradeoff.html").read_text()).found["img"]
    )
    assert tradeoff == (
        "Test accuracy against energy ratio of 7 runs. From standard training to the selected setting: "
        "digits, ResNet-18, λ 2, σ 0.01: energy ratio from 0.800 to 0.601, accuracy from 0.950 to 0.930; "
        "GTSRB, ResNet-18, λ 1, σ 0.01: energy ratio from 0.850 to 0.750, accuracy from 0.900 to 0.890"
    )
    assert ways.startswith("Test accuracy against energy ratio, means over seeds, a line a way: from nothing, ")
    assert firing.endswith("on average 62% with standard training (ST), 51% with energy-aware training (EAT)")
    assert ablation == "Test accuracy and energy ratio over lambda, a line a sigma: 0.0001, 0.01"


@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_complains_of_nothing_and_fits(name, width, look, folder):
    page, said = look(name, width)
    assert [line for line in said if not line.startswith("data:")] == [(folder / f"{name}.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.title() == TITLES[name]
    for image in page.locator("img").all():
        assert image.get_attribute("alt")
        assert 0 < image.bounding_box()["width"] <= width
    assert "Costs $5 to $9, <b>0 < 1</b> & \\ a long label" in page.inner_text("main")


@pytest.mark.parametrize("name", PAGES)
def test_text_is_light_where_a_reader_wants_it_dark(name, look):
    for scheme, colour in (("light", "rgb(0, 0, 0)"), ("dark", "rgb(255, 255, 255)")):
        page, _ = look(name, color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).color") == colour


def test_a_phone_shows_first_what_changed(look):
    page, _ = look("tradeoff", 390)
    boxes = {header.inner_text(): header.bounding_box() for header in page.locator("table").first.locator("th").all()}
    seen = [text for text, box in boxes.items() if box["x"] + box["width"] <= 390]
    assert seen[:4] == ["data set, network", "penalty", "energy decrease", "energy decrease, fused"]


def test_exploring(look):
    expect = pytest.importorskip("playwright.sync_api").expect  # waits until it is so
    page, _ = look("explore")
    points = page.locator("svg .mark-symbol.role-mark path")

    def expect_ratios(name, *ratios):
        """In the words of a screen reader. All multiplications are left, so that a ratio depends on the prices."""
        prices = HARDWARE[name]
        expect(points).to_have_count(len(ratios))
        for point, ratio in zip(points.all(), ratios, strict=True):
            priced = prices.joules(ratio, 1) / prices.joules(1, 1)
            expect(point).to_have_attribute("aria-label", re.compile(f"^energy ratio: {round(priced, 4):g};"))

    expect_ratios("horowitz-45nm-float32", 0.8, 0.7, 0.6, 0.85, 0.75, 0.75, 0.65)
    points.nth(1).hover(force=True)
    told = {
        "data set, network": "digits, ResNet-18",
        "penalty": "λ 1, σ 0.01",
        "seed": "0",
        "test accuracy": "0.940",
        "published ratio": "0.701",
        "fused ratio": "0.501",
        "file": "digits_resnet18_lambda1_sigma0.01_seed0.json",
    }
    expect(page.locator("#vg-tooltip-element td")).to_have_text([text for pair in told.items() for text in pair])
    accounting, hardware, shown = (page.get_by_label(name) for name in ("accounting", "hardware", "shown"))
    accounting.select_option("fused")
    expect_ratios("horowitz-45nm-float32", 0.6, 0.5, 0.4, 0.65, 0.55, 0.55, 0.45)
    assert hardware.locator("option").all_inner_texts() == [*HARDWARE]
    hardware.select_option("horowitz-45nm-int8-sram")
    expect_ratios("horowitz-45nm-int8-sram", 0.6, 0.5, 0.4, 0.65, 0.55, 0.55, 0.45)
    shown.select_option("GTSRB, ResNet-18")
    expect_ratios("horowitz-45nm-int8-sram", 0.65, 0.55)
