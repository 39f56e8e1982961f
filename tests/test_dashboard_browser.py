"""The dashboard in a real Chromium: it asks nobody for anything, draws seven panels, zooms, replays and copies.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium; without them every test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dashboards import HOSTILE, bare, broken, changed, healthy

from minitrain.dashboard import write_page

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
missing = [
    name
    for name, there in {
        "chromium": CHROMIUM,
        "chromedriver": DRIVER,
        "the Python package selenium": importlib.util.find_spec("selenium"),
    }.items()
    if not there
]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"THE DASHBOARD IS NOT TESTED IN A BROWSER: {', '.join(missing)} not found"
)
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
]
LOCAL = ("file:", "data:", "blob:", "about:")
PANELS = ["loss", "lr", "norm", "activations", "spectral", "units", "classes"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all tests of this file, with a log of the console and of every request."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get("about:blank")
    drain(driver)  # what a browser asks for at its start is not the page's doing
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def show(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``show(*runs, name=…)``: their page in the browser, drawn. With ``keep`` it stays as it is, if it is there."""
    from selenium.webdriver.support.ui import WebDriverWait

    folder = tmp_path_factory.mktemp("pages")

    def open_page(*runs: Any, name: str, address: str = "", keep: bool = False) -> Any:
        path = folder / f"{name}.html"
        if keep and browser.current_url.split("#")[0] == path.as_uri():
            drain(browser)
            browser.execute_script("minitrain.setRange(0, 1e9)")
            return browser
        if not path.exists():
            write_page(runs, path)
        drain(browser)
        browser.get("about:blank")
        browser.get(f"{path.as_uri()}{address}")
        WebDriverWait(browser, 20, 0.05).until(ready)
        return browser

    return open_page


def ready(browser: Any) -> bool:
    return bool(browser.execute_script("return document.documentElement.dataset.ready === 'yes'"))


