"""`absorb inspect --html` and `--png`: what is drawn was measured, and is safe to open."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from torch import Tensor

from absorb.cli.main import main
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.runtime.inputs import input_peaks
from absorb.schema.codec import from_json, to_json
from absorb.ship.files import atomic_file
from absorb.show.before_after import BeforeAfter, banded
from absorb.show.charts import Maps, Pairs, Panel, Ranks, digest
from absorb.show.draw import png
from absorb.show.page import drawn, inspection_page
from absorb.show.sections import sections
from tests.fold.test_planted import MASSIVE, NEURON, OUTLIER, planted
from tests.helpers.tiny import HEADS, HIDDEN, LAYERS, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

NAMES = ["sinks", "channels", "tokens", "neurons", "inputs"]
HOSTILE = "<script>alert(1)</script>$\\frac$\n😀"


def inspected(model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", str(model), *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sink, a spike neuron and an outlier channel."""
    folder = tmp_path_factory.mktemp("planted")
    planted("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A page and a folder of pictures."""
    folder = tmp_path_factory.mktemp("written")
    page, pictures = folder / "page.html", folder / "new" / "pictures"
    result = inspected(model, "--html", page, "--png", pictures)
    assert result.exit_code == 0, result.output
    assert "spike neurons" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["new", "page.html"]
    return page, pictures


@pytest.fixture(scope="module")
def exhibit(written: tuple[Path, Path]) -> BeforeAfter:
    return from_json(BeforeAfter, (written[1] / "figures.json").read_text())


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, *tags: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.found if tag in tags)


def test_what_was_planted_is_shown(exhibit: BeforeAfter) -> None:
    before, after = exhibit.before, exhibit.after
    assert torch.tensor(before.first_weight).shape == (LAYERS, HEADS)
    assert torch.tensor(after.channels).shape == (LAYERS, HIDDEN)
    assert before.channel_ratios.keys() == {OUTLIER}
    assert before.channel_ratios[OUTLIER] == max(row[OUTLIER] for row in before.channels)
    assert before.channel_ratios[OUTLIER] > 10 > after.channel_ratios[OUTLIER]
    first = exhibit.neurons[0]
    assert (first.layer, first.neuron, first.status) == (0, NEURON, "removed")
    [massive] = exhibit.inspection.findings.massive_activations
    assert massive.channel == MASSIVE
    assert max(map(max, before.tokens)) == pytest.approx(massive.value, rel=1e-3)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "olmo2"])
def test_ranges_are_those_that_a_fixed_format_takes(model_type: str, tokens: Tensor) -> None:
    original, family = tiny(model_type, torch.float32), family_of(model_type)
    found = measure(Decoder(original, family), tokens, tokens[0, :2]).input_peak
    wanted = input_peaks(Decoder(original, family), tokens, tokens[0, :2])
    assert found.keys() == wanted.keys()
    for name, peak in wanted.items():
        assert float(found[name]) == pytest.approx(float(peak.max()), rel=1e-4)


def test_words_and_tables_say_what_is_drawn(exhibit: BeforeAfter) -> None:
    shown = {section.name: section for section in sections(exhibit)}
    assert list(shown) == NAMES
    assert f"channel {OUTLIER} is up to" in shown["channels"].words
    assert f"Neuron {NEURON} of layer 0" in shown["neurons"].words
    assert shown["neurons"].table[1][-1] == "removed"
    assert "q_proj, k_proj, v_proj" in shown["inputs"].table[0]
    for section in shown.values():
        assert {len(row) for row in section.table} == {len(section.table[0])}


def test_a_picture_knows_its_figures(written: tuple[Path, Path], exhibit: BeforeAfter) -> None:
    _, folder = written
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(NAMES)
    for section in sections(exhibit):
        with Image.open(folder / f"{section.name}.png") as picture:
            assert picture.text["Figures"] == digest(section.chart)


def test_a_page_stands_alone(written: tuple[Path, Path], exhibit: BeforeAfter) -> None:
    elements = Elements(written[0].read_text())
    pictures = list(elements.of("img"))
    assert [picture["alt"] for picture in pictures] == [s.words for s in sections(exhibit)]
    places = [e.get("src") or e.get("href") for e in elements.of("img", "link", "a", "iframe")]
    assert all(place is not None and place.startswith("data:") for place in places)
    assert not list(elements.of("script"))


