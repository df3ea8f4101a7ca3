"""How fast a report of many latents opens: 16K latents of an SAE, on a store of a million tokens, made up.

    python tests/bench/report_scale.py [--latents 16384] [--tokens 1M]

Nothing is trained: the data files have the sizes that a report of that many latents has (every latent with six labels,
thirteen measures, a dozen sequences of 128 tokens, an entry on the map), and the pages are the real ones. Printed are
the median seconds until the first feature, the first search's match and the map are there, in headless Chromium, from
disk, in a profile without a cache; and the processor seconds of the page's main thread, which a busy machine does not
stretch. Needs chromium and chromedriver.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from browser import open_browser

from tcsae.evaluate.report.features.decoder_map import OPPOSITE_FROM, DecoderMap
from tcsae.evaluate.report.features.shown_feature import LABELS
from tcsae.evaluate.report.pages.page_files import Pages
from tcsae.shared.base.settings import parse_count

OPENED, VOCABULARY, LENGTH, PER_CHUNK, PER_FILE = 3, 4096, 128, 64, 32
N_CONTEXTS = 13


def short(value: float) -> float:
    return float(f"{value:.3g}")


def feature(rng: random.Random, n_latents: int, n_sequences: int) -> dict[str, Any]:
    """One latent, as long as a real one."""
    likes = [[rng.randrange(n_latents), short(rng.random())] for _ in range(6)]
    tokens = [[rng.randrange(VOCABULARY), short(rng.random() * 9)] for _ in range(8)]
    contexts: list[list[Any]] = []
    for i in range(N_CONTEXTS):
        positions = sorted(rng.sample(range(LENGTH), 4))
        quantile = None if i < 8 else (0.9, 0.75, 0.5, 0.25, 0.1)[i - 8]
        contexts.append([rng.randrange(n_sequences), quantile, positions, [short(rng.random() * 9) for _ in positions]])
    return {
        "contexts": contexts,
        "rho": [short(rng.random()) for _ in range(32)],
        "null": 0.01,
        "histogram": [0.125, [rng.randrange(500) for _ in range(60)]],
        **dict.fromkeys(("near", "opposite", "joint", "correlated"), likes),
        "up": tokens,
        "down": tokens,
        "logits": [-9.0, 9.0, [rng.randrange(300) for _ in range(40)]],
    }


def write(folder: Path, n_latents: int, n_tokens: int) -> None:
    """The features' and the map's page of one run, with all data."""
    rng, n_sequences = random.Random(0), n_tokens // LENGTH
    pages = Pages(folder, generator="bench", comparable=False)
    measures = [{"name": name, "label": label, "about": label} for name, label in LABELS.items()]
    run = SimpleNamespace(name="run", number=1, evaluation={"weights": "0" * 64})
    counted = {"split": "eval", "n_tokens": n_tokens, "n_joint": 65_536, "skip_first": 1}
    common = {"run": run, "counted": counted, "measures": measures}
    pages.page("runs/run/features.html", "features.html", **common, no_lens=None, lens_definition="")
    places = [[short(math.cos(i) * rng.random()), short(math.sin(i) * rng.random())] for i in range(n_latents)]
    pages.page("runs/run/map.html", "map.html", **common, places=DecoderMap({}, 0.1, []), opposite_from=OPPOSITE_FROM)
    pages.data("runs/run/data/map.js", "map", {"places": {"PCA": places}, "pairs": []})
    index = {
        "latents": list(range(n_latents)),
        "columns": {name: [short(rng.random()) for _ in range(n_latents)] for name in LABELS},
        "fires": [[rng.randrange(VOCABULARY) for _ in range(6)] for _ in range(n_latents)],
        "promotes": [[rng.randrange(VOCABULARY) for _ in range(6)] for _ in range(n_latents)],
        "per_chunk": PER_CHUNK,
        "per_file": PER_FILE,
        "group": None,
        "run": "run",
        "weights": "0" * 64,
        "x_rho": None,
        "no_lens": None,
    }
    pages.data("runs/run/data/index.js", "index", index)
    for chunk in range(0, n_latents, PER_CHUNK):
        held = {i: feature(rng, n_latents, n_sequences) for i in range(chunk, min(chunk + PER_CHUNK, n_latents))}
        pages.data(f"runs/run/data/{chunk // PER_CHUNK}.js", "features", held)
    pages.sequences({i: [i, 0, [rng.randrange(VOCABULARY) for _ in range(LENGTH)]] for i in range(n_sequences)})
    pages.data("sequences/vocabulary.js", "vocabulary", {i: f" tok{i}" for i in range(VOCABULARY)})


def seconds(act: Callable[[], Any], there: Callable[[], Any]) -> float:
    """From an action until something is there."""
    start = time.perf_counter()
    act()
    while not there():
        time.sleep(0.005)
    return time.perf_counter() - start


def opening(folder: Path, profile: Path) -> dict[str, float]:
    driver = open_browser(profile)
    address = (folder / "runs" / "run").as_uri()
    names = ("features_s", "features_cpu_s", "search_s", "search_cpu_s", "map_s", "map_cpu_s")
    times: dict[str, list[float]] = {name: [] for name in names}
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def processor() -> float:
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    def has(selector: str) -> Any:
        return driver.find_elements("css selector", selector)

    try:
        for _ in range(OPENED):
            driver.get("about:blank")
            opened = seconds(lambda: driver.get(f"{address}/features.html"), lambda: has("#feature .context"))
            times["features_s"].append(opened)
            times["features_cpu_s"].append(before := processor())
            search = driver.find_element("id", "search")
            result = seconds(lambda search=search: search.send_keys("tok77"), lambda: has("#list .chip.match"))
            times["search_s"].append(result)
            times["search_cpu_s"].append(processor() - before)
            driver.get("about:blank")
            times["map_s"].append(seconds(lambda: driver.get(f"{address}/map.html"), lambda: has("#map[data-ready]")))
            times["map_cpu_s"].append(processor())
    finally:
        driver.quit()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--tokens", type=parse_count, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "report"
        write(folder, asked.latents, asked.tokens)
        n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        figures = {"mb": n_bytes / 1e6} | opening(folder, Path(temporary) / "profile")
    for name, value in figures.items():
        print(f"{name:12} {value:,.2f}")
    print(json.dumps({"bench": "report_scale", "latents": asked.latents, "tokens": asked.tokens} | figures))


if __name__ == "__main__":
    main()
