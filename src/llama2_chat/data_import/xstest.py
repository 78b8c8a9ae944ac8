"""XSTest (Röttger et al. 2023): safe prompts that look unsafe, and unsafe contrasts; CSV.

Its safe prompts are what the paper calls a borderline set: a refusal of one is a false refusal. Its unsafe ones are
adversarial prompts. `label` takes one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama2_chat.data_import.candidates import LABELS, Candidate, Format, text_faults
from llama2_chat.data_import.csv_file import csv_reader
from llama2_chat.data_import.report import Kind
from llama2_chat.dialogue import Row
from llama2_chat.fields import check_choice, check_text

_COLUMNS = ("prompt", "type", "label")
_EXPECTED = f"XSTest's prompts are CSV with a header that names at least {', '.join(_COLUMNS)}"


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    prompt = check_text(row["prompt"], "prompt")
    label = check_choice(row["label"].strip(), "label", LABELS)
    yield Candidate(
        text_faults(prompt), prompt=(("user", prompt),), label=label, group=row["type"].strip() or None
    )


XSTEST = Format(
    "xstest",
    _candidates,
    _EXPECTED,
    lambda _: None,
    read=csv_reader(*_COLUMNS),
    kinds=("prompts",),
    labelled=True,
)