def test_names_of_strangers_stay_text(exhibit: BeforeAfter) -> None:
    made = replace(exhibit.inspection, model=HOSTILE, prefix_text=HOSTILE)
    tokens = (HOSTILE, *exhibit.before.token_text[1:])
    look = replace(exhibit.before, token_text=tokens)
    hostile = replace(exhibit, inspection=made, before=look)
    page = inspection_page(made, drawn(sections(hostile)))
    assert not list(Elements(page).of("script"))
    assert "&lt;script&gt;" in page


def test_every_character_can_be_drawn() -> None:
    panel = Panel(title="$\\frac$", values=((1.0, 2.0),), labels=((0, HOSTILE), (1, "漢字")))
    maps = Maps(lines="token", unit="|x|", logarithmic=True, panels=(panel, panel), dotted=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(maps).startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_figures_can_be_drawn(value: float) -> None:
    panel = Panel(title="", values=((value, value),), labels=())
    charts = (
        Maps(lines="token", unit="|x|", logarithmic=True, panels=(panel,), dotted=None),
        Pairs(unit="|x|", panels=(("q_proj", (value,), (value,)),)),
        Ranks(unit="|x|", rows=(("(0, 1)", value, ""),)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(png(chart).startswith(b"\x89PNG") for chart in charts)


def test_bands_keep_the_largest() -> None:
    values = torch.tensor([[1.0, 5.0, 2.0, 0.0, 7.0]])
    assert banded(values, 2).tolist() == [[5.0, 2.0, 7.0]]
    assert banded(values, 1).equal(values)


def test_figures_survive_being_written_and_read(written: tuple[Path, Path]) -> None:
    text = (written[1] / "figures.json").read_text()
    assert to_json(from_json(BeforeAfter, text)) == text


def test_an_old_page_is_replaced_once_the_new_one_is_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(TypeError), atomic_file(page) as file:
        file.writelines([b"new", "no bytes"])
    assert page.read_text() == "old"
    with atomic_file(page) as file:
        file.write(b"new")
    assert page.read_text() == "new"
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_place_that_cannot_be_written_to_is_refused_at_once(
    option: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = inspected(model, option, tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert "cannot be written to (" in result.stderr
    assert len(result.stderr.splitlines()) == 1  # nothing was loaded


def test_a_folder_is_no_page(model: Path, tmp_path: Path) -> None:
    result = inspected(model, "--html", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"absorb: {tmp_path} is a folder and a file is to be written; name a file\n"
    )


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = ("--html", tmp_path / "new" / "page.html", "--png", tmp_path / "pictures")
    assert inspected(tmp_path / "empty", *places).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium that notes what it is asked to load and what goes wrong."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(paths[1]))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_at_any_width(
    width: int, browser: webdriver.Chrome, written: tuple[Path, Path], exhibit: BeforeAfter
) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(written[0].as_uri())
    assert browser.get_log("browser") == []
    assert loaded(browser) == {written[0].as_uri()}
    assert exhibit.inspection.model in browser.title
    assert len(browser.find_elements(By.TAG_NAME, "h1")) == 1
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == ["Findings", *(section.title for section in sections(exhibit))]
    for details in browser.find_elements(By.TAG_NAME, "summary"):
        details.click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == len(NAMES)
    for picture in pictures:
        assert picture.get_property("naturalWidth") == 1000
        assert 300 < picture.size["width"] <= width
        assert picture.get_attribute("alt")
    assert all(table.is_displayed() for table in browser.find_elements(By.TAG_NAME, "table"))


def loaded(browser: webdriver.Chrome) -> set[str]:
    """What the browser has asked for since it was last asked here, other than data in the page."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = (e for e in events if e["method"] == "Network.requestWillBeSent")
    urls = {event["params"]["request"]["url"] for event in asked}
    return {url for url in urls if not url.startswith("data:")}


def test_a_comparison_is_a_page_too(model: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    formats = ("--formats", "w8a8-static,nvfp4", "--html", page)
    arguments = ["eval", model, "--against", model, "--text", text, *formats]
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert model.name in browser.title
    [picture] = browser.find_elements(By.TAG_NAME, "img")
    assert picture.get_property("naturalWidth") == 1000
    shown = browser.find_element(By.TAG_NAME, "tbody").text.splitlines()
    printed = result.stdout.splitlines()[1:]
    assert [line.split() for line in shown] == [line.split() for line in printed]


def test_help_does_not_wait_for_a_plotting_library() -> None:
    code = "import absorb.cli, sys; assert not {'matplotlib', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
