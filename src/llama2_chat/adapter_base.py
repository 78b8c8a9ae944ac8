"""`base.json`: the model that a folder with an adapter alone stands on, and whether that is still the same.

Such a folder is what a stage with `training.lora.save: adapter_only` leaves; `models.py` loads it. No torch here: a
plan asks for the base too.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from llama2_chat.errors import MissingFileError, UserInputError
from llama2_chat.files import read_json, write_json
from llama2_chat.settings import BaseModelSource, StrictModel

BASE_FILE = "base.json"
_BLOCKS, _BLOCK_BYTES = 256, 4096


class _Named(StrictModel):
    """The file's contents."""

    path: str
    """From the folder with the adapter, or absolute; or a hub id."""
    gguf_file: str | None = None
    weights: str | None = None
    """`_identity` of a local base as it was when the adapter was saved."""


def base_of(folder: str | Path) -> BaseModelSource | None:
    """The model that the adapter in `folder` is to be merged into; None where the folder holds a whole model.

    Raises:
        MissingFileError: the base is not where `base.json` says.
        UserInputError: it is there with other weights, or `base.json` cannot be read.
    """
    file = Path(folder) / BASE_FILE
    if not file.is_file():
        return None
    try:
        named = _Named(**read_json(file))
    except (ValueError, TypeError) as error:
        raise UserInputError(
            f"{file}: is not as a stage writes it, path, gguf_file and weights ({error}); run the stage again"
        ) from None
    base = BaseModelSource(path=_found(named.path, Path(folder)), gguf_file=named.gguf_file)
    if named.weights is None:
        return base
    if not all(weights.is_file() for weights in _weight_files(base)):
        missing = Path(base.path) / (base.gguf_file or "*.safetensors")
        raise MissingFileError(
            f"{folder}: holds an adapter alone, and the model that it was trained on is not there: {missing}; put it "
            f"back, or write where it lies now as the path in {file}"
        )
    if _identity(base) != named.weights:
        raise UserInputError(
            f"{folder}: holds an adapter alone, and {base.path} has other weights now than when it was trained on "
            f"them; put those back, or run the stage that made {folder} again"
        )
    return base


def whole_model(source: BaseModelSource) -> BaseModelSource:
    """The model at the bottom of a chain of adapters; a whole model is its own.

    Raises:
        UserInputError: as `base_of`.
    """
    while (base := base_of(source.path)) is not None:
        source = base
    return source


def name_base(base: BaseModelSource, folder: Path, *, into: Path) -> None:
    """Write `base.json` into `into`, which will be `folder`.

    A base in the same run directory (or beside the folder of a stage that runs alone) is named by the way there, so
    that all of it can be moved; any other by its full path.
    """
    if not Path(base.path).is_dir():
        write_json(into / BASE_FILE, _Named(path=base.path, gguf_file=base.gguf_file).model_dump())
        return
    own, there = Path(os.path.realpath(folder)), Path(os.path.realpath(base.path))
    stages = own.parent.parent
    together = stages.parent if stages.name == "stages" else stages
    path = os.path.relpath(there, own) if there.is_relative_to(together) else str(there)
    named = _Named(path=path, gguf_file=base.gguf_file, weights=_identity(base))
    write_json(into / BASE_FILE, named.model_dump())


def _found(path: str, folder: Path) -> str:
    """Where the base lies now; its stage's folder may have got another number since. A hub id is left as it is."""
    if not path.startswith((".", "/")):
        return path
    there = Path(os.path.realpath(folder / path))
    numbered = re.fullmatch(r"\d+-(.+)", there.parent.name)
    if there.is_dir() or numbered is None:
        return str(there)
    again = re.compile(rf"\d+-{re.escape(numbered[1])}")
    stages = there.parent.parent
    others = [stage for stage in stages.glob(f"*-{numbered[1]}") if again.fullmatch(stage.name)]
    return str(others[0] / there.name) if len(others) == 1 else str(there)


def _weight_files(base: BaseModelSource) -> list[Path]:
    """At least one; it may not be there."""
    folder = Path(base.path)
    if base.gguf_file is not None:
        return [folder / base.gguf_file]
    return sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]


def _identity(base: BaseModelSource) -> str:
    """Hash of the weights' files, their sizes and blocks all over them: training changes weights everywhere.

    Of an adapter alone its own: it names what it stands on.
    """
    digest = hashlib.sha256()
    for file in _weight_files(base):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for number in range(_BLOCKS):
                stream.seek(size * number // _BLOCKS)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
