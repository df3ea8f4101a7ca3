"""Promise: the picture in docs/architecture.md shows the imports between rooms, no more and no fewer."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("house", Path(__file__).with_name("test_house.py"))
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)

PAGE = house.ROOT / "docs" / "architecture.md"
NODE = re.compile(r'^(\w+)\["([\w/]+)(?:<br>[^"]*)?"\]$')
BY_STAGES = ("data/activations.zarr", "data/runs", "data/report")
IMPLIED = "shared/base"
"""Every other room imports it: the page says so in words and leaves those arrows out."""


def picture(page: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Rooms by node name, and the solid arrows between them as (importer, imported) rooms."""
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.strip() for line in diagram.splitlines()]
    rooms = {match[1]: match[2] for line in lines if (match := NODE.match(line))}
    arrows = set()
    for line in lines:
        if "-->" in line:
            stops = [[node.strip() for node in stop.split("&")] for stop in line.split("-->")]
            for sources, targets in itertools.pairwise(stops):
                arrows |= {(rooms[source], rooms[target]) for source in sources for target in targets}
    return rooms, arrows


def room_imports() -> dict[tuple[str, str], str]:
    """(importer, imported) rooms -> one file that imports so."""
    pairs = {}
    for path in house.SOURCES:
        for name in house.imported_modules(path):
            pair = (house.room_of(path), house.room_of(house.MODULES[name]))
            if pair[0] != pair[1]:
                pairs.setdefault(pair, str(path.relative_to(house.ROOT)))
    return pairs


ROOMS, ARROWS = picture(PAGE.read_text())


def test_each_room_is_a_node():
    assert sorted(ROOMS.values()) == sorted(house.MAY_IMPORT.keys() - {"shared"}), "`shared` itself is an empty package"


def test_each_arrow_is_an_import():
    assert ARROWS - room_imports().keys() == set(), "arrows without an import: take them out of docs/architecture.md"


def test_each_import_is_an_arrow():
    missing = {pair: path for pair, path in room_imports().items() if pair not in ARROWS and pair[1] != IMPLIED}
    assert missing == {}, "imports without an arrow: draw them in docs/architecture.md, or move the code"


def test_the_base_is_imported_by_every_room():
    assert {room for room, target in room_imports() if target == IMPLIED} == set(ROOMS.values()) - {IMPLIED}


def test_each_arrow_is_allowed():
    assert {(room, target) for room, target in ARROWS if target not in house.MAY_IMPORT[room]} == set()


def test_data_flows_from_text_to_report():
    """Dotted arrows, followed from `text`, reach every store on disk and every stage."""
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    flow = re.findall(r"^\s*(\w+)(?:\[\([^)]*\)\])? -\.(?: [\w ,.]+ \.)?-> (\w+)", diagram, flags=re.MULTILINE)
    reached = {"text"}
    for _ in flow:
        reached |= {target for source, target in flow if source in reached}
    beyond = {"hub", "huggingface", "exports", "tools"}
    assert reached == {"text", "harvest", "activations", "train", "runs", "evaluate", "report", "pages", *beyond}


NAMED = re.findall(r"\]\(\.\./([^)#]+)\)|`([a-z_]+/[\w/.]*)`", PAGE.read_text())


@pytest.mark.parametrize("name", sorted({link or name for link, name in NAMED}))
def test_each_named_path_exists(name):
    assert name.startswith(BY_STAGES) or (house.ROOT / name).exists()


def test_the_parser_reads_every_arrow():
    lines = ['a["harvest<br>x"]', 'b["data"]', 'c["shared/sae"]', "a --> b & c", "a -. y .-> b"]
    page = "\n".join(["```mermaid", "flowchart LR", *lines, "```"])
    assert picture(page)[1] == {("harvest", "data"), ("harvest", "shared/sae")}
