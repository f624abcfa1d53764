"""The server's web page in Chromium: ``make page-test``. The page has to be built, and Chromium installed.

``POP_SCREENSHOTS`` names a directory that keeps a picture of each step.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.support.server import OPTIONS, serve
from tests.support.vision_models import convert, qwen3vl

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: run `make page-test`")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "Once upon a time, there was a little girl named Lily. She liked to play in the garden. What did she find?"
LONG_MS = 60_000


@contextlib.contextmanager
def serve_page(model, log, *options):
    """Yields a server of this model that has the page."""
    with serve(model, log, *options) as running:
        if "<html" not in running.client.get("/").text:
            pytest.skip("the page is not built: run `make page`")
        yield running


@pytest.fixture(scope="module")
def server(bundled_gguf, tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log.txt"
    options = ("--boundary", 8, *OPTIONS, "--chat-template", "chatml")
    with serve_page(bundled_gguf, log, *options) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(chromium, server, **options):
    """Yields the page in a new browser. Its requests to other hosts are refused, and raise an AssertionError."""
    context = chromium.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    elsewhere = []

    def check(route) -> None:
        if route.request.url.startswith(server.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route(re.compile("^https?://"), check)
    opened = context.new_page()
    opened.set_default_timeout(LONG_MS)
    opened.goto(server.url)
    opened.locator("textarea").first.wait_for()
    yield opened
    context.close()
    assert elsewhere == []


@pytest.fixture
def page(chromium, server, request):
    with open_page(chromium, server, **getattr(request, "param", {})) as opened:
        yield opened


def keep(page, name: str) -> None:
    if directory := os.environ.get("POP_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png")


def ask(page, text: str = QUESTION) -> None:
    page.locator("textarea").first.fill(text)
    page.get_by_role("button", name="Send").click()  # On a phone, Enter begins a new line.


def button(page):
    return page.locator("#pop-gguf button")


def answers(page) -> list[str]:
    return page.locator("#pop-gguf li").all_text_contents()


def wait_for_answers(page, number: int) -> list[str]:
    """Returns what is said of each answer, the newest first, once none of this number is being written."""
    page.wait_for_function(
        "number => { const texts = [...document.querySelectorAll('#pop-gguf li')].map(item => item.textContent);"
        " return texts.length === number && !texts.some(text => /reading|answering/.test(text)); }",
        arg=number,
    )
    return answers(page)


def test_each_answer_tells_the_time_to_its_first_token_and_what_was_pruned(page):
    keep(page, "start")
    ask(page)
    [told] = wait_for_answers(page, 1)
    assert re.fullmatch(r"first token after \d+ ms, (\d+) of (\d+) prompt tokens pruned, from layer 8 on", told)
    assert re.fullmatch(r"POP \u00b7 \d+ ms \u00b7 \d+/\d+ pruned", button(page).text_content())
    button(page).click()
    keep(page, "chat")
    ask(page, "And then?")
    assert "more from the cache" in wait_for_answers(page, 2)[0]


def test_switch_reads_prompts_by_all_layers_and_is_remembered(page):
    button(page).click()
    page.get_by_label("prune the prompts of further questions").uncheck()
    ask(page)
    [told] = wait_for_answers(page, 1)
    assert ", 0 of " in told and button(page).text_content().startswith("POP off")
    keep(page, "off")
    page.reload()
    page.locator("textarea").first.wait_for()
    assert button(page).text_content() == "POP off"


def test_stopped_answer_stops_the_server(page, server):
    ask(page, "Tell a long story. " * 40)
    page.wait_for_function("/answering/.test(document.querySelector('#pop-gguf li')?.textContent)")
    page.get_by_role("button", name="Stop").first.click()
    assert "stopped" in wait_for_answers(page, 1)[0]
    keep(page, "stopped")
    for _ in range(100):
        if not any(slot["is_processing"] for slot in server.get("/slots")):
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the server goes on with an answer that was stopped")


def attach(page, file: Path) -> None:
    page.get_by_role("button", name="Add files").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("menuitem", name="Add files").click()
    chooser.value.set_files(file)


def test_image_is_pruned_with_its_question_and_answered(chromium, tmp_path):
    model, picture = convert(qwen3vl, tmp_path), tmp_path / "ball.png"
    Image.new("RGB", (112, 168), (255, 0, 0)).save(picture)
    options = ("--boundary", 4, "--mmproj", model.with_name("mmproj-text.gguf"), *OPTIONS, "--n-predict", 8)
    with serve_page(model, tmp_path / "log.txt", *options) as server, open_page(chromium, server) as page:
        ask(page, "Which colour?")
        [text_alone] = wait_for_answers(page, 1)
        page.goto(server.url)
        attach(page, picture)
        page.get_by_alt_text(picture.name).wait_for()
        ask(page, "Which colour?")
        [told] = wait_for_answers(page, 1)
        keep(page, "image")
        n_image = 24  # 112 x 168 pixels, and each token is a square of 28 x 28
        pruned = [int(re.search(r"(\d+) of \d+ prompt tokens pruned", text)[1]) for text in (text_alone, told)]
        assert pruned[1] - pruned[0] >= n_image


PHONE = {"viewport": {"width": 375, "height": 667}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.mark.parametrize("page", [PHONE, {**PHONE, "color_scheme": "dark"}], ids=["light", "dark"], indirect=True)
def test_page_fits_a_phone(page, request):
    # No other button lies below ours, also none of the closed menu. Messages, which scroll below it, are not there yet.
    assert (
        page.evaluate(
            "() => { const own = document.querySelector('#pop-gguf button').getBoundingClientRect();"
            " return [...document.querySelectorAll('button, a, textarea')].filter(item => !item.closest('#pop-gguf'))"
            " .map(item => item.getBoundingClientRect()).filter(box => box.width && box.left < own.right &&"
            " box.right > own.left && box.top < own.bottom && box.bottom > own.top).length }"
        )
        == 0
    )
    ask(page)
    wait_for_answers(page, 1)
    name = request.node.callspec.id
    keep(page, f"phone-{name}")
    button(page).click()
    keep(page, f"phone-{name}-open")
    box = page.locator("#pop-gguf").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_page_is_dark_where_the_system_is(page):
    ask(page)
    wait_for_answers(page, 1)
    button(page).click()
    keep(page, "dark")
    shown = page.locator("#pop-gguf-list").evaluate("item => getComputedStyle(item).backgroundColor")
    assert re.match(r"rgba?\(24, 24, 27", shown)
