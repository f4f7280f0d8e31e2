"""Every command is killed at chosen writes and goes on, to what a run that was not killed comes to."""

import pytest

from tests.faults.cases import Case, chosen, spread
from tests.faults.conftest import IS_LONG
from tests.faults.table import record


pytestmark = pytest.mark.xdist_group("faults")  # one fork server for all


@pytest.mark.parametrize("case", chosen() + (spread() if IS_LONG else []), ids=lambda case: case.id)
def test_a_kill_costs_nothing(killing, kept, case: Case):
    if case.id not in kept:
        whole = killing.whole(case.command)
        kill = case.kill(whole)
        killed = killing.kill(case.command, kill)
        if (
            case.share is not None and killed.ended.hit is None
        ):  # threads, which a run has, make some calls more or less
            killed = killing.kill(case.command, kill.earlier())
        kept.add(case.id, record(killed, whole))
    assert not kept[case.id]["faults"], "\n".join(kept[case.id]["faults"])


@pytest.mark.skipif(not IS_LONG, reason="of the long run alone (`make faults`)")
def test_the_table_is_written(kept):
    kept.write_table([case.id for case in chosen() + spread()])
