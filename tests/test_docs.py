"""README and docs: their Python blocks run, their links lead somewhere."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A model of the Hub is a tiny one here, on CPU, for two steps; all else is as it stands on the page
    code = re.sub(r'"Qwen/Qwen2.5-[\w.]+-Instruct"', repr(tiny_dir), code)
    here = 'use_cpu=True, bf16=False, max_steps=2, report_to="none", output_dir='
    code = code.replace('PbKDConfig("', f'PbKDConfig({here}"')
    exec(compile(code, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_no_machine_path_and_no_team_talk():
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"/(?:work|root|home|tmp)/\w", text), page
