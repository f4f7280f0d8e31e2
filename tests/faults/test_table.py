"""The page says what the last long run has found."""

import json

from tests.faults.cases import chosen
from tests.faults.table import ROOT, TABLE, markdown, summary, told


PAGE = ROOT / "docs" / "reliability.md"


def test_the_page_has_the_tables_of_the_results():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert f"`make test` has {len(chosen())} such kills" in page
    shown = page.partition("<!-- table -->\n\n")[2].partition("\n\n<!-- end of table -->")[0]
    assert shown == f"{told(table)}\n\n{markdown(table)}"


def case(**changed):
    of = {"command": "pbkd", "signal": "SIGINT", "inside": False, "hit": "write out/checkpoint-2/a", "code": 130}
    return {**of, "seconds": [1.0, 2.0], "paid_twice": 0, "faults": [], **changed}


def test_what_did_not_survive_is_shown():
    cases = [case(), case(faults=["lost"]), case(command="pairs", hit="rename out/data", paid_twice=3, inside=True)]
    table = summary(cases)
    assert (table["tried"], table["survived"], table["inside_a_write"]) == (3, 2, 1)
    assert "| `trl-kd pbkd` | 0 of 0 | 0 of 0 | 1 of 2 | 0 of 0 |" in markdown(table)
    assert "| checkpoints | 0 of 0 | 0 of 0 | 1 of 2 | 0 of 0 |" in markdown(table)
    assert "| pairs | 0 of 0 | 0 of 0 | 1 of 1 | 1 of 1 |" in markdown(table)
    assert told(table).startswith("2 of 3 kills were survived, 1 of them inside a write.")
    assert "3 by `trl-kd pairs`" in told(table)
