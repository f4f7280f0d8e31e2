import json
import os
import re
import shutil
import subprocess
from html import unescape
from importlib.resources import files

import pytest

from trl_kd.pairs import pair_row
from trl_kd.pairs.page import as_json, render_page, write_page
from trl_kd.pairs.statistics import PairStatistics


SCRIPT = '<script>document.title="pwned"</script>'
IMAGE = "</script><img src=x onerror=\"document.title='pwned'\">"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = {"teacher": {"model": SCRIPT}, "seed": 0}


def message(text, role="assistant"):
    return {"role": role, "content": text}


def make_rows():
    rows = [
        pair_row("first prompt", f"{SCRIPT} zebra", f"{IMAGE}{{{{data}}}}", 1.0)
        | {"score_chosen": 1.5, "score_rejected": -2},
        pair_row("second", "right", "wrong but longer", 0.1) | {"rejected_finish_reason": "length", "source_row": 77},
        pair_row("third", "a tie", "the tie", 0.5) | {"gold": f"{IMAGE}", "none": None, "number": float("nan")},
        pair_row("fourth", "same", "same", 1.0),
        pair_row(
            [message("Be brief.", "system"), message("ZEBRA?", "user")], [message("Yes.")], [message(None)], 0.875
        ),
    ]
    return [*rows, pair_row("line\u2028end\u2029\ud800\x00", "t" * 9000, "", None) | {"teacher": "another text"}]


def write(folder, rows):
    statistics = PairStatistics()
    statistics.add_rows(rows)
    return write_page(folder, rows, statistics.summary(), SETTINGS)


@pytest.fixture
def page(tmp_path):
    return write(tmp_path, make_rows())


def embedded(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, flags=re.DOTALL)[1])


def test_data_cannot_leave_its_element(page):
    html = page.read_text()
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html
    assert "\u2028" not in html
    data = embedded(html)
    assert data["pairs"][0]["chosen"]["text"] == f"{SCRIPT} zebra"
    assert data["pairs"][0]["rejected"]["text"] == f"{IMAGE}{{{{data}}}}"
    assert json.loads(as_json("<>&\u2028\u2029\"'\\")) == "<>&\u2028\u2029\"'\\"


def test_the_script_makes_no_html_of_text():
    template = files("trl_kd.pairs").joinpath("page.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|DOMParser", template)


def test_nothing_is_fetched(page):
    html = page.read_text()
    assert not re.search(r"https?://|url\(|@import|\b(src|href)=", html.replace("img src=x", ""))
    assert "default-src 'none'" in html
    assert "unsafe" not in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_what_is_known_of_a_pair(page):
    pairs = embedded(page.read_text())["pairs"]
    assert [pair["winner"] for pair in pairs] == ["teacher", "student", "tie", "unknown", "teacher", "unknown"]
    assert (pairs[0]["chosen"]["score"], pairs[0]["rejected"]["score"]) == ("1.5", "-2")
    assert (pairs[1]["p"], pairs[1]["row"], pairs[1]["chosen"]["by"]) == (0.9, 77, "student")
    assert pairs[2]["rest"] == [["gold", IMAGE], ["number", "nan"]]
    assert pairs[4]["prompt"] == [["system", "Be brief."], ["user", "ZEBRA?"]]
    assert pairs[5]["chosen"]["length"] == 9000
    assert pairs[5]["chosen"]["text"] == "t" * 8000 + "\n[… 1,000 more characters]"
    assert pairs[5]["teacher"] == "another text"


def test_sources_say_more_than_the_teachers_side():
    row = pair_row("x", "a", "b", 1.0) | {
        "chosen_source": "student",
        "rejected_source": "student",
        "teacher_side": None,
    }
    statistics = PairStatistics()
    statistics.add_rows([row] * 3)
    data = embedded(render_page([row], statistics.summary(), {}))
    assert data["pairs"][0]["winner"] == "student"
    assert data["lead"].startswith("1 of 3 pairs, chosen at random, from 1 prompts")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


