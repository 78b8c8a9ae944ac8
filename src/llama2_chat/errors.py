"""Every error that the toolkit raises on purpose, each with the exit code the command line gives it.

An error message says where, what, what is allowed and what to do. A user's mistake is a
`UserInputError` (exit code 2); anything else that is foreseen is a `Llama2ChatError` (exit code 1).
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from pathlib import Path

_DISK_FULL_SIGNS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "unexpected pos ",  # torch.save, when a write ends early
)


class Llama2ChatError(Exception):
    """Base of all foreseen errors."""

    exit_code = 1


class UserInputError(Llama2ChatError, ValueError):
    """What the user gave cannot be used."""

    exit_code = 2


class DataFormatError(UserInputError):
    """A row of a data file is not of the documented format."""

    def __init__(self, path: Path | str, line: int | None, problem: str) -> None:
        place = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{place}: {problem}")


class ChatTagError(UserInputError):
    """Text that a user supplied holds a tag of the chat format, which could pose as another turn."""


class RecipeError(UserInputError):
    """A recipe or stage configuration is wrong; `problems` lists everything found, not only the first."""

    def __init__(self, source: Path | str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class MissingFileError(UserInputError, FileNotFoundError):
    """A file or folder that the user named does not exist."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class OutputFolderError(UserInputError, OSError):
    """Results cannot be written where the user asked for them."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SamplingServerError(Llama2ChatError, RuntimeError):
    """The server that samples does not start, fails, or answers with what it should not."""


class TrainingError(Llama2ChatError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the closest allowed word, or an empty string."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f' (did you mean "{matches[0]}"?)' if matches else ""


def disk_full(error: BaseException) -> bool:
    """Whether a full disk (or a quota, or a limit of file sizes) is at the root of an error.

    Libraries that write through native code report it as text only.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(seen) for sign in _DISK_FULL_SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or a GPU's (told by name and text: torch is not imported here)."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )
