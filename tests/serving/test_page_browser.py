"""The page in a browser: drawing, text, requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serving.browser import Browser, chromium
from tests.serving.fake_model_handle import FakeModelHandle
from tests.serving.page_app import Page, serve_app
from tests.tiny import Make, answer

LAYERS, EXPERTS = 3, 4

# the colour in the middle of an expert's cell
PIXEL = """
const [layer, expert, layers, experts] = arguments;
const canvas = document.getElementById("map");
const ratio = devicePixelRatio, left = Math.round(30 * ratio), top = Math.round(20 * ratio);
const [columns, rows] = layers >= experts ? [layers, experts] : [experts, layers];
const [column, row] = layers >= experts ? [layer, expert] : [expert, layer];
const w = (canvas.width - left) / columns, h = (canvas.height - top) / rows;
const data = canvas.getContext("2d").getImageData(left + (column + 0.45) * w, top + (row + 0.45) * h, 1, 1).data;
return "#" + [...data.slice(0, 3)].map((n) => n.toString(16).padStart(2, "0")).join("");
"""
COLOUR = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0]).trim()"
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
SEND = """
document.getElementById("prompt").value = arguments[0];
document.getElementById("chat-send").click();
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@contextmanager
def opened(browser: Browser, page: Page, **how: Any) -> Iterator[Page]:
    """The page, live in the browser; checks that it logs no errors and sends no request to another server."""
    with serve_app(page.app()) as url:
        page.url = url
        expected = ["willReadFrequently"]  # the tests read pixels, the page does not
        if page.key or page.refuse:
            expected.append("the server responded with a status of")
        try:
            browser.open(url, **how)
            if not page.key:
                browser.wait(lambda: browser.text("#status-text") == "Live" and browser.text("#model") != "Connecting…")
                browser.wait(lambda: browser.run("return document.getElementById('map-empty').hidden"))
            yield page
            assert [line for line in browser.errors() if not any(known in line for known in expected)] == []
            assert {address for address in browser.requests() if not address.startswith(url)} == set()
        finally:
            browser.driver.get("about:blank")


@pytest.fixture
def offload() -> FakeModelHandle:
    return FakeModelHandle(*[EXPERTS] * LAYERS)


def pixel(browser: Browser, layer: int, expert: int, layers: int = LAYERS, experts: int = EXPERTS) -> str:
    return str(browser.run(PIXEL, layer, expert, layers, experts))


@pytest.mark.parametrize("dark", [False, True])
def test_the_map_follows_the_experts(browser: Browser, offload: FakeModelHandle, dark: bool) -> None:
    offload.state[0, 0] = 2
    with opened(browser, Page(offload), dark=dark):
        colour = {name: browser.run(COLOUR, name) for name in ("absent", "flight", "resident", "use")}
        assert len(set(colour.values())) == 4
        assert pixel(browser, 0, 0) == colour["resident"]
        assert pixel(browser, 2, 3) == colour["absent"]
        offload.state[0, 0] = 0
        offload.state[1, 2], offload.state[2, 3] = 1, 3
        offload.counts["misses"][2, 3] = 1
        browser.wait(lambda: pixel(browser, 2, 3) == colour["use"])
        assert pixel(browser, 0, 0) == colour["absent"]
        assert pixel(browser, 1, 2) == colour["flight"]


def test_a_change_of_colour_scheme_applies_at_once(browser: Browser, offload: FakeModelHandle) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    with opened(browser, Page(offload)):
        light = browser.run(background)
        absent = pixel(browser, 0, 0)
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.wait(lambda: browser.run(background) != light and pixel(browser, 0, 0) != absent)


def test_a_flash_fades(browser: Browser, offload: FakeModelHandle) -> None:
    drawn = "return document.getElementById('map').toDataURL()"
    with opened(browser, Page(offload), calm=False):
        before = browser.run(drawn)
        offload.counts["hits"][1, 1] += 1
        browser.wait(lambda: browser.run(drawn) != before)
        browser.wait(lambda: browser.run(drawn) == before)


def test_other_views_colour_by_counts(browser: Browser, offload: FakeModelHandle) -> None:
    offload.counts["misses"][0, 0], offload.counts["hits"][1, 1] = 9, 9
    with opened(browser, Page(offload)):
        browser.run("document.querySelector('input[value=misses]').click()")
        assert pixel(browser, 0, 0) == browser.run(COLOUR, "miss")
        assert pixel(browser, 1, 1) == browser.run(COLOUR, "absent")
        browser.run("document.querySelector('input[value=accesses]').click()")
        assert pixel(browser, 1, 1) == browser.run(COLOUR, "use")


