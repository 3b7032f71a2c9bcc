"""The laws notice faults that are planted in what makes a step exact: some of them each day, all of them by hand.

`python tests/mutations.py` tries every fault; its result is in tests/benchmarks/results/mutations.json.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys

from mutations import FAULTS, HERE, PACKAGE, RESULTS

TRIED = 8
"""Faults that are tried here."""


def test_every_fault_can_be_planted_and_all_were_tried() -> None:
    """A changed line takes its faults along: mend their text, then run the whole again."""
    for fault in FAULTS:
        places = (PACKAGE / fault.file).read_text().count(fault.old)
        assert places == 1, f"{fault.name}: its text is in {fault.file} {places} times"
    found = json.loads(RESULTS.read_text())
    assert found["caught"] >= 0.95 * found["faults"]
    assert found["faults"] >= 40
    assert {row["fault"] for row in found["rows"]} == {fault.name for fault in FAULTS}


def test_faults_of_the_day_are_caught() -> None:
    survivors = json.loads(RESULTS.read_text())["survivors"]
    names = [fault.name for fault in FAULTS if fault.name not in survivors]
    first = datetime.date.today().toordinal() * TRIED
    chosen = [names[(first + nth) % len(names)] for nth in range(TRIED)]
    command = [sys.executable, HERE / "mutations.py", *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TRIED} of {TRIED} faults caught" in done.stdout
