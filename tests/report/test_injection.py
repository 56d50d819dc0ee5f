"""A report of hostile results has the elements of a harmless one, and nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tests.report.test_pages import cell_of, results_of
from tvac_plugin.boundary.files import write_json
from tvac_plugin.chain.matching import matched_utility
from tvac_plugin.chain.summary import summarise
from tvac_plugin.report.charts import heat_map
from tvac_plugin.report.pages import html, markdown, write_report
from tvac_plugin.report.tables import evaluation_table
from tvac_plugin.report.terminal import chain_table

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)", '"><img src=x onerror=alert(1)>', "' onmouseover='x",
    "</title><svg onload=alert(1)>", "</pre></details></style><script>", "javascript:alert(1)", "{{ 7 * 7 }}{% raw %}",
    "[link](javascript:alert(1)) ![i](http://x/y.png)", "a | b\n\n# heading\n<b>bold</b>", "<!-- ", "]]>&lt;&#x3c;",
    "\x1b[31mred\x1b]0;title\x07", "\u202egnp.exe", "`code` **bold** ~~x~~",
]  # fmt: skip
PLAIN = "plain"


class Structure(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_comment(self, data):
        self.tags.append(("comment", ()))

    def handle_data(self, data):
        self.text.append(data)


def results_with(text):
    """Results with `text` wherever a recipe, a model, a job or a log puts a string."""
    cell = cell_of({"safety_defense": "none", "align.note": text}, 80.0, arm=["align.note"])
    cell |= {"models": {text: {text: {**cell["models"]["attack"]["harmful_score"], "judge": text, "judge_note": text}}}}
    cell |= {"samples": {text: [{"prompt": text, "answer": text, "harmful": None}]}, "skipped": {text: text}}
    cell |= {"roles": {text: "attacked"}, "curves": {text: cell["curves"]["attack"]}, "attack_cost": {text: 20}}
    cell["curves"] = {
        text: [{**point, text: {**point["harmful_score"], "judge": text}} for point in cell["curves"][text]]
    }
    cell |= {"starts": {}, "matched_utility": {}}
    cell["matched_utility"] = matched_utility([cell], text)[0]
    failed = {**cell, "status": "failed", "problems": [text], "models": {}, "curves": {}, "samples": {}}
    results = results_of(cell, failed) | {"versions": {text: text}, "hardware": {text: text}}
    results |= {"summary": summarise([cell], text), "utility": text}
    job = results["jobs"].pop("align") | {"recipe": {text: text}, "stage": text, "status": text}
    job["trace"] = [{"step": text, "event": "draw", "layers": [1]}]
    return results | {"jobs": {text: job}}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_attribute(text):
    harmless, hostile = (Structure(html(results_with(t))) for t in (PLAIN, text))
    assert hostile.tags == harmless.tags
    shown = " ".join("".join(hostile.text).split())
    assert shown.count(" ".join(text.split())) >= 5, "it is shown as it is"


def test_the_page_may_run_and_load_nothing():
    page = html(results_with(PLAIN))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not {name for _, names in Structure(page).tags for name in names} & {"src", "href", "style", "action"}
    assert page.index("Content-Security-Policy") < page.index("<style>")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_no_markup_in_markdown(text):
    harmless, hostile = (markdown(results_with(t)).splitlines() for t in (PLAIN, text))
    assert len(hostile) == len(harmless)
    for ours, theirs in zip(harmless, hostile, strict=True):
        assert len(re.findall(r"(?<!\\)\|", theirs)) == len(re.findall(r"(?<!\\)\|", ours))
        assert "<" not in theirs
        assert not re.search(r"(?<!\\)[\[\]`*]", theirs.removeprefix("- "))
        assert theirs.startswith("#") == ours.startswith("#")


def test_hostile_text_does_not_reach_the_terminal_s_controls():
    tables = [chain_table(results_with(text)) for text in HOSTILE]
    rate = cell_of({}, 1.0)["models"]["attack"]["harmful_score"]
    tables.append(evaluation_table({"models": {"\x1b[2J": {"\x07": rate}}}))
    assert all(char.isprintable() or char == "\n" for table in tables for char in table)


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    import json

    from tvac_plugin.report.pages import write_report

    (tmp_path / "results.json").write_text(json.dumps(results_with("\ud800")))
    assert "\N{REPLACEMENT CHARACTER}" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("draws", "probes", "note"),
    [
        ([{"step": 0, "layers": [3, 10**400, -1]}], [], "layers from 200 on are left out"),
        ([{"step": 0, "layers": [3]}], [{"scores": [0.0] * 10**6}], "layers from 200 on are left out"),
        ([{"step": n, "layers": list(range(200))} for n in range(10**4)], [], "one draw in 40 is shown"),
    ],
)
def test_a_heat_map_of_huge_numbers_stays_small(draws, probes, note):
    chart = heat_map(draws, probes)
    assert note in chart
    assert chart.count('<rect class="on"') <= 250 * 200
    assert len(chart) < 150 * 250 * 200
    assert ", layer 3<" in chart


def test_the_steps_of_a_heat_map_are_escaped():
    chart = heat_map([{"step": "</text><script>", "layers": [0]}], [])
    assert "<script>" not in chart


def test_written_pages_obey_no_character_and_link_nothing(tmp_path):
    odd = "\u202egnp.exe \x00 \x1b[31m _mark_ safety_defense https://x.test www.x.test"
    write_json(tmp_path / "results.json", results_with(odd))
    write_report(tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert not {"\u202e", "\x00", "\x1b"} & set(page), name
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert r"\_mark\_ safety_defense https&#58;//x.test www&#46;x.test" in text
