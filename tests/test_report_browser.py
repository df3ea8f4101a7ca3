"""Promise: a report opens from disk in a real browser: no console error, no request but for its own files, and sort,
search, filters, links and keys do what they say. Needs chromium and chromedriver (Debian's packages).

Without them these tests are skipped; where TCSAE_BROWSER is set (CI sets it) they fail instead.
"""

import shutil

import pytest
import toy_browser as toy
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.slow


@pytest.fixture
def report(reported):
    return reported


def test_tables_sort_by_their_headings(browser, report):
    browser.get(toy.url(report))
    table = browser.find_element(By.CSS_SELECTOR, "#results table")
    head = next(one for one in table.find_elements(By.CSS_SELECTOR, "thead th") if one.text.startswith("EV"))

    def column() -> list[float]:
        at = table.find_elements(By.CSS_SELECTOR, "thead th").index(head) + 1
        cells = table.find_elements(By.CSS_SELECTOR, f"tbody:not(.baselines) tr > :nth-child({at})")
        return [float(one.get_attribute("data-value")) for one in cells]

    button = head.find_element(By.TAG_NAME, "button")
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    values = column()
    assert len(values) >= 4
    assert values == sorted(values, reverse=True)
    assert values[0] != values[-1]
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(values)


def test_every_page_of_every_sae_opens(browser, report):
    folders = sorted((report / "runs").iterdir())
    assert folders
    for folder in folders:
        browser.get(toy.url(report, folder.name, "index.html"))
        assert browser.find_element(By.TAG_NAME, "h1").text.endswith(folder.name), "an odd name shows as it is"
        assert len(browser.find_elements(By.CSS_SELECTOR, "figure svg")) >= 6
        browser.find_element(By.LINK_TEXT, "Features").click()
        WebDriverWait(browser, 10).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#feature .context"))
        assert toy.latents(browser)
        browser.find_element(By.LINK_TEXT, "Overview").click()
        assert browser.find_element(By.ID, "results")


def test_features_sort_by_every_measure(browser, report):
    toy.browse(browser, report)
    table = toy.index(report)
    select = Select(browser.find_element(By.ID, "sort"))
    assert {one.get_attribute("value") for one in select.options} == {*next(iter(table.values())), "latent"}
    order = browser.find_element(By.ID, "order")
    for measure in ("density", "dwell", "position_share", "decoder_cosine"):
        select.select_by_value(measure)
        values = [table[one][measure] for one in toy.latents(browser)]
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=True)
        assert values[: len(known)] == known, "what is not known comes last"
        order.click()
        assert order.text == "smallest first"
        values = [table[one][measure] for one in toy.latents(browser)]
        assert [value for value in values if value is not None] == sorted(known)
        order.click()


def test_search_finds_by_token_and_by_number(browser, report):
    toy.browse(browser, report)
    every = toy.latents(browser)
    search = browser.find_element(By.ID, "search")
    search.send_keys(str(every[3]))
    assert every[3] in toy.latents(browser)
    search.clear()
    search.send_keys("<")
    result = toy.latents(browser)
    assert 0 < len(result) < len(every)
    rows = browser.find_elements(By.CSS_SELECTOR, "#list a")[:3]
    assert rows
    for row in rows:
        row.click()
        toy.opened(browser, int(row.find_element(By.CLASS_NAME, "id").text))
        fires = [one.text for one in browser.find_elements(By.CSS_SELECTOR, ".fires .chip")]
        assert any("<" in one for one in fires)
    assert browser.find_element(By.ID, "count").text.startswith(f"{len(result)} of ")
    browser.find_element(By.ID, "promoted").click()
    assert len(toy.latents(browser)) >= len(result)
    search.clear()
    search.send_keys("no token has this in it")
    assert toy.latents(browser) == []