def drain(browser: Any) -> tuple[list[str], list[str]]:
    """Errors of the console and addresses that were asked for, since the last call."""
    errors = [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
    asked = []
    for line in browser.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    return errors, asked


def clean(browser: Any) -> None:
    errors, asked = drain(browser)
    assert errors == []
    assert [url for url in asked if not url.startswith(LOCAL)] == []


def lanes(browser: Any, what: str) -> dict[str, Any]:
    """Something of every lane but the overview, by its name."""
    script = f"return Object.fromEntries(minitrain.lanes.filter(l => !l.overview).map(l => [l.id, {what}]))"
    return dict(browser.execute_script(script))


def settled(browser: Any) -> None:
    """Every lane has drawn what was asked of it last."""
    browser.execute_async_script("""
        const done = arguments[0];
        for (const lane of minitrain.lanes) lane.near = true;
        requestAnimationFrame(async () => {
          for (const lane of minitrain.lanes) if (lane.dirty) { lane.dirty = false; await lane.show(); }
          done();
        });
    """)


def drag(browser: Any, element: Any, start: float, end: float) -> None:
    """From one part of the element's width to another."""
    from selenium.webdriver.common.action_chains import ActionChains

    width = element.size["width"]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    actions = ActionChains(browser, duration=20)
    actions.move_to_element_with_offset(element, (start - 0.5) * width, 0).click_and_hold()
    actions.move_to_element_with_offset(element, (start + (end - start) / 2 - 0.5) * width, 0)
    actions.move_to_element_with_offset(element, (end - 0.5) * width, 0).release().perform()


@pytest.fixture(scope="module")
def run() -> Any:
    return healthy()


def test_seven_panels_are_drawn_and_nobody_is_asked(show, run):
    """Each has a heading, a question, a reading and pictures with marks; no error, no request but for the file."""
    browser = show(run, name="healthy")
    sections = browser.find_elements("css selector", "main > section")
    assert [section.get_attribute("id") for section in sections] == [f"p-{panel}" for panel in PANELS]
    for section in sections:
        assert section.find_element("css selector", "h2").text
        assert section.find_element("css selector", ".question").text.endswith("?")
        assert section.find_element("css selector", ".reading").text.endswith(".")
        for figure in section.find_elements("css selector", "figure"):
            paths = figure.find_elements("css selector", ".vis svg .mark-line path")
            assert any(len(path.get_attribute("d") or "") > 50 for path in paths), figure.get_attribute("data-lane")
    assert len(lanes(browser, "1")) == 12
    errors, asked = drain(browser)
    assert errors == []
    assert asked[-1].endswith("/healthy.html")
    assert [url for url in asked if not url.startswith(LOCAL)] == []


def test_pictures_have_titles_and_descriptions(show, run):
    """A screen reader hears what is drawn and what it says."""
    browser = show(run, name="healthy", keep=True)
    for figure in browser.find_elements("css selector", "figure svg.marks"):
        label = figure.get_attribute("aria-label")
        described = figure.find_element("css selector", "desc").get_attribute("textContent")
        assert len(label) > 20
        assert described == label
        assert figure.find_element("css selector", "title").get_attribute("textContent")


def test_the_brush_zooms_every_view(show, run):
    """A drag in the overview sets the steps of all pictures, of the numbers and of the address; Escape resets."""
    from selenium.webdriver.common.keys import Keys

    browser = show(run, name="healthy", keep=True)
    assert set(map(tuple, lanes(browser, "l.view.scale('x').domain()").values())) == {(0, 2000)}
    drag(browser, browser.find_element("css selector", "[data-lane=overview] .over"), 0.4, 0.6)
    settled(browser)
    domains = set(map(tuple, lanes(browser, "l.view.scale('x').domain()").values()))
    assert len(domains) == 1
    ((low, high),) = domains
    assert 650 < low < 900
    assert 1100 < high < 1350
    assert browser.current_url.endswith(f"#steps={low}-{high}")
    assert browser.find_element("id", "lo").get_attribute("value") == str(low)
    rows = lanes(browser, "l.view.data('rows').map(r => r.step)")
    for lane, steps in rows.items():
        assert not steps or (low - 60 <= min(steps) and max(steps) <= high + 60), lane
    browser.find_element("css selector", "[data-lane=loss] .over").send_keys(Keys.ESCAPE)
    settled(browser)
    assert set(map(tuple, lanes(browser, "l.view.scale('x').domain()").values())) == {(0, 2000)}
    clean(browser)


def test_a_drag_in_a_picture_zooms_and_a_double_click_resets(show, run):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = show(run, name="healthy", keep=True)
    over = browser.find_element("css selector", "[data-lane=norm] .over")
    drag(browser, over, 0.3, 0.5)
    low, high = browser.execute_script("return [minitrain.sight.lo, minitrain.sight.hi]")
    assert 450 < low < high < 1100
    ActionChains(browser).double_click(over).perform()
    assert browser.execute_script("return [minitrain.sight.lo, minitrain.sight.hi]") == [0, 2000]


def test_a_zoom_shows_every_step(show, run):
    """What is drawn of a long run are extremes; close enough, each step is there."""
    browser = show(run, name="healthy", address="#steps=480-520")
    settled(browser)
    steps = browser.execute_script(
        "return minitrain.lanes.find(l => l.id === 'norm').view.data('rows')"
        ".filter(r => r.series === 'before the clip').map(r => r.step)"
    )
    assert set(range(480, 521)) <= set(steps)


def test_a_click_shows_the_command_that_replays_the_step(show, run):
    """With loss and norm of the step, and its batch, whose texts do nothing but stand there."""
    browser = show(run, name="healthy", keep=True)
    over = browser.find_element("css selector", "[data-lane=norm] .over")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    over.click()
    step = int(browser.find_element("id", "at").get_attribute("value"))
    assert 800 < step < 1200
    assert browser.find_element("class name", "command").text == f"minitrain replay runs/a --step {step}"
    told = browser.find_element("id", "numbers").text
    assert f"loss {run.log.loss[step]:.3g}"[:8] in told
    assert "norm" in told
    rules = lanes(browser, "l.chosen.style.display")
    assert set(rules.values()) == {"block"}
    batch = browser.find_elements("css selector", "#batch li")
    assert len(batch) == 8
    assert browser.current_url.endswith(f"#step={step}")
    hostile = next(t for t in range(run.steps) if 0 in run.rows[t])
    browser.execute_script(f"minitrain.choose({hostile})")
    texts = [item.get_attribute("textContent") for item in browser.find_elements("css selector", "#batch li")]
    assert f"{HOSTILE}  {HOSTILE}" in texts
    clean(browser)


def test_copy_fills_the_clipboard(show, run):
    browser = show(run, name="healthy", address="#step=803")
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    browser.find_element("class name", "copy").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 5, 0.05).until(lambda b: b.find_element("class name", "copied").text)
    assert browser.find_element("class name", "copied").text == "copied"
    pasted = browser.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    assert pasted == "minitrain replay runs/a --step 803"


def test_copy_works_where_the_clipboard_is_refused(show, run):
    """As in pages from disk elsewhere: the old way takes its place."""
    browser = show(run, name="healthy", address="#step=7")
    browser.execute_script("""
        navigator.clipboard.writeText = () => Promise.reject(new Error("refused"));
        document.addEventListener("copy", () => { window.copiedText = document.activeElement.value; });
    """)
    browser.find_element("class name", "copy").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 5, 0.05).until(lambda b: b.find_element("class name", "copied").text)
    assert browser.execute_script("return window.copiedText") == "minitrain replay runs/a --step 7"


def test_keys_reach_everything(show, run):
    """A picture is focused, arrows choose a step, plus zooms around it."""
    from selenium.webdriver.common.keys import Keys

    browser = show(run, name="healthy", address="#step=1000")
    over = browser.find_element("css selector", "[data-lane=loss] .over")
    over.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script("return minitrain.sight.step") == 1001
    over.send_keys("+")
    low, high = browser.execute_script("return [minitrain.sight.lo, minitrain.sight.hi]")
    assert low < 1001 < high
    assert high - low == 1000


