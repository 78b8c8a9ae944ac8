"""Figures of docs/results/ghost-attention.md from one run of `ghost_attention.yaml`: what is kept and attended to.

python recipes/tiny/ghost_attention_figures.py RUN OUTPUT

Makes held-out dialogues of twenty turns and runs two commands on the baseline and the policy of Ghost Attention:
`evaluate instructions`, and `evaluate attention` on what the latter has said, apart for instructions that show in every
answer (a language) and for those that the last question asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llama2_chat.cli.main import run_command
from llama2_chat.errors import MissingFileError
from llama2_chat.jsonl import read_rows, write_rows
from llama2_chat.recipes.tiny.tables import exit_code, parser_of
from llama2_chat.testbed.generators import GENERATORS

POLICIES = ("sft", "ghost_attention")
TURNS, DIALOGUES, INSTRUCTIONS, SEED = 20, 120, 400, 0
ATTENTION_DIALOGUES = 30


def model_of(run: Path, stage: str) -> Path:
    """The model folder of a stage.

    Raises:
        MissingFileError: the stage is not there, or not done.
    """
    found = list(run.glob(f"stages/*-{stage}/model"))
    if len(found) != 1:
        raise MissingFileError(f"{run}: no model of the stage {stage}; name a run of ghost_attention.yaml")
    return found[0]


def write_data(folder: Path) -> tuple[Path, Path]:
    """Held-out dialogues that wait for an instruction, and instructions whose words and values training shows."""
    dialogues, instructions = folder / "dialogues.jsonl", folder / "instructions.jsonl"
    turns = {"min_turns": TURNS, "max_turns": TURNS, "recalls": 1.0}
    write_rows(dialogues, GENERATORS["instruction_dialogues"](DIALOGUES, SEED, "held_out", **turns))
    write_rows(instructions, GENERATORS["instructions"](INSTRUCTIONS, SEED))
    return dialogues, instructions


def measure(run: Path, output: Path) -> int:
    """Run the commands; returns the highest exit code."""
    baseline, policy = (str(model_of(run, stage)) for stage in POLICIES)
    compare = ["--compare", policy, "--device", "cpu"]
    files = map(str, write_data(output))
    kept = output / "instructions"
    checked = ["--checker", "testbed", "--max-new-tokens", "40", "--output-dir", str(kept)]
    if code := run_command(["evaluate", "instructions", baseline, *files, *compare, *checked]):
        return code
    rows = [row for _, row in read_rows(kept / "conversations-2.jsonl")]
    codes = []
    for name in ("language", "asked"):
        chosen = output / f"{name}.jsonl"
        write_rows(chosen, (row for row in rows if (row["group"] == "language") == (name == "language")))
        most = ["--most", str(ATTENTION_DIALOGUES), "--output-dir", str(output / f"attention_{name}")]
        codes.append(run_command(["evaluate", "attention", baseline, str(chosen), *compare, *most]))
    return max(codes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures of a run into a folder."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of one seed")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for tables and figures")
    given = parser.parse_args(arguments)
    return exit_code(lambda: measure(given.run, given.output))


if __name__ == "__main__":
    sys.exit(main())
