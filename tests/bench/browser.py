"""Headless Chromium for the report's tests, its bench and its picture: without network, in a profile of its own."""

import shutil
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "headless=new no-sandbox disable-quic disable-background-networking disable-gpu no-first-run "
    "disable-component-update disable-sync disable-dev-shm-usage hide-scrollbars"
)


def open_browser(profile: Path, width: int = 1360, height: int = 1000) -> Any:
    """A selenium driver that logs the console and every request. `profile` is a fresh folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM or ""
    for switch in [*SWITCHES.split(), f"user-data-dir={profile}", f"window-size={width},{height}"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


def set_scheme(driver: Any, scheme: str | None) -> None:
    """Ask for light or dark, as a system does."""
    features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def set_size(driver: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