def test_the_pointer_tells_the_numbers(show, run):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = show(run, name="healthy", keep=True)
    over = browser.find_element("css selector", "[data-lane=spectral] .over")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(browser).move_to_element(over).perform()
    tip = browser.find_element("id", "tip").text
    assert tip.startswith("step ")
    assert "block.1.ffn.down.weight" in tip


def test_a_legend_brings_out_a_line_and_a_scale_can_be_changed(show, run):
    browser = show(run, name="healthy", keep=True)
    button = browser.find_element("css selector", "[data-lane=spectral] .legend button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert lanes(browser, "l.view.signal('lit')")["spectral"] == [button.get_attribute("data-series")]
    scale = browser.find_element("css selector", "[data-lane=loss] .scale")
    was = scale.text
    browser.execute_script("arguments[0].click()", scale)
    assert {was, scale.text} == {"log", "linear"}
    clean(browser)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark(show, run, theme):
    """The system's choice decides; text and ground stay apart."""
    browser = show(run, name="healthy", keep=True)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        text = browser.execute_script("return getComputedStyle(document.querySelector('.vis .role-axis text')).fill")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    brightness = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (paper, text)]
    assert (brightness[0] > 200) == (theme == "light")
    assert abs(brightness[0] - brightness[1]) > 80
    clean(browser)


def test_printed(show, run):
    """On paper it is light whatever the screen was, without controls; every picture fits the width of the page."""
    browser = show(run, name="healthy", keep=True)
    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        told = browser.execute_script("""
            const style = (what) => getComputedStyle(document.querySelector(what));
            return [style("body").color, ...["#range", "nav", ".tools", ".over"].map((what) => style(what).display)];
        """)
        paper = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert sum(map(int, told[0][4:-1].split(","))) < 150
    assert set(told[1:]) == {"none"}
    assert len(paper["data"]) > 50_000
    clean(browser)


def test_the_page_averages_as_the_log_does_and_draws_every_extreme(show):
    """Of 30,000 steps the running mean is that of report.log, and a single spike is among the rows that are drawn."""
    long = healthy(30_000, name="long")
    norm = long.log.norm.copy()
    norm[20_011] = 400
    browser = show(changed(long, norm=norm), name="long")
    means, rows = browser.execute_script("""
        const lane = (id) => minitrain.lanes.find((l) => l.id === id);
        const mean = lane("loss").lines.find((l) => l.name === "train, running mean");
        const rows = lane("norm").view.data("rows").filter((r) => r.series === "before the clip");
        return [[0, 100, 15000, 29999].map((i) => mean.value[i]), rows.map((r) => [r.step, r.value])];
    """)
    assert means == pytest.approx([long.log.mean_loss(i) for i in (0, 100, 15000, 29999)], rel=1e-5)
    assert [20_011, 400] in rows
    assert len(rows) <= 2000


@pytest.mark.parametrize("width", [400, 640])
def test_narrow(show, run, width):
    """A telephone, or a window at 200 % zoom: nothing stands out on the right, pictures are as wide as fits."""
    browser = show(run, name="healthy", keep=True)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(browser.current_url.split("#")[0])
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(browser, 20, 0.05).until(ready)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        widths = lanes(browser, "l.view.width()")
        assert min(widths.values()) > 0.5 * width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(
    "kind",
    {
        "bare": lambda: bare(80),
        "empty": lambda: bare(0),
        "one": lambda: bare(1),
        "nan": lambda: broken(healthy(200)),
        "hostile": lambda: replace(healthy(60), name=HOSTILE, path=HOSTILE, notes=[HOSTILE]),
    }.items(),
    ids=lambda kind: kind[0],
)
def test_bad_runs_have_a_page_that_says_what_is_missing(show, kind):
    """Without metrics, without steps, one step, NaN everywhere, hostile names: seven sections and no error."""
    name, make = kind
    browser = show(make(), name=name)
    assert len(browser.find_elements("css selector", "main > section")) == 7
    if name != "hostile":
        assert browser.find_elements("css selector", "p.empty")
    clean(browser)


def test_two_runs(show, run):
    """Both are in every picture, the settings that differ and the first step that does are told."""
    other = healthy(2000, "optimizer.lr_max=1e-3", seed=3, name="b")
    browser = show(run, other, name="two")
    text = browser.find_element("tag name", "header").text
    assert "optimizer.lr_max: 0.0003 -> 0.001" in text
    assert "first differ at" in text
    for lane, names in lanes(browser, "l.lines.map(x => x.name)").items():
        assert {name[-1] for name in names} == {"A", "B"}, lane
        assert len(names) <= 10
    browser.execute_script("minitrain.choose(500)")
    commands = [code.text for code in browser.find_elements("class name", "command")]
    assert commands == [f"minitrain replay runs/{name} --step 500" for name in "ab"]
    clean(browser)


def test_the_address_is_shared(show, run, tmp_path: Path):
    """A link shows the same steps and the same step."""
    browser = show(run, name="healthy", address="#steps=480-520&step=500")
    assert browser.execute_script("return [minitrain.sight.lo, minitrain.sight.hi, minitrain.sight.step]") == [
        480,
        520,
        500,
    ]
