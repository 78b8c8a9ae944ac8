"""The token ids of all documents in one file; memory holds where each document begins, nothing else of it.

The folder is written once and whole. A run that was interrupted finds it, with the tokenizer, as it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama2_chat.files import atomic_path, read_json, write_json
from llama2_chat.packing import LazySequence
from llama2_chat.pretrain.text import TextCounts, read_documents, watched
from llama2_chat.pretrain.tokenizer import read_tokenizer
from llama2_chat.tokenization import TokenizedDialogue
from llama2_chat.tokenizers import HuggingFaceTokenizer

Integers = npt.NDArray[np.int64]
_ID = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Source:
    """What one file holds: documents, empty texts (skipped), and tokens with BOS and EOS of each document."""

    file: str
    documents: int
    empty: int
    tokens: int


class TokenStore:
    """Documents as token ids, numbered through all sources in their order."""

    def __init__(self, folder: Path) -> None:
        """Open what `write_token_store` wrote."""
        self._tokens = folder / "tokens.bin"
        self.tokenizer = HuggingFaceTokenizer(read_tokenizer(folder / "tokenizer.json"))
        self.sources = [Source(**row) for row in read_json(folder / "sources.json")]
        self.lengths: Integers = np.load(folder / "lengths.npy")
        """(documents,): tokens of each."""
        self._starts: Integers = np.cumsum(self.lengths) - self.lengths

    def lengths_by_source(self) -> list[Integers]:
        """One array for each source: the lengths of its documents."""
        ends = np.cumsum([source.documents for source in self.sources])
        return np.split(self.lengths, ends[:-1])

    def pieces(self, documents: Integers, length: int) -> Sequence[TokenizedDialogue]:
        """The documents of these numbers, each cut into pieces of at most `length` tokens, all trained.

        A piece is read from the file whenever it is asked for.
        """
        counts = count_pieces(self.lengths[documents], length)
        owners = np.repeat(documents, counts)
        # Which piece of its document each one is: 0, 1, …, starting again with every document.
        places = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = self._starts[owners] + places * length
        sizes = np.minimum(self.lengths[owners] - places * length, length)

        def piece(index: int) -> TokenizedDialogue:
            ids = self._read(int(starts[index]), int(sizes[index]))
            return TokenizedDialogue(ids, [True] * len(ids))

        return LazySequence(len(owners), piece)

    def _read(self, start: int, count: int) -> list[int]:
        # Not mapped into memory: pages that were read would count as this process's memory.
        ids: list[int] = np.fromfile(
            self._tokens, dtype=_ID, count=count, offset=start * _ID.itemsize
        ).tolist()
        return ids


def count_pieces(lengths: Integers, length: int) -> Integers:
    """How many pieces of at most `length` tokens each document makes."""
    counts: Integers = -(-lengths // length)
    return counts


def write_token_store(
    folder: Path, files: Sequence[Path], tokenizer: HuggingFaceTokenizer, description: str
) -> None:
    """Tokenise every document of `files`, each between BOS and EOS, into `folder`, atomically.

    Raises:
        DataFormatError: a row cannot be read.
        UserInputError: a file holds no document.
    """
    lengths = array("q")
    sources = []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tokenizer.hf.backend_tokenizer.save(str(temporary / "tokenizer.json"))
        with (temporary / "tokens.bin").open("wb") as stream:
            for file in files:
                counts, tokens = TextCounts(), 0
                for text in watched(read_documents(file, counts), f"{description}: tokens of {file.name}"):
                    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                    stream.write(np.array(ids, dtype=_ID).tobytes())
                    lengths.append(len(ids))
                    tokens += len(ids)
                sources.append(Source(file.name, counts.documents, counts.empty, tokens))
        np.save(temporary / "lengths.npy", np.array(lengths, dtype=np.int64))
        write_json(temporary / "sources.json", [asdict(source) for source in sources])
