"""What `qzo texts` says of a draft's texts: asked once for every state of them, by a process of its own. No gradio.

Tokenizers are heavy, and a data set may be far away: the page only reads what the process has said so far.
"""

import json
from dataclasses import dataclass
from typing import Any

from app.drafts import Draft, DraftError
from app.jobs import Job, Jobs

READS = ("texts", "text_columns", "completions_only", "length", "model")  # what the answer depends on


@dataclass(frozen=True)
class Reading:
    """What is known of a draft's texts; `facts` are those of `inspection.read_texts`, as far as they have come."""

    facts: dict[str, Any]
    busy: bool
    complaint: str  # why they cannot be used at all, or ""

    @property
    def bad(self) -> int:
        return self.facts.get("bad", 0)

    @property
    def usable(self) -> int:
        """Rows that can be learnt from, as far as is known."""
        return self.facts.get("rows", 0) - self.bad

    @property
    def problems(self) -> list[list]:
        return self.facts.get("problems", [])

    def obstacle(self, skip: bool) -> str:
        """Why they cannot be trained on, or nothing as far as is known."""
        if self.complaint:
            return self.complaint
        if self.bad and not skip:
            rows = "1 row" if self.bad == 1 else f"{self.bad} rows"
            return f"{rows} cannot be used: mend them, or tick on the Data tab that they are left out."
        return ""

    @property
    def longest(self) -> int:
        """Tokens of the longest text; 0 while it is not known."""
        return self.facts.get("lengths", {}).get("longest", 0)


def read(jobs: Jobs, draft: Draft) -> Reading:
    """What is known by now; a process is started where nothing is known of the draft as it stands."""
    settings = draft.recipe()
    if not settings.texts:
        raise DraftError(f"{draft.name} is a draft of pictures, not of texts")
    job = Job(jobs.runs, "texts", draft.name)
    job.ask(settings, READS, "texts")
    facts, busy = _said(job), job.alive()
    whole = "lengths" in facts
    return Reading(facts, busy and not whole, "" if whole or busy else job.complaint())


def _said(job: Job) -> dict[str, Any]:
    """All its lines of facts put together; what both parts count is added up."""
    facts: dict[str, Any] = {}
    if not job.log_file.exists():
        return facts
    for line in job.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("{"):
            continue
        try:
            part = json.loads(line)
        except json.JSONDecodeError:
            break  # not whole yet
        for name in ("bad", "problems"):
            if name in part and name in facts:
                part[name] = facts[name] + part[name]
        facts |= part
    return facts
