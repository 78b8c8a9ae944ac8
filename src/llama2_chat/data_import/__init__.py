"""Importing data sets of other formats into the toolkit's own; what is dropped is counted by reason.

One module a format; `FORMATS` is the list that command line, recipes and pipeline share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from llama2_chat.data_import.bold import BOLD
from llama2_chat.data_import.candidates import Format, imported, in_split
from llama2_chat.data_import.diasafety import DIASAFETY
from llama2_chat.data_import.hh_rlhf import HH_RLHF
from llama2_chat.data_import.oasst import OASST
from llama2_chat.data_import.pandalm import PANDALM
from llama2_chat.data_import.report import KINDS, LABELS, SPLITS, ImportReport, Kind, Label, Split
from llama2_chat.data_import.split import DEFAULT_HELD_OUT_SHARE, check_share
from llama2_chat.data_import.toxigen import TOXIGEN
from llama2_chat.data_import.truthfulqa import TRUTHFULQA
from llama2_chat.data_import.xstest import XSTEST
from llama2_chat.dialogue import Dialogue, Domain, Preference, Prompt
from llama2_chat.errors import UserInputError, did_you_mean

__all__ = [
    "DEFAULT_HELD_OUT_SHARE",
    "FORMATS",
    "KINDS",
    "LABELS",
    "SPLITS",
    "FormatName",
    "ImportReport",
    "Kind",
    "Label",
    "Split",
    "check_makes",
    "import_hh_rlhf",
    "import_rows",
]

FormatName = Literal["hh-rlhf", "pandalm", "oasst", "xstest", "truthfulqa", "toxigen", "bold", "diasafety"]
"""The names of `FORMATS`, for type checkers, recipes and the command line."""

_ALL = (HH_RLHF, PANDALM, OASST, XSTEST, TRUTHFULQA, TOXIGEN, BOLD, DIASAFETY)
FORMATS: Mapping[str, Format] = {format_.name: format_ for format_ in _ALL}


def import_rows(
    format_: FormatName,
    file: Path | str,
    *,
    kind: Kind,
    domain: Domain | None = None,
    label: Label | None = None,
    split: Split | None = None,
    held_out_share: float | None = None,
    report: ImportReport | None = None,
) -> Iterator[Dialogue | Preference | Prompt]:
    """Rows of a file of another format as dialogues (the preferred side), preferences or prompts.

    Of `hh-rlhf` and `pandalm` the same rows are dropped whatever is made of them, so that row n of one kind and
    row n of another come from the same pair. Of `oasst` one tree gives many pairs but fewer prompts and dialogues.

    Args:
        file: `.gz` or not.
        kind: What to make of each row, one of the format's `kinds`.
        domain: "safety" tags dialogues and prompts `is_safety`; preferences carry the domain as it is. None takes
            the format's own: of `hh-rlhf`, safety where "harmless" and helpfulness where "helpful" is in the name
            of the file or its folder; of `toxigen`, safety where the name begins with "hate"; of `diasafety`, safety;
            of `xstest` none, and `is_safety` is the prompt's label; of the others, helpfulness.
        label: Only the rows with this label, of a format that is `labelled`; None takes both.
        split: Only one of the two parts of the file that share no first user message; None takes both.
        held_out_share: About what share of the first user messages is held out, between 0 and 1, both excluded;
            with `split` only, and the same for both parts. None is 0.25.
        report: Filled with the counts while the rows are read.

    Raises:
        UserInputError: an unknown format, kind, label or split, a kind or label that the format does not have, or a
            share that is not between 0 and 1.
        DataFormatError: the file is not of the format at all.
    """
    if format_ not in FORMATS:
        hint = did_you_mean(format_, FORMATS)
        raise UserInputError(f'format "{format_}" unknown; one of {", ".join(FORMATS)}{hint}')
    if kind not in KINDS:
        raise UserInputError(f'kind "{kind}" unknown; one of {", ".join(KINDS)}')
    if label is not None and label not in LABELS:
        raise UserInputError(f'label "{label}" unknown; one of {", ".join(LABELS)}')
    check_makes(format_, kind, label)
    if split is not None and split not in SPLITS:
        raise UserInputError(f'split "{split}" unknown; one of {", ".join(SPLITS)}')
    file, chosen = Path(file), FORMATS[format_]
    report = report if report is not None else ImportReport()
    report.domain = domain or chosen.domain_of(file)
    report.label = label
    report.unit = chosen.units.get(kind, "rows")
    if split is not None:
        report.split = split
        report.held_out_share = DEFAULT_HELD_OUT_SHARE if held_out_share is None else held_out_share
        check_share(report.held_out_share)
    elif held_out_share is not None:
        raise UserInputError(
            "a held-out share without a split has no effect; name the split, train or held_out"
        )
    return in_split(imported(chosen, file, kind, report), report)


def check_makes(format_: FormatName, kind: Kind, label: Label | None) -> None:
    """Raise UserInputError unless `kind` can be made of the format, and its rows have labels if one is wanted."""
    chosen = FORMATS[format_]
    if kind not in chosen.kinds:
        raise UserInputError(f"{format_} holds no {kind}; kind is one of {', '.join(chosen.kinds)}")
    if label is not None and not chosen.labelled:
        labelled = ", ".join(name for name, other in FORMATS.items() if other.labelled)
        raise UserInputError(
            f"the rows of {format_} are not labelled {' or '.join(LABELS)}; leave label out (it is for {labelled})"
        )


import_hh_rlhf = partial(import_rows, "hh-rlhf")
"""`import_rows` of HH-RLHF."""
