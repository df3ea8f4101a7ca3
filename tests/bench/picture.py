"""A picture of a page of a report, as the README has one.

    python tests/bench/picture.py data/report/runs/RUN/features.html#39 docs/features.png [--scheme dark]

Needs chromium and chromedriver. 256 colours are enough for a page, and a third of the bytes.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

from browser import open_browser, set_scheme, set_size
from PIL import Image

SETTLED_S = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="A file of the report, with #LATENT or without.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--size", default="1360x900")
    asked = parser.parse_args()
    path, _, latent = asked.page.partition("#")
    width, height = map(int, asked.size.split("x"))
    with tempfile.TemporaryDirectory() as profile:
        driver = open_browser(Path(profile))
        try:
            set_scheme(driver, asked.scheme)
            set_size(driver, width, height)
            driver.get(Path(path).resolve().as_uri() + (f"#{latent}" if latent else ""))
            time.sleep(SETTLED_S)
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
        finally:
            driver.quit()
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(256).save(asked.picture, optimize=True)
    print(f"{asked.picture}: {asked.picture.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