class TestInABrowser:
    @pytest.fixture
    def browse(self, profile):
        if BROWSER is None:
            if os.environ.get("TRL_KD_REQUIRE_BROWSER") == "1":
                pytest.fail("TRL_KD_REQUIRE_BROWSER=1, but there is no chromium or google-chrome")
            pytest.skip("no chromium or google-chrome")

        def run(path, *arguments):
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            command += ["--hide-scrollbars", f"--user-data-dir={profile}", "--dump-dom", *arguments, path.as_uri()]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

        return run

    @pytest.fixture
    def browse_in_frames(self, browse, tmp_path):
        """Opens addresses in frames of their width (a headless window is never as narrow as a phone), and returns what the
        body of a JavaScript function of each frame's document says."""

        def run(addresses, body):
            outer = tmp_path / "frames.html"
            outer.write_text(
                f"<body><script>const found = []; const look = d => {{ {body} }};"
                f"{json.dumps(addresses)}.forEach(([address, width], place) => {{"
                "const frame = document.createElement('iframe');"
                "frame.style.cssText = `width:${width}px;height:900px;border:0`; frame.src = address;"
                "frame.onload = () => { found[place] = look(frame.contentDocument);"
                "document.body.dataset.found = JSON.stringify(found); }; document.body.append(frame); });</script>"
            )
            arguments = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--window-size=1300,900")
            return json.loads(unescape(re.search(r'data-found="([^"]*)"', browse(outer, *arguments))[1]))

        return run

    def test_text_of_models_is_shown_and_not_run(self, browse, page):
        dom = browse(page)
        assert "<title>Preference pairs</title>" in dom
        shown = dom[dom.index('id="pairs"') :]
        assert '&lt;script&gt;document.title="pwned"&lt;/script&gt; zebra' in shown
        assert "&lt;/script&gt;&lt;img src=x onerror=" in shown
        assert "<img" not in dom
        assert dom.count("<script") == 2
        assert shown.count("<article") == 6
        words = ("ZEBRA?", ">system<", "by the student", "score 1.5", "P 0.875", "cut off", "row 77", "another text")
        assert [word for word in words if word not in shown] == []
        assert "&lt;script&gt;" in dom[dom.index('id="settings"') : dom.index("<form")]

    def test_the_policy_stops_what_gets_in_all_the_same(self, browse_in_frames, page):
        html = page.read_text()
        for evil in (SCRIPT, IMAGE.removeprefix("</script>")):
            guarded = html.replace("<main>", f"<main>{evil}")
            page.with_name("guarded.html").write_text(guarded)
            page.with_name("open.html").write_text(re.sub(r"<meta http-equiv.*?>", "", guarded))
            found = browse_in_frames(
                [["guarded.html", 900], ["open.html", 900]],
                "return [d.title, d.querySelectorAll('article').length];",
            )
            assert found == [["Preference pairs", 6], ["pwned", 6]]  # without the policy it would have run

    def test_filters_by_address(self, browse_in_frames, page):
        # All rows get a number, by which they are told apart
        write(page.parent, [row | {"source_row": place} for place, row in enumerate(make_rows(), 1)])
        expected = {
            "q=ZeBrA": [1, 5],
            "winner=student": [2],
            "winner=tie": [3],
            "winner=unknown": [4, 6],
            "winner=teacher&q=zebra&longer=chosen": [5],
            "longer=rejected&min=10&max=16": [],
            "longer=chosen&min=10&max=16": [2],
            "longer=equal": [4],
            "min=1000": [6],
            "cut=1": [2],
            "q=%3Cscript%3E": [1],
            "q=another+text": [6],
        }
        found = browse_in_frames(
            [[f"pairs.html#{fragment}", 900] for fragment in expected],
            "return [d.querySelector('.count').textContent, "
            "[...d.querySelectorAll('.number')].map(e => +e.textContent.replace('row ', ''))];",
        )
        for (fragment, rows), (count, shown) in zip(expected.items(), found, strict=True):
            assert shown == rows, fragment
            n = len(rows)
            assert count == (f"1 to {n} of {n} found, of 6" if n else "No pair is like this"), fragment

    def test_a_person_filters_and_turns_pages(self, browse_in_frames, tmp_path):
        write(tmp_path, [pair_row(f"prompt {i}", "a", "b", float(i % 3 > 0)) for i in range(120)])
        body = """
            const state = () => [d.querySelector(".count").textContent, d.defaultView.location.hash];
            const all = [state()];
            d.querySelector("nav button[data-step='1']").click(); all.push(state());
            d.querySelector("[value=teacher]").click();
            d.defaultView.setTimeout = f => f();
            d.querySelector("[value=teacher]").dispatchEvent(new Event("input", {bubbles: true})); all.push(state());
            return all;"""
        ((first, second, teacher),) = browse_in_frames([["pairs.html", 900]], body)
        assert first == ["1 to 50 of 120", ""]
        assert second == ["51 to 100 of 120", "#page=2"]
        assert teacher == ["1 to 50 of 80 found, of 120", "#winner=teacher"]

    def test_five_thousand_pairs(self, browse_in_frames, tmp_path):
        write(tmp_path, [pair_row(f"prompt {i} " * 9, f"answer {i} " * 30, "no " * 60, 1.0) for i in range(5000)])
        found = browse_in_frames(
            [["pairs.html#page=100", 900], ["pairs.html#q=answer 4321 ", 400]],
            "return [d.querySelector('.count').textContent, d.querySelectorAll('article').length];",
        )
        assert found == [["4,951 to 5,000 of 5,000", 50], ["1 to 1 of 1 found, of 5,000", 1]]

    def test_is_no_wider_than_the_screen(self, browse_in_frames, page):
        page.write_text(page.read_text().replace("zebra", "W" * 400))
        body = (
            "const columns = getComputedStyle(d.querySelector('.two')).gridTemplateColumns.split(' ').length;"
            "return [d.documentElement.scrollWidth, columns];"
        )
        found = browse_in_frames([["pairs.html", 360], ["pairs.html", 1200]], body)
        assert found == [[360, 1], [1200, 2]]
