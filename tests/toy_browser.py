"""A report in headless Chromium: what the browser's tests share. No test itself."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
AXE = Path(os.environ.get("TCSAE_AXE", ROOT / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"))
"""axe-core as npm installs it: npm install --prefix build/axe axe-core"""
spec = importlib.util.spec_from_file_location("browser", Path(__file__).parent / "bench" / "browser.py")
assert spec is not None and spec.loader is not None
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)


def missing(what: str, cure: str) -> None:
    """Skip; where TCSAE_BROWSER is set (CI sets it), fail."""
    if os.environ.get("TCSAE_BROWSER"):
        pytest.fail(f"TCSAE_BROWSER is set, but {what} is not there: {cure}")
    pytest.skip(f"needs {what}: {cure}")


def need_browser() -> None:
    if not (tools.CHROMIUM and tools.DRIVER):
        missing("chromium with chromedriver", "apt-get install chromium-driver")


def need_axe() -> str:
    """The source of axe-core."""
    if not AXE.is_file():
        missing("axe-core", "npm install --prefix build/axe axe-core")
    return AXE.read_text(encoding="utf-8")


def forget(driver: Any) -> None:
    """Empty the logs, and leave the page: one whose server has ended would go on to log that it does not answer."""
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)


def check_quiet(driver: Any, schemes: frozenset[str] = frozenset({"file", "data", "blob"})) -> None:
    """No error was logged, no text of the corpus ran as a script, and nothing else was read than by `schemes`."""
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == [], severe
    assert driver.execute_script("return window.hacked === undefined")
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert urls, "the log itself has to hold what was read"
    assert {url.split(":")[0] for url in urls} - {"chrome"} <= schemes, "chrome: the browser's own first page"


def url(report: Path, name: str = "", page: str = "index.html") -> str:
    return report.as_uri() + (f"/runs/{quote(name, safe='')}/{page}" if name else f"/{page}")


def named(report: Path, start: str) -> str:
    return next(path.name for path in sorted((report / "runs").iterdir()) if path.name.startswith(start))


def wait(driver: Any, condition: Any, seconds: float = 60) -> Any:
    """Until `condition()` holds; a busy machine may take its time."""
    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(lambda _: condition())


def all_of(driver: Any, selector: str) -> list[Any]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def one_of(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def browse(driver: Any, report: Path, start: str = "temporal-matryoshka", state: str = "") -> None:
    """Open the feature browser, anew, and wait for a feature."""
    driver.get("about:blank")
    driver.get(url(report, named(report, start), "features.html") + (f"#{state}" if state else ""))
    wait(driver, lambda: all_of(driver, "#feature .context"))


def latents(driver: Any) -> list[int]:
    return [int(one.text) for one in all_of(driver, "#list .id")]


def opened(driver: Any, latent: int) -> None:
    wait(driver, lambda: one_of(driver, "#feature").get_attribute("data-latent") == str(latent))


def data_of(path: Path) -> Any:
    """What a data script hands to the page."""
    text = path.read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


def index(report: Path, start: str = "temporal-matryoshka") -> dict[int, dict[str, Any]]:
    """The measures by latent, as the page has them."""
    held = data_of(report / "runs" / named(report, start) / "data" / "index.js")
    rows = zip(held["latents"], *held["columns"].values(), strict=True)
    return {latent: dict(zip(held["columns"], values, strict=True)) for latent, *values in rows}


def complaints(driver: Any) -> list[str]:
    """What axe-core says of the page that is open: contrast, names, roles, keyboard (WCAG 2.1 AA)."""
    driver.execute_script(need_axe())
    result = driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run({preload: false, runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}).then(done);"
    )
    return [f"{one['id']}: {node['html'][:160]}" for one in result["violations"] for node in one["nodes"][:4]]