def test_arrow_keys_move_a_cursor_that_is_described_in_text(browser: Browser, offload: FakeModelHandle) -> None:
    offload.state[0, 1] = 2
    offload.counts["hits"][0, 1] = 12
    with opened(browser, Page(offload)):
        canvas = browser.driver.find_element("id", "map")
        canvas.send_keys("\ue014")  # right
        assert (
            browser.text("#cursor") == "Layer 0, expert 1, in memory, 12 hits, 0 late, 0 missed, 0 prefetches, 0 wasted"
        )
        assert "Layer 0, expert 1" in browser.text("#tip")
        canvas.send_keys("\ue015")  # down
        assert browser.text("#cursor").startswith("Layer 1, expert 1, on disk")
        canvas.send_keys("\ue00c")  # escape
        assert browser.run("return document.getElementById('tip').hidden")


def test_a_chat_streams_and_its_text_is_never_markup(browser: Browser, offload: FakeModelHandle) -> None:
    page = Page(offload, answer=["<img src=x onerror=alert(1)>", " <script>1</script>", " été 😀"], pause_s=0.4)
    with opened(browser, page):
        browser.run(SEND, "Hello & <b>you</b>")
        browser.wait(lambda: browser.text(".turn.model p") == page.answer[0])
        assert browser.run("return document.getElementById('chat-send').hidden")
        browser.wait(lambda: "3 tokens" in browser.text(".turn.model .took"))
        assert browser.text(".turn.model p") == "".join(page.answer)
        assert browser.text(".turn.user p") == "Hello & <b>you</b>"
        assert browser.run("return document.querySelectorAll('.log img, .log script, .log b').length") == 0
        assert browser.text("#chat-news").startswith("Answer complete")
        browser.run(SEND, "Again")
        browser.wait(lambda: browser.run("return document.querySelectorAll('.took').length") == 2)
        assert [turn["role"] for turn in page.asked[1]["messages"]] == ["user", "assistant", "user"]
        assert page.asked[1]["stream"] is True
        assert page.asked[1]["model"] == "tiny"


def test_an_answer_can_be_stopped(browser: Browser, offload: FakeModelHandle) -> None:
    page = Page(offload, answer=["word "] * 200, pause_s=0.1)
    with opened(browser, page):
        browser.run(SEND, "Go on")
        browser.wait(lambda: browser.text(".turn.model p"))
        browser.run("document.getElementById('chat-stop').click()")
        browser.wait(lambda: browser.text(".turn.model .took") == "stopped")
        assert browser.text(".turn.model p").startswith("word")
        assert not browser.run("return document.getElementById('chat-send').hidden")


def test_a_refusal_is_shown_and_typed_text_is_kept(browser: Browser, offload: FakeModelHandle) -> None:
    page = Page(offload, refuse=(429, "the queue is full; try again later"))
    with opened(browser, page):
        browser.run(SEND, "Hello")
        browser.wait(lambda: browser.text("#chat-error") == "the queue is full; try again later")
        assert browser.run("return document.getElementById('prompt').value") == "Hello"
        assert browser.run("return document.querySelectorAll('.turn').length") == 0
        page.refuse = None
        browser.run(SEND, "Hello")
        browser.wait(lambda: browser.text(".turn.model .took"))
        assert browser.run("return document.getElementById('chat-error').hidden")


def test_the_api_key_is_requested_and_used(browser: Browser, offload: FakeModelHandle) -> None:
    with opened(browser, Page(offload, key="secret")):
        browser.wait(lambda: not browser.run("return document.getElementById('key-form').hidden"))
        assert browser.text("#status-text") == "API key needed"
        browser.driver.find_element("id", "key").send_keys("secret\n")
        browser.wait(lambda: browser.text("#status-text") == "Live")
        browser.run(SEND, "Hello")
        browser.wait(lambda: browser.text(".turn.model .took"))


def test_a_lost_connection_is_shown(browser: Browser, offload: FakeModelHandle) -> None:
    with serve_app(Page(offload).app()) as url:
        browser.open(url)
        browser.wait(lambda: browser.text("#status-text") == "Live")
    browser.wait(lambda: browser.text("#status-text") == "Server unreachable, retrying")
    browser.driver.get("about:blank")


