"""Promise: the pages explain their headings by the glossary of data/README.md, and by the figures' definitions where it
has no entry.
"""

from tcsae.evaluate.report.features.shown_feature import LABELS
from tcsae.evaluate.report.pages.glossary import Glossary
from tcsae.evaluate.report.pages.overview import RESULTS, TEMPORAL
from tcsae.evaluate.report.pages.page_files import DEFINITIONS

README = """# Data
- before: no entry.

## Glossary
- token: one position
  of one sequence.
- EV, `explained_variance`: see [there](https://x.y), **1 is perfect**.
### Columns
Words between.

- L0: active: latents.

In names: `n_` for counts.

## The store format
- after: no entry.
"""


def test_entries_are_the_list_items_of_its_section():
    result = Glossary({"explained_variance": "not this", "density": "share of tokens"}, README).entries
    assert [(entry.terms, entry.text) for entry in result] == [
        (["token"], "one position of one sequence."),
        (["EV", "explained_variance"], "see there, 1 is perfect."),
        (["L0"], "active: latents."),
        (["density"], "share of tokens"),
    ]
    assert Glossary({}, "no section").entries == []


def test_a_heading_has_its_entry_by_name_or_by_label():
    glossary = Glossary({"rho_8_within": "autocorrelation"}, README)
    assert glossary.slug("explained_variance", "EV") == glossary.slug("?", "ev") == "ev"
    assert glossary.slug("rho_8_within", "persistence") == "rho-8-within"
    assert glossary.slug("nothing", "nowhere") == ""


def test_every_heading_of_the_report_has_an_entry():
    glossary = Glossary(DEFINITIONS)
    slugs = {entry.slug for entry in glossary.entries}
    for name, label in {**RESULTS, **TEMPORAL, **LABELS}.items():
        assert glossary.slug(name, label) in slugs, name
    assert len(slugs) == len(glossary.entries), "anchors are unique"
