"""Promise: notes, map, comparison, the URL and the controls of a feature do in a real browser what they say, on wide
screens and phones, by keys too, and axe-core finds nothing on any page, light or dark.
"""

import json
import math
from pathlib import Path

import pytest
import toy_browser as toy
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_notes(browser, reported):
    """Every test begins and ends without notes, on a wide screen."""
    browser.get(toy.url(reported))
    browser.execute_script("localStorage.clear()")
    yield
    browser.execute_script("localStorage.clear()")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    toy.tools.set_scheme(browser, None)


def fill(browser, selector: str, text: str) -> None:
    """Type over a field and leave it."""
    field = toy.one_of(browser, selector)
    field.clear()
    field.send_keys(text, Keys.TAB)


def chunk(report: Path, start: str, latent: int) -> dict:
    folder = report / "runs" / toy.named(report, start) / "data"
    return toy.data_of(folder / f"{latent // 64}.js")[str(latent)]


def test_a_search_shows_its_first_match_and_a_number_comes_first(browser, reported):
    toy.browse(browser, reported)
    every = toy.latents(browser)
    search = toy.one_of(browser, "#search")
    wanted = every[-1]
    search.send_keys(str(wanted))
    toy.opened(browser, wanted)
    assert toy.latents(browser)[0] == wanted
    assert browser.current_url.endswith(f"q={wanted}&latent={wanted}")
    search.clear()
    search.send_keys("<")
    toy.opened(browser, toy.latents(browser)[0])
    assert toy.all_of(browser, "#list .chip.match"), "the tokens that were searched for are marked"


