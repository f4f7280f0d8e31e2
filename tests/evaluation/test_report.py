import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from trl_kd.evaluation.charts import LineChart, Series
from trl_kd.evaluation.report import Answer, Page, Sample, Section, Table, render, write_report


EVIL = "<script>document.title='hacked'</script>&\"'"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def page():
    chart = LineChart(EVIL, EVIL, EVIL, [Series(EVIL, [(0, 0.1), (10, 0.9)]), Series("b", [(0, 1)], 1, dashed=True)])
    return Page(
        title="Four ways " + EVIL,
        lead=[EVIL, "Second."],
        sections=[
            Section(
                EVIL,
                text=[EVIL],
                tables=[Table([EVIL, "b"], [[f"x\n{EVIL}", "1"], [EVIL, "2"]], 1, EVIL, bars=[0.25, 1])],
                charts=[chart],
                samples=[
                    Sample(EVIL, "42", [Answer(EVIL, EVIL, False), Answer("b", "42", True), Answer("c", "", False)])
                ],
            ),
            Section("Folded", tables=[Table(["a", "b"], [["long" * 80, "word" * 80]], words=True)], folded=True),
        ],
        footer=EVIL,
    )


def test_everything_is_escaped(page):
    html = render(page)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15


def test_nothing_is_fetched(page):
    html = render(page)
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_chart_puts_points_where_they_belong():
    chart = LineChart("t", "x", "y", [Series("a", [(0, 0), (5, 0.5), (10, 1), (11, float("nan"))])], percent=True)
    root = ET.fromstring(chart.svg())
    (line,) = root.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(points) == 3
    assert points[1] == pytest.approx([(points[0][i] + points[2][i]) / 2 for i in (0, 1)])
    assert points[0][0] < points[2][0]
    assert points[0][1] > points[2][1]  # y grows downwards in SVG
    ticks = {text.text: float(text.get("y")) - 4 for text in root.iter("text") if text.text.endswith("%")}
    assert ticks["0%"] == pytest.approx(points[0][1], abs=0.2)
    assert ticks["100%"] == pytest.approx(points[2][1], abs=0.2)


@pytest.mark.parametrize("points", [[(0, 3.0)], [(0, 1.0), (5, 1.0)], [(0, 0.0), (1, 0.0)], [(0, -2.0), (9, 0.013)]])
def test_chart_of_any_values_is_drawn_inside(points):
    root = ET.fromstring(LineChart("t", "x", "y", [Series("a", points)]).svg())
    _, _, width, height = map(float, root.get("viewBox").split())
    for line in root.iter("polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


@pytest.mark.parametrize("last", [2, 3, 7, 30])
def test_what_is_counted_has_marks_at_whole_numbers(last):
    points = [(float(x), 0.5) for x in range(1, last + 1)]
    marks = []
    for whole in (False, True):
        root = ET.fromstring(LineChart("t", "x", "y", [Series("a", points)], percent=True, whole=whole).svg())
        marks.append({text.text for text in root.iter("text") if text.get("class") == "tick"})
    parts = [{mark for mark in found if "." in mark} for found in marks]
    assert bool(parts[0]) == (last <= 3)
    assert not parts[1]
    assert len(marks[1] - {f"{share}%" for share in (0, 25, 50, 75, 100)}) >= 2


def test_chart_without_points_says_so():
    chart = LineChart("t", "x", "y", [Series("a", []), Series("b", [(0, float("inf"))])])
    assert "Nothing was recorded" in chart.svg()


class TestInABrowser:
    @pytest.fixture
    def open_page(self, page, tmp_path):
        if BROWSER is None:
            if os.environ.get("TRL_KD_REQUIRE_BROWSER") == "1":
                pytest.fail("TRL_KD_REQUIRE_BROWSER=1, but there is no chromium or google-chrome")
            pytest.skip("no chromium or google-chrome")
        path = tmp_path / "report.html"
        write_report(path, page)

        def run(*arguments, probe=""):
            path.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            command += ["--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", *arguments, path.as_uri()]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

        return run

    # Below about 500 pixels a headless window keeps its width, so a phone is played by a frame
    @pytest.mark.parametrize("width", [360, 1200])
    def test_opens_and_is_no_wider_than_the_screen(self, open_page, width):
        probe = f"""<iframe id="f" style="width:{width}px;height:900px;border:0"></iframe><script>
            const frame = document.getElementById("f");
            const copy = document.documentElement.cloneNode(true);
            copy.querySelectorAll("iframe, script").forEach(e => e.remove());
            frame.srcdoc = copy.outerHTML;
            frame.onload = () => {{
                const d = frame.contentDocument;
                const lines = d.querySelectorAll("svg polyline").length;
                const chart = d.querySelectorAll("svg")[0].getBoundingClientRect().width > 250;
                const title = d.title.startsWith("Four ways");
                document.body.dataset.found = [d.documentElement.scrollWidth, lines, chart, title].join();
            }};</script>"""
        found = re.search(r'data-found="([^"]*)"', open_page("--dump-dom", "--virtual-time-budget=5000", probe=probe))
        assert found is not None
        assert found[1] == f"{width},2,true,true"

    def test_takes_a_picture(self, open_page, tmp_path):
        open_page(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1600")
        assert (tmp_path / "page.png").stat().st_size > 20_000