def test_filters_and_their_presets(browser, report):
    toy.browse(browser, report)
    table = toy.index(report)
    browser.find_element(By.CSS_SELECTOR, '[data-preset="slow"]').click()
    result = toy.latents(browser)
    assert 0 < len(result) < len(table)
    bounds = {}
    for one in browser.find_elements(By.CSS_SELECTOR, "[data-filter]"):
        if one.get_attribute("value"):
            bounds[one.get_attribute("data-filter"), one.get_attribute("data-end")] = float(one.get_attribute("value"))
    assert set(bounds) == {("rho_8_within", "0"), ("density", "1")}, "the preset shows what it means"
    expected = {
        latent
        for latent, row in table.items()
        if row["rho_8_within"] is not None
        and row["rho_8_within"] >= bounds["rho_8_within", "0"]
        and row["density"] <= bounds["density", "1"]
    }
    assert set(result) == expected
    at_most = browser.find_element(By.CSS_SELECTOR, '[data-filter="max"][data-end="1"]')
    middle = sorted(table[one]["max"] for one in result)[len(result) // 2]
    at_most.send_keys(str(middle))
    assert set(toy.latents(browser)) == {one for one in result if table[one]["max"] <= middle}
    browser.find_element(By.CSS_SELECTOR, '[data-preset=""]').click()
    assert len(toy.latents(browser)) == len(table)


def test_one_feature_is_linked_by_its_url(browser, report):
    toy.browse(browser, report)
    wanted = toy.latents(browser)[-1]
    toy.browse(browser, report, state=f"latent={wanted}")
    toy.opened(browser, wanted)
    assert browser.find_element(By.CSS_SELECTOR, "#feature h2").text.startswith(f"Latent {wanted}")
    near = browser.find_element(By.CSS_SELECTOR, ".pairs li a")
    other = int(near.text)
    near.click()
    toy.opened(browser, other)
    assert browser.current_url.endswith(f"#latent={other}")
    browser.back()
    toy.opened(browser, wanted)
    toy.browse(browser, report, state=str(wanted))  # as links were before
    toy.opened(browser, wanted)
    browser.get(browser.current_url.split("#")[0] + "#latent=99999")
    WebDriverWait(browser, 10).until(lambda _: "not among" in browser.find_element(By.ID, "feature").text)


def test_everything_is_reached_by_keys(browser, report):
    toy.browse(browser, report)
    body = browser.find_element(By.TAG_NAME, "body")
    first, second = toy.latents(browser)[:2]
    toy.opened(browser, first)
    body.send_keys("j")
    toy.opened(browser, second)
    body.send_keys("k")
    toy.opened(browser, first)
    body.send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    seen = []
    for _ in range(14):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("data-preset") or active.tag_name)
    assert {"promoted", "sort", "order", "slow", "position", "summary", "a"} <= set(seen)
    token = browser.find_element(By.CSS_SELECTOR, ".tokens .on")
    browser.execute_script("arguments[0].focus()", token)
    readout = browser.find_element(By.CSS_SELECTOR, ".readout")
    assert "position" in readout.text
    before = readout.text
    token.send_keys(Keys.ARROW_RIGHT)
    assert readout.text != before
    assert browser.switch_to.active_element.get_attribute("class").startswith("on")


def test_shading_is_never_colour_alone(browser, report):
    toy.browse(browser, report)
    contexts = browser.find_elements(By.CSS_SELECTOR, "#feature .context")
    assert contexts
    for context in contexts:
        peak = context.find_elements(By.CSS_SELECTOR, ".peak")
        assert len(peak) == 1
        assert int(peak[0].value_of_css_property("font-weight")) >= 700
        assert peak[0].value_of_css_property("outline-style") == "solid"
        on = context.find_elements(By.CSS_SELECTOR, ".on")
        assert on
        assert all(float(one.value_of_css_property("border-bottom-width").removesuffix("px")) >= 1 for one in on)
        assert all(one.get_attribute("title") for one in on)
        assert context.find_elements(By.CSS_SELECTOR, ".strip .bars")


def test_hostile_text_shows_as_text(browser, report):
    toy.browse(browser, report, state="context=all")
    texts = [one.get_attribute("textContent") for one in browser.find_elements(By.CSS_SELECTOR, ".tokens")]
    assert any("</script><script>hacked=1</script><img/>" in text for text in texts)
    assert browser.find_elements(By.CSS_SELECTOR, "main script, main img") == []
    # Every token stands apart, so that none turns the direction of its neighbours.
    assert browser.find_element(By.CSS_SELECTOR, ".tokens bdi").value_of_css_property("unicode-bidi") == "isolate"


def test_light_and_dark(browser, report):
    def paper() -> int:
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    shades = {}
    for scheme in ("light", "dark"):
        toy.tools.set_scheme(browser, scheme)
        browser.get(toy.url(report))
        browser.execute_script("localStorage.clear()")
        browser.refresh()
        shades[scheme] = paper()
        browser.find_element(By.ID, "theme").click()
        assert (paper() < 380) == (scheme == "light"), "the button turns it round"
        browser.get(toy.url(report, toy.named(report, "topk"), "index.html"))
        assert (paper() < 380) == (scheme == "light"), "and it stays"
    assert shades["dark"] < 150 < 700 < shades["light"]
    browser.execute_script("localStorage.clear()")
    toy.tools.set_scheme(browser, None)


def test_nothing_is_wider_than_a_narrow_screen(browser, report):
    toy.tools.set_size(browser, 400, 800)
    try:
        browser.get(toy.url(report))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        toy.browse(browser, report)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_folder_that_is_not_whole_says_so(chromium, report, tmp_path):
    """The file that is missing is an error in the console too, so this one looks at nothing else."""
    shutil.copytree(report, tmp_path / "broken")
    for file in (tmp_path / "broken" / "sequences").glob("[0-9]*.js"):
        file.unlink()
    chromium.get(toy.url(tmp_path / "broken", toy.named(report, "topk"), "features.html"))
    WebDriverWait(chromium, 10).until(lambda _: "is missing" in chromium.find_element(By.ID, "feature").text)