def test_filters_order_and_context_are_in_the_url(browser, reported):
    toy.browse(browser, reported)
    table = toy.index(reported)
    middle = sorted(row["max"] for row in table.values())[len(table) // 2]
    Select(toy.one_of(browser, "#sort")).select_by_value("density")
    toy.one_of(browser, "#order").click()
    toy.one_of(browser, "#filters summary").click()
    toy.one_of(browser, '[data-filter="max"][data-end="1"]').send_keys(str(middle))
    Select(toy.one_of(browser, "#context")).select_by_value("8")
    address, listed = browser.current_url, toy.latents(browser)
    assert "max.max=" in address and "sort=density" in address and "order=smallest" in address
    browser.get("about:blank")
    browser.get(address)
    toy.wait(browser, lambda: toy.all_of(browser, "#feature .context"))
    assert toy.latents(browser) == listed
    assert {table[one]["max"] <= middle for one in listed} == {True}
    assert Select(toy.one_of(browser, "#context")).first_selected_option.get_attribute("value") == "8"
    links = toy.all_of(browser, "#list a")[:2]
    assert links
    for link in links:
        assert "sort=density" in link.get_attribute("href"), "links keep the state of the page"


def test_the_context_is_as_long_as_asked_for(browser, reported):
    toy.browse(browser, reported, state="context=8")
    assert max(len(toy.all_of(one, ".tokens bdi")) for one in toy.all_of(browser, ".context")) == 17
    Select(toy.one_of(browser, "#context")).select_by_value("all")
    assert max(len(toy.all_of(one, ".tokens bdi")) for one in toy.all_of(browser, ".context")) > 17
    for one in toy.all_of(browser, ".context"):
        assert toy.all_of(one, ".peak"), "whatever the length, the strongest token is there"


def test_a_feature_shows_its_figures_and_likes(browser, reported):
    toy.browse(browser, reported)
    latent = int(toy.one_of(browser, "#feature").get_attribute("data-latent"))
    feature = chunk(reported, "temporal-matryoshka", latent)
    told = [one.get_attribute("aria-label") for one in toy.all_of(browser, "#feature .chart")]
    n = sum(feature["histogram"][1])
    assert told[0].startswith(f"Histogram of {n:,} activations from 0 to ")
    for _, quantile, _, _ in feature["contexts"]:
        assert quantile is None or f"{round(100 * quantile)}% " in told[0]
    assert f"{sum(feature['logits'][2]):,} tokens' logits" in told[1]
    assert "of x itself" in told[2]
    for title, name in (("Nearest", "near"), ("Opposite", "opposite"), ("Correlated", "correlated")):
        block = next(one for one in toy.all_of(browser, ".pairs") if one.text.startswith(title))
        assert [int(one.text) for one in toy.all_of(block, "a")] == [other for other, _ in feature[name]]
    columns = toy.all_of(browser, ".side-by-side > section")
    assert columns[0].rect["y"] == columns[1].rect["y"], "examples side by side"


def test_a_feature_is_copied_as_text(browser, reported):
    toy.browse(browser, reported)
    browser.execute_script("tcsae.copy = (text) => { window.copied = text; }")
    toy.one_of(browser, "#copy").click()
    text = browser.execute_script("return window.copied")
    latent = toy.one_of(browser, "#feature").get_attribute("data-latent")
    assert text.startswith(f"Latent {latent} of {toy.named(reported, 'temporal-matryoshka')}")
    assert "density" in text and "⟦" in text and "promotes: " in text
    assert toy.one_of(browser, ".toolbar .hint").text == "copied"


def test_keys_reach_number_search_and_neighbours(browser, reported):
    toy.browse(browser, reported)
    wanted = toy.latents(browser)[4]
    toy.one_of(browser, "body").send_keys("g")
    assert browser.switch_to.active_element.get_attribute("id") == "go"
    browser.switch_to.active_element.send_keys(str(wanted), Keys.ENTER)
    toy.opened(browser, wanted)
    toy.one_of(browser, "body").send_keys("j")
    toy.opened(browser, toy.latents(browser)[5])


def test_notes_stay_and_show_wherever_the_latent_is_named(browser, reported):
    toy.browse(browser, reported)
    latent = int(toy.one_of(browser, "#feature").get_attribute("data-latent"))
    fill(browser, "#note-label", "</b>closing & <i>")
    fill(browser, "#note-tags", "syntax, html , syntax")
    fill(browser, "#note-lists", "to check")
    assert toy.one_of(browser, "#feature h2 .label").text == "</b>closing & <i>"
    assert toy.one_of(browser, "#list a[aria-current] .label").text.startswith("</b>closing")
    toy.browse(browser, reported, state=f"latent={latent}")
    assert toy.one_of(browser, "#note-tags").get_attribute("value") == "syntax, html"
    toy.one_of(browser, "#notes summary").click()
    Select(toy.one_of(browser, "#noted")).select_by_visible_text("tag syntax")
    assert toy.latents(browser) == [latent]
    assert "noted=tag" in browser.current_url
    name = toy.named(reported, "temporal-matryoshka")
    browser.get(toy.url(reported, name, "index.html"))
    links = toy.all_of(browser, f'a[data-latent="{latent}"]')
    assert links and all("closing" in one.text for one in links)
    browser.get(toy.url(reported, name, f"map.html#latent={latent}"))
    toy.wait(browser, lambda: toy.all_of(browser, "#chosen .label"))
    other = toy.named(reported, "topk")
    toy.browse(browser, reported, other, f"latent={latent}")
    assert not toy.all_of(browser, "#feature h2 .label"), "another SAE's latent of that number is another"


def test_notes_are_exported_and_imported_with_delphis_explanations(browser, reported, tmp_path):
    toy.browse(browser, reported)
    first, second, third = toy.latents(browser)[:3]
    toy.opened(browser, first)
    fill(browser, "#note-label", "kept")
    held = json.loads(browser.execute_script("return tcsae.notes.exported()"))
    (run,) = held["runs"].values()
    assert held["format"] == "tcsae-notes"
    assert run["latents"] == {str(first): {"label": "kept", "tags": [], "lists": []}}
    browser.execute_script("localStorage.clear()")
    toy.browse(browser, reported)
    assert not toy.all_of(browser, ".label")
    ours, delphi = tmp_path / "notes.json", tmp_path / f"layers.2_latent{second}.txt"
    ours.write_text(json.dumps(held))
    delphi.write_text(json.dumps("Words after a </tag>"))
    toy.one_of(browser, "#notes summary").click()
    toy.one_of(browser, "#notes-file").send_keys(f"{ours}\n{delphi}")
    toy.wait(browser, lambda: toy.one_of(browser, "#notes-said").text == "2 notes read")
    labels = [one.text for one in toy.all_of(browser, "#list .label")]
    assert labels[:2] == ["kept", "Words after a </tag>"]
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    toy.one_of(browser, "#notes-file").send_keys(str(bad))
    toy.wait(browser, lambda: "bad.json is no JSON" in toy.one_of(browser, "#notes-said").text)
    table = tmp_path / "table.json"
    table.write_text(json.dumps([{"index": third, "description": "of a table"}]))
    toy.one_of(browser, "#notes-file").send_keys(str(table))
    toy.wait(browser, lambda: "1 note read" in toy.one_of(browser, "#notes-said").text)
    assert "of a table" in [one.text for one in toy.all_of(browser, "#list .label")]


def test_the_map_is_coloured_chosen_and_opened(browser, reported):
    name = toy.named(reported, "temporal-matryoshka")
    browser.get(toy.url(reported, name, "map.html"))
    toy.wait(browser, lambda: toy.one_of(browser, "#map").get_attribute("data-ready"))
    table = toy.index(reported)
    Select(toy.one_of(browser, "#colour")).select_by_value("density")
    values = sorted(row["density"] for row in table.values())
    assert math.isclose(float(toy.one_of(browser, "#ramp-high").text), values[-1], rel_tol=0.01)
    held = toy.data_of(reported / "runs" / name / "data" / "map.js")
    x, y = held["places"]["PCA"][0]
    width, height, size = browser.execute_script(
        "const c = document.getElementById('map'); return [c.clientWidth, c.clientHeight, "
        "Math.min(c.clientWidth, c.clientHeight) / 2 - 14]"
    )
    canvas = toy.one_of(browser, "#map")

    def click() -> None:
        offset = round(x * size), round(-y * size)
        ActionChains(browser).move_to_element_with_offset(canvas, *offset).click().perform()

    assert abs(x * size) < width / 2 and abs(y * size) < height / 2
    click()
    chosen = toy.wait(browser, lambda: toy.all_of(browser, "#chosen h2 a"))[0]
    latent = int(chosen.get_attribute("data-latent"))
    distances = [math.dist(place, (x, y)) for place in held["places"]["PCA"]]
    assert distances[list(table).index(latent)] == min(distances)
    assert f"latent={latent}" in browser.current_url and "colour=density" in browser.current_url
    canvas.send_keys(Keys.ARROW_LEFT if x > 0 else Keys.ARROW_RIGHT)  # towards the others
    toy.wait(browser, lambda: f"Latent {latent}" not in toy.one_of(browser, "#chosen h2").text)
    canvas.send_keys(Keys.ENTER)
    toy.wait(browser, lambda: toy.all_of(browser, "#feature .context"))


def test_two_saes_are_compared(browser, reported):
    runs = {run["name"]: run for run in toy.data_of(reported / "compare" / "runs.js")}
    a, b = (runs[toy.named(reported, start)] for start in ("logged-run2", "logged-run4"))
    low, high = sorted((a["number"], b["number"]))
    text = (reported / "compare" / f"{low}-{high}.js").read_text()
    pair = json.loads(text[text.index(",") + 1 : text.rindex(")")])
    browser.get(toy.url(reported, "", f"compare.html#a={low}&b={high}&from=0.5"))
    ready = lambda: toy.one_of(browser, "#compare").get_attribute("data-ready")  # noqa: E731
    toy.wait(browser, lambda: ready() == f"{low}-{high}")
    names = {run["number"]: run["name"] for run in runs.values()}
    latents = [list(toy.index(reported, names[number])) for number in (low, high)]
    both = [
        latent
        for latent, best, cosine in zip(latents[0], *pair["a"], strict=True)
        if cosine >= 0.5 and pair["b"][0][latents[1].index(best)] == latent
    ]
    alone = sum(cosine < 0.5 for cosine in pair["a"][1])
    verdict = toy.one_of(browser, "#verdict").text
    assert verdict.startswith(f"{len(both)} latents are each other's nearest at a cosine of 0.5 or more")
    assert f"Without a match: {alone} of {names[low]}" in verdict
    assert len(toy.all_of(browser, "#only-a tbody tr")) == min(40, alone)
    assert toy.all_of(browser, "#only-a a[href*='features.html#latent=']") or not alone
    fill(browser, "#from", "0")
    assert "Without a match: 0 of" in toy.one_of(browser, "#verdict").text
    assert toy.all_of(browser, "#scatter .diagonal")
    assert len(toy.all_of(browser, "#scatter circle")) >= 2
    toy.one_of(browser, "#turn").click()
    toy.wait(browser, lambda: ready() == f"{high}-{low}")


def test_values_come_first_and_differences_on_demand(browser, reported):
    browser.get(toy.url(reported))
    cell = toy.one_of(browser, "#time tbody td.n[data-value]:not([data-value='']):nth-child(n+3)")
    value = float(cell.get_attribute("data-value"))
    assert cell.text.startswith(f"{value:.3f}") and "null" in cell.text
    difference = toy.one_of(cell, ".difference")
    assert not difference.is_displayed()
    toy.one_of(browser, "#differences").click()
    assert difference.is_displayed()


def test_headings_lead_to_the_glossary(browser, reported):
    browser.get(toy.url(reported))
    heads = toy.all_of(browser, "#results thead th")[6:]
    assert heads
    for head in heads:
        assert "glossary.html#" in toy.one_of(head, "a").get_attribute("href")
    link = next(one for one in toy.all_of(browser, "#results thead a") if one.text == "EV")
    link.click()
    assert toy.all_of(browser, "dt:target"), "the entry is marked"


def test_on_a_phone_the_feature_comes_before_the_list_and_tables_say_that_they_scroll(browser, reported):
    toy.tools.set_size(browser, 390, 844)
    browser.get(toy.url(reported))
    wide = [one for one in toy.all_of(browser, ".wide") if one.get_attribute("tabindex") == "0"]
    assert wide and all("scrolls sideways" in one.get_attribute("aria-label") for one in wide)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    toy.browse(browser, reported)
    assert toy.one_of(browser, "#feature").rect["y"] < toy.one_of(browser, "#search").rect["y"]
    toy.one_of(browser, ".find-link").click()
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    name = toy.named(reported, "topk")
    pages = [toy.url(reported, name, page) for page in ("index.html", "map.html")]
    for page in (*pages, toy.url(reported, "", "compare.html"), toy.url(reported, "", "glossary.html")):
        browser.get(page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, page


PAGES = {
    "overview": ("", "index.html", "#results"),
    "glossary": ("", "glossary.html", "dl"),
    "compare": ("", "compare.html", "#compare[data-ready]"),
    "sae": ("temporal-matryoshka", "index.html", "figure"),
    "features": ("temporal-matryoshka", "features.html", "#feature .context"),
    "map": ("temporal-matryoshka", "map.html", "#map[data-ready]"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_has_nothing_to_say(browser, reported, page, scheme):
    start, file, there = PAGES[page]
    toy.tools.set_scheme(browser, scheme)
    browser.get("about:blank")
    browser.get(toy.url(reported, toy.named(reported, start) if start else "", file))
    toy.wait(browser, lambda: toy.all_of(browser, there))
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    assert toy.complaints(browser) == []
