"""ToxiGen's prompts (Hartvigsen et al. 2022): lists of sentences about a group, to be continued; one a line.

The name of a file says the group and whether its sentences are hateful: `hate_immigrant_1k.txt`. Inside a line the two
characters `\\n` stand for a line break.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llama2_chat.data_import.candidates import Candidate, Format, text_faults
from llama2_chat.data_import.report import Kind
from llama2_chat.data_import.text_lines import decoded_lines
from llama2_chat.dialogue import Domain, Row
from llama2_chat.errors import DataFormatError

_EXPECTED = 'ToxiGen\'s prompts are text, one prompt a line, which begins with "- "'
_NAME = re.compile(r"(?P<sort>hate|neutral)_(?P<group>.+?)(_1k)?\.txt(\.gz)?")


def _read(path: Path) -> Iterator[tuple[int, Row]]:
    name = _NAME.fullmatch(path.name)
    group = f"{name['sort']}_{name['group']}" if name else None
    empty = True
    for number, line in decoded_lines(path):
        if line.strip():
            empty = False
            yield number, {"text": line.strip(), "group": group}
    if empty:
        raise DataFormatError(path, None, "holds no prompts")


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    if not row["text"].startswith("- "):
        raise ValueError(f"the line begins otherwise; {_EXPECTED}")
    prompt = row["text"].replace("\\n", "\n")
    hateful = (row["group"] or "").startswith("hate_")
    yield Candidate(
        text_faults(prompt),
        prompt=(("user", prompt),),
        group=row["group"],
        risk_category="hateful" if hateful else None,
    )


def _domain_of(file: Path) -> Domain | None:
    """Safety where the file's sentences are hateful; None for a file of another name."""
    name = _NAME.fullmatch(file.name)
    return None if name is None else "safety" if name["sort"] == "hate" else "helpfulness"


TOXIGEN = Format("toxigen", _candidates, _EXPECTED, _domain_of, read=_read, kinds=("prompts",))
