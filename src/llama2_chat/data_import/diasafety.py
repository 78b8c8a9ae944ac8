"""DiaSafety (Sun et al. 2022): a context and a response, which is safe or unsafe given the context; one JSON array.

Hardly any context has responses of both labels, so there are no preferences. The dialogues of one label are a labelled
set on which a safety reward model's scores can be judged; the unsafe ones are not for imitation.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama2_chat.data_import.candidates import LABELS, Candidate, Format, text_faults
from llama2_chat.data_import.json_array import read_array
from llama2_chat.data_import.report import EMPTY_ANSWER, Kind
from llama2_chat.dialogue import Row
from llama2_chat.fields import check_choice, check_text, required

_FIELDS = ("context", "response", "category", "label")
_EXPECTED = f"DiaSafety is one JSON array of objects with {', '.join(_FIELDS)}"


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    """One row, whatever the kind: row n of the dialogues and row n of the prompts come from the same context."""
    try:
        context, response, category, label = (check_text(required(row, name), name) for name in _FIELDS)
        label = check_choice(label.lower(), "label", LABELS)
    except ValueError as error:
        raise ValueError(f"{error}; {_EXPECTED}") from None
    faults = text_faults(context, response)
    yield Candidate(
        faults if response.strip() else (*faults, EMPTY_ANSWER),
        prompt=(("user", context),),
        chosen=response,
        label=label,
        group=category.strip() or None,
    )


DIASAFETY = Format(
    "diasafety",
    _candidates,
    _EXPECTED,
    lambda _: "safety",
    read=read_array,
    numbered="row",
    kinds=("dialogues", "prompts"),
    labelled=True,
)
