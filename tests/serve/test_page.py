"""The page in a real browser: text streams, pages of the cache light up, and are free again after a cancellation."""

import shutil
import time

import pytest
from servers import Running
from tiny import random_model

import llorch_jax as lj
from llorch_jax.serve.app import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)
# A new profile, and no connections of the browser's own.
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


class Slow(lj.Engine):
    """An engine whose steps take long enough to be seen."""

    def __init__(self, model, **sizes):
        super().__init__(model, **sizes)

        def slow(core):
            step = core.step

            def stepped():
                time.sleep(0.03)
                step()

            core.step = stepped

        self.inspect(slow)


@pytest.fixture(scope="module")
def engine():
    with Slow(random_model(), slots=2, page_size=8) as engine:
        engine.submit("a", max_new_tokens=2, temperature=0.5, top_logprobs=1).result(120)
        yield engine


@pytest.fixture(scope="module")
def browser(tmp_path_factory, engine):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = Running(engine, Settings("tiny", map_seconds=0.02))
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        driver.get(running.url)
        yield driver
    finally:
        driver.quit()
        running.close()


def element(browser, id):
    return browser.find_element("id", id)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def held(browser):
    return int(element(browser, "pages").get_attribute("data-held") or -1)


def fill(browser, **values):
    for id, value in values.items():
        field = element(browser, id)
        field.clear()
        field.send_keys(str(value))


def test_a_text_streams_and_its_pages_are_seen(browser, engine):
    wait_for(lambda: held(browser) == 0)
    assert len(browser.find_elements("css selector", "#pages i")) == engine.stats().pages.total
    fill(browser, prompt="the cat sat", max_tokens=30, temperature=0, top_k="")
    element(browser, "generate").click()
    wait_for(lambda: held(browser) > 0)
    wait_for(lambda: "ended by length" in element(browser, "told").text)
    wanted = lj.generate(engine.model, "the cat sat", max_new_tokens=30).text
    assert element(browser, "output").get_attribute("textContent") == "the cat sat" + wanted
    wait_for(lambda: held(browser) == 0)
    assert int(element(browser, "idle").text) > 0


def test_a_token_shows_its_probabilities_by_mouse_and_by_keyboard(browser):
    from selenium.webdriver import ActionChains, Keys

    token = browser.find_elements("css selector", "#output .token")[1]
    ActionChains(browser).move_to_element(token).perform()
    wait_for(lambda: "%" in element(browser, "tip").text)
    element(browser, "output").send_keys(Keys.ARROW_RIGHT)
    assert "%" in element(browser, "tip").text


def test_stopping_frees_the_pages(browser, engine):
    from selenium.webdriver import Keys

    before = engine.stats().cancelled
    fill(browser, prompt="another text", max_tokens=50)
    element(browser, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_for(lambda: held(browser) > 1)
    element(browser, "cancel").click()
    wait_for(lambda: "stopped after" in element(browser, "told").text)
    wait_for(lambda: held(browser) == 0)
    assert engine.stats().cancelled == before + 1


def test_two_requests_share_a_beginning(browser, engine):
    text = "the same beginning of"
    engine.submit(text, max_new_tokens=1).result(60)
    handles = [engine.submit(text, max_new_tokens=30, seed=n) for n in range(2)]
    wait_for(lambda: element(browser, "shared").text == "2")
    wait_for(lambda: browser.find_elements("css selector", "#requests button"))
    browser.find_element("css selector", "#requests button").click()
    wait_for(lambda: "Block table of request" in element(browser, "table").text)
    assert "*" in element(browser, "table").text
    for handle in handles:
        handle.result(60)


def test_an_error_is_shown(browser):
    fill(browser, prompt="a", max_tokens=5000)
    element(browser, "generate").click()
    wait_for(lambda: "within the context" in element(browser, "told").text)


def test_nothing_went_wrong_in_the_browser(browser):
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("400" in entry["message"] for entry in severe), severe
