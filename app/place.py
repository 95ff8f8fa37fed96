"""Where the page works: the folder of runs with its drafts and jobs, and what is known of the machine."""

import json
from pathlib import Path
from typing import Any

from app.drafts import Drafts
from app.jobs import Job, Jobs


class Place:
    """One folder of runs."""

    def __init__(self, runs: Path):
        self.runs = Path(runs).resolve()
        self.drafts, self.jobs = Drafts(self.runs), Jobs(self.runs)
        self.doctor = Job(self.runs, "doctor", "machine")

    def machine(self) -> dict[str, Any]:
        """What `qzo doctor` found the last time, or nothing yet."""
        for line in reversed(self.doctor.log()):
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except json.JSONDecodeError:
                    return {}
        return {}

    def examine(self) -> None:
        """Let `qzo doctor` look at the machine, in a process of its own: it loads what the page does not."""
        if not self.doctor.alive():
            self.doctor.start("doctor", "--json", alone=False)

    def device(self) -> str:
        """The machine in a few words."""
        facts = self.machine()
        if not facts:
            return ""
        cards = [d for d in facts["torch"]["devices"] if "title" in d]
        if cards:
            return f"{cards[0]['title']}, {cards[0]['memory']['total'] / 1e9:.0f} GB"
        return f"Processor with {facts['cores']} cores, {facts['ram']['total'] / 1e9:.0f} GB of memory"