def test_charts_show_the_samples(browser: Browser, offload: FakeModelHandle) -> None:
    page = Page(offload)
    with opened(browser, page):
        browser.wait(lambda: "1running, 2 waiting" in browser.text(".chart:last-child .value"))
        page.progress.token(40)
        page.progress.first_token(0.25)
        label = (
            "return [...document.querySelectorAll('.chart svg')].map((svg) => svg.getAttribute('aria-label')).join()"
        )
        browser.wait(lambda: "250 ms" in browser.run(label))


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("shape", [(LAYERS, EXPERTS), (58, 256)])
def test_no_width_scrolls_sideways(browser: Browser, width: int, shape: tuple[int, int]) -> None:
    page = Page(FakeModelHandle(*[shape[1]] * shape[0]), answer=["x" * 400])
    with opened(browser, page, width=width, height=800):
        browser.run(SEND, "y" * 300)
        browser.wait(lambda: browser.text(".turn.model .took"))
        assert browser.run(OVERFLOW) <= 0


def test_fifteen_thousand_experts_are_drawn_quickly(browser: Browser) -> None:
    offload = FakeModelHandle(*[256] * 58)
    with opened(browser, Page(offload), width=1400):
        offload.state[:, ::2] = 2
        browser.wait(lambda: pixel(browser, 57, 254, 58, 256) == browser.run(COLOUR, "resident"))
        took_ms = browser.run(
            "const begin = performance.now(); document.querySelector('input[value=accesses]').click();"
            "document.querySelector('input[value=place]').click(); return performance.now() - begin"
        )
        assert took_ms < 2000  # two full redraws, on a machine that may be busy


def test_every_control_has_an_accessible_name(browser: Browser, offload: FakeModelHandle) -> None:
    with opened(browser, Page(offload, key="")):
        tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = {"button", "textbox", "spinbutton", "radio", "link", "application", "image", "region", "log", "heading"}
        shown = [node for node in tree if node.get("role", {}).get("value") in roles and not node.get("ignored")]
        assert len(shown) > 15
        for node in shown:
            assert node.get("name", {}).get("value", "").strip(), node
        headings = [node["name"]["value"] for node in shown if node["role"]["value"] == "heading"]
        assert {"finemoe", "Experts", "Chat"} <= set(headings)
        assert "experts in memory" in browser.text("#summary")


def test_text_has_enough_contrast(browser: Browser, offload: FakeModelHandle) -> None:
    pairs = [
        ("ink", "card"), ("soft", "card"), ("soft", "back"), ("accent", "card"), ("accent", "tint"),
        ("on-accent", "accent"), ("alarm", "alarm-back"), ("alarm", "back"), ("warn", "warn-back"), ("back", "ink"),
    ]  # fmt: skip
    for dark in (False, True):
        with opened(browser, Page(offload), dark=dark):
            for front, behind in pairs:
                ratio = contrast(browser.run(COLOUR, front), browser.run(COLOUR, behind))
                assert ratio >= 4.5, (front, behind, dark, ratio)


def test_focus_follows_reading_order(browser: Browser, offload: FakeModelHandle) -> None:
    with opened(browser, Page(offload)):
        order = []
        for _ in range(8):
            browser.driver.switch_to.active_element.send_keys("\ue004")  # tab
            order.append(browser.run("const e = document.activeElement; return e.id || e.name || e.className"))
        assert order == ["skip", "view", "map", "log", "prompt", "max-tokens", "temperature", "chat-send"]


def test_the_map_shows_a_real_model(browser: Browser, tiny: Make) -> None:
    import finemoe

    with finemoe.load(tiny(), expert_memory="50%") as model, opened(browser, Page(model.finemoe)):
        answer(model)
        experts = model.finemoe.experts()
        shape = experts.state.shape
        resident = browser.run(COLOUR, "resident")
        place = tuple(int(n[0]) for n in (experts.state == 2).nonzero())
        browser.wait(lambda: pixel(browser, *place, *shape) == resident)
        stats = model.finemoe.stats()
        browser.wait(lambda: browser.text("#total-value") == f"{stats.accesses:,}")


def contrast(front: str, behind: str) -> float:
    """The contrast ratio of two colours, as defined by WCAG."""

    def luminance(colour: str) -> float:
        digits = colour.removeprefix("#")
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(front), luminance(behind)), reverse=True)
    return (high + 0.05) / (low + 0.05)
