"""Training on packed rows: attention dialogue by dialogue against transformers' masked attention, in turn.

    python benchmarks/packed_attention.py

The testbed's demonstrations in rows of 900 tokens, forward, backward and AdamW, float32 on the CPU: the embedded base
with one thread, and eight layers of SmolLM2-135M's shape (random weights) with all threads. Prints tokens/s of either,
their ratio, and the largest difference between the losses of the two on the same rows.
"""

from __future__ import annotations

import time
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
from smollm2_shape import smollm2_shape
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Dialogue
from llama2_chat.packed_attention import PACKED_ATTENTION, use_packed_attention
from llama2_chat.packing import PackedRow, collate_rows, pack
from llama2_chat.sft.trainer import trained_token_loss
from llama2_chat.testbed.generators import demonstrations
from llama2_chat.tokenization import tokenize_dialogues
from llama2_chat.tokenizers import load_tokenizer

ROW_TOKENS = 900
ROWS_PER_STEP = 2
ROUNDS = 3
BASE = Path(str(files("llama2_chat"))) / "recipes" / "tiny" / "base"


def packed_rows(steps: int) -> list[list[PackedRow]]:
    """Batches of rows, the dialogues in an order of their own and not by length."""
    chat_format = build_chat_format("llama2", load_tokenizer(str(BASE)))
    dialogues = [Dialogue.from_row(row) for row in demonstrations(1200, seed=0, long=0.1)]
    sequences, _ = tokenize_dialogues(dialogues, chat_format, "all_answers", ROW_TOKENS)
    rows = pack(sequences, ROW_TOKENS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = iter([rows[index] for index in order])
    return [list(islice(shuffled, ROWS_PER_STEP)) for _ in range(steps)]


def train(model: PreTrainedModel, batches: list[list[PackedRow]]) -> tuple[float, list[float]]:
    """Tokens per second over the batches, and the mean loss of each."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses = []
    started = time.perf_counter()
    for rows in batches:
        tensors = collate_rows(
            [{"input_ids": r.input_ids, "labels": r.labels, "position_ids": r.position_ids} for r in rows],
            padding_id=0,
        )
        total, _ = trained_token_loss(model, **tensors)
        loss = total / (tensors["labels"] >= 0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    tokens = sum(len(row.input_ids) for rows in batches for row in rows)
    return tokens / (time.perf_counter() - started), losses


def compare(name: str, model: PreTrainedModel, threads: int, steps: int) -> None:
    torch.set_num_threads(threads)
    batches = packed_rows(steps)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    rates: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for implementation in ("sdpa", PACKED_ATTENTION):
            model.load_state_dict(weights)
            model.set_attn_implementation("sdpa")
            if implementation == PACKED_ATTENTION:
                assert use_packed_attention(model)
            rate, losses[implementation] = train(model, batches)
            rates[implementation] = max(rate, rates.get(implementation, 0))
    masked, pieces = rates["sdpa"], rates[PACKED_ATTENTION]
    difference = max(abs(a - b) for a, b in zip(losses["sdpa"], losses[PACKED_ATTENTION], strict=True))
    print(
        f"{name}, {threads} threads: masked {masked:,.0f} tokens/s, dialogue by dialogue {pieces:,.0f} tokens/s, "
        f"ratio {pieces / masked:.2f}; losses differ by at most {difference:.1e}"
    )


def main() -> None:
    print(f"torch {torch.__version__}, rows of {ROW_TOKENS} tokens, best of {ROUNDS} rounds")
    all_threads = torch.get_num_threads()
    compare("embedded base", AutoModelForCausalLM.from_pretrained(BASE).train(), threads=1, steps=20)
    torch.manual_seed(0)
    compare("576 x 8 layers", LlamaForCausalLM(smollm2_shape(8)).train(), threads=all_threads, steps=3)


if __name__ == "__main__":
    main()
