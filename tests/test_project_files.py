"""Promise: the files beside the code agree with it: versions, commands, links, hooks that need no network."""

import re
import subprocess
from pathlib import Path

import yaml

import tcsae

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/choosing.md",
    "docs/scaling.md",
    "data/README.md",
]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_citation_has_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tcsae.__version__
    assert citation["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}


def test_the_changelog_begins_with_what_is_unreleased():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert titles[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", title) for title in titles[1:])
    assert len(titles) == 1 or titles[1].startswith(tcsae.__version__)


def test_hooks_need_no_network():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    assert {hook["language"] for repo in repos for hook in repo["hooks"]} == {"system"}


def test_ci_runs_the_tests():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    mode = subprocess.run(["git", "ls-files", "-s", ".ci/run"], cwd=ROOT, capture_output=True, text=True).stdout
    assert mode == "" or mode.startswith("100755"), "not executable"


def found(pattern: str) -> list[tuple[str, str]]:
    """(page, what the pattern finds on it), of all pages."""
    return [(page, one) for page in PAGES for one in re.findall(pattern, (ROOT / page).read_text(), re.MULTILINE)]


def test_links_lead_somewhere():
    links = found(r"\]\((?!https?:)([^)#]+)\)")
    assert len(links) > 10
    for page, link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_make_targets_exist():
    named = {name for _, call in found(r"(?:^    |`)make ([a-z -]+)") for name in call.split()}
    assert named and named <= targets()


def test_the_release_names_files_that_exist():
    named = re.findall(r"`((?:tests|docs|data)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
