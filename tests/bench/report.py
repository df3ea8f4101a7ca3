"""What a report costs: seconds of the clock and of all cores, peak memory, size, and how fast its pages open.

    tcsae harvest train eval
    python tests/bench/report.py [--store data/activations.zarr] [--runs data/runs] [--run NAME ...] [--split eval]

The report is written by the command line in a process of its own, whose peak is what the system counts (libraries
included). Pages are opened in headless Chromium, from disk, in a profile without a cache: until the load event, and for
the browser of features until the first one stands there. Needs chromium and chromedriver for that.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from browser import CHROMIUM, DRIVER, open_browser

OPENED = 5
"""Times that each page is opened."""


def write(arguments: list[str], out: Path) -> dict[str, float]:
    """Seconds, of the clock and of the processor, and peak memory of `tcsae report`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tcsae", *arguments, "--out", str(out), "--force"], check=True)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss * 1024 / 1e6}


def sizes(out: Path) -> dict[str, float]:
    """MB of the folder, and of it as a zip."""
    files = [file for file in out.rglob("*") if file.is_file()]
    archive = Path(shutil.make_archive(str(out.with_suffix("")) + "-zip", "zip", out))
    return {
        "files": len(files),
        "mb": sum(file.stat().st_size for file in files) / 1e6,
        "zip_mb": archive.stat().st_size / 1e6,
    }


def opening(out: Path, profile: Path) -> dict[str, float]:
    """Median seconds until each kind of page is there."""
    driver = open_browser(profile)
    largest = max((out / "runs").iterdir(), key=lambda one: (one / "data" / "index.js").stat().st_size)
    folder = f"{out.as_uri()}/runs/{quote(largest.name, safe='')}"
    pages = {
        "overview": (f"{out.as_uri()}/index.html", "main"),
        "sae": (f"{folder}/index.html", "main"),
        "features": (f"{folder}/features.html", "#feature .context"),
    }
    result = {}
    try:
        for name, (address, wanted) in pages.items():
            seconds = []
            for _ in range(OPENED):
                driver.get("about:blank")
                start = time.perf_counter()
                driver.get(address)
                while not driver.find_elements("css selector", wanted):
                    time.sleep(0.005)
                seconds.append(time.perf_counter() - start)
            result[f"{name}_s"] = statistics.median(seconds)
    finally:
        driver.quit()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/activations.zarr")
    parser.add_argument("--runs", default="data/runs")
    parser.add_argument("--run", nargs="*", default=[])
    parser.add_argument("--split", default="eval")
    asked = parser.parse_args()
    arguments = ["--store", asked.store, "--runs", asked.runs, "report", "--split", asked.split]
    arguments += [part for name in asked.run for part in ("--run", name)]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "report"
        figures = write(arguments, out) | sizes(out)
        if CHROMIUM and DRIVER:
            figures |= opening(out, Path(temporary) / "profile")
    for name, value in figures.items():
        print(f"{name:12} {value:,.2f}")
    print(json.dumps({"bench": "report", "runs": asked.run or "all", "split": asked.split} | figures))


if __name__ == "__main__":
    main()
