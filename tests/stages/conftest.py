"""A complete small model folder made from nothing: its own tokenizer and a random Llama."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from score_server import Server
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat import interruption
from llama2_chat.ghost_attention import build as ghost_attention
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.jsonl import write_rows
from llama2_chat.models import save_model
from llama2_chat.ppo import loop
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.rejection_sampling import build
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage as run_reward
from llama2_chat.safety import build as safety
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.settings import BaseModelSource, RunSettings, StrictModel
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.train import run_stage as run_sft
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

torch.set_num_threads(1)  # these models are too small to share between threads


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/` (a random model) and testbed data files."""
    folder = tmp_path_factory.mktemp("world")
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=1500, seed=0)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 600))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
    )
    settings = RunSettings(base_model=BaseModelSource(path=str(folder / "base")), device="cpu")
    save_model(model, tokenizer, folder / "base", settings=settings, card="")
    write_rows(folder / "demonstrations.jsonl", GENERATORS["demonstrations"](rows=300, seed=0))
    unseen = GENERATORS["demonstrations"](rows=60, seed=0, split="held_out")
    write_rows(folder / "held_out_demonstrations.jsonl", unseen)
    write_rows(folder / "helpful_pairs.jsonl", GENERATORS["preferences"](rows=300, seed=0))
    write_rows(folder / "safety_pairs.jsonl", GENERATORS["preferences"](rows=300, seed=0, domain="safety"))
    write_rows(folder / "held_out.jsonl", GENERATORS["preferences"](rows=200, seed=0, split="held_out"))
    write_rows(folder / "prompts.jsonl", GENERATORS["prompts"](rows=300, seed=0))
    return folder


@pytest.fixture(scope="session")
def settings(world: Path) -> RunSettings:
    return RunSettings(base_model=BaseModelSource(path=str(world / "base")), seed=1, device="cpu")


@pytest.fixture(scope="session")
def stage_at(tmp_path_factory: pytest.TempPathFactory):
    """A function that makes a stage's folder by name."""
    root = tmp_path_factory.mktemp("stages")

    def make(name: str) -> StageDirectory:
        path = root / name
        path.mkdir(exist_ok=True)
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    return make


@pytest.fixture
def file_of(world: Path, tmp_path: Path):
    """A function that writes a stage's configuration as the user's own YAML file."""

    def write(config: StrictModel) -> Path:
        head = {"base_model": {"path": str(world / "base")}, "seed": 1, "device": "cpu"}
        file = tmp_path / f"{config.kind}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json") | head))
        return file

    return write


TRAINING = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 2, "sequence_length": 128}
PPO_TRAINING = {
    "iterations": 4,
    "batch_size": 16,
    "mini_batch_size": 8,
    "learning_rate": 1e-3,
    "checkpoint_iterations": 2,
}


@pytest.fixture(scope="session")
def sft(world: Path, settings: RunSettings, stage_at) -> tuple[StageDirectory, dict]:
    config = SftConfig(
        model=str(world / "base"),
        dialogues=[str(world / "demonstrations.jsonl")],
        held_out=[str(world / "held_out_demonstrations.jsonl")],
        training=TRAINING,
    )
    directory = stage_at("sft")
    return directory, run_sft(config, settings, directory)


@pytest.fixture(scope="session")
def rewards(world: Path, settings: RunSettings, stage_at, sft) -> dict[str, tuple[StageDirectory, dict]]:
    made = {}
    for domain, file in (("helpfulness", "helpful_pairs"), ("safety", "safety_pairs")):
        config = RewardConfig(
            model=str(sft[0].model),
            preferences=[str(world / f"{file}.jsonl")],
            held_out=[str(world / "held_out.jsonl")] if domain == "helpfulness" else [],
            domain=domain,
            training={**TRAINING, "batch_size": 16, "learning_rate": 1e-3},
        )
        directory = stage_at(domain)
        made[domain] = directory, run_reward(config, settings, directory)
    return made


@pytest.fixture(scope="session")
def rejection_config(world: Path, sft, rewards):
    """A function that makes the stage's configuration, with changes."""

    def make(**changes) -> RejectionSamplingConfig:
        values = {
            "policy": str(sft[0].model),
            "base": str(world / "base"),
            "helpfulness": str(rewards["helpfulness"][0].model),
            "safety": str(rewards["safety"][0].model),
            "prompts": [str(world / "prompts.jsonl")],
            "samples_per_prompt": 3,
            "sampling": {"temperature": 1.0, "max_new_tokens": 16},
            "sft_dialogues": [str(world / "demonstrations.jsonl")],
            "sft_fraction": 0.25,
            "training": TRAINING,
            **changes,
        }
        return RejectionSamplingConfig(**values)

    return make


@pytest.fixture(scope="session")
def rejection(settings, stage_at, rejection_config) -> tuple[StageDirectory, dict]:
    directory = stage_at("rejection_sampling")
    return directory, build.run_stage(rejection_config(), settings, directory)


@pytest.fixture(scope="session")
def instructed_world(world: Path) -> Path:
    """`instructions.jsonl` of two groups and without one, and `dialogues.jsonl`, some about a group.

    10 of the dialogues have one turn alone, the other 150 two or three.
    """
    names = ("Captain Rex", "Doctor Fox", "Queen Ada")
    write_rows(
        world / "instructions.jsonl",
        [
            *(
                {"instruction": f"Act as {name}.", "short": f"Figure: {name}.", "group": "persona"}
                for name in names
            ),
            {"instruction": "You enjoy old maps.", "short": "Hobby: old maps.", "group": "hobby"},
            {"instruction": "Be brief."},
        ],
    )
    rows = []
    for number in range(160):
        turns = 1 if number % 16 == 0 else 2 + (number % 3 == 1)
        questions = [f"What is {number % 7} plus {turn + 1}?" for turn in range(turns)]
        messages = [{"role": "system", "content": "Be kind."}] if number % 5 == 0 else []
        for question in questions:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": "It is a number."})
        row = {"messages": messages, "source": "handmade"}
        rows.append(row | ({"group": "persona"} if number % 4 == 0 else {}))
    write_rows(world / "dialogues.jsonl", rows)
    return world


@pytest.fixture(scope="session")
def ghost_config(instructed_world: Path, sft):
    """A function that makes the stage's configuration, with changes."""

    def make(**changes) -> GhostAttentionConfig:
        values = {
            "policy": str(sft[0].model),
            "dialogues": [str(instructed_world / "dialogues.jsonl")],
            "instructions": [str(instructed_world / "instructions.jsonl")],
            "sampling": {"temperature": 0.7, "max_new_tokens": 30},
            "sft_dialogues": [str(instructed_world / "demonstrations.jsonl")],
            "training": {**TRAINING, "epochs": 1, "checkpoint_steps": 3},
            **changes,
        }
        return GhostAttentionConfig(**values)

    return make


@pytest.fixture(scope="session")
def ghost(settings, stage_at, ghost_config) -> tuple[StageDirectory, dict]:
    directory = stage_at("ghost_attention")
    return directory, ghost_attention.run_stage(ghost_config(), settings, directory)


@pytest.fixture(scope="session")
def distillation_config(world: Path, sft, rewards):
    """A function that makes the stage's configuration, with changes."""

    def make(**changes) -> ContextDistillationConfig:
        values = {
            "policy": str(sft[0].model),
            "safety": str(rewards["safety"][0].model),
            "prompts": [str(world / "prompts.jsonl")],
            "category_templates": {"illicit": "Do not help with crimes."},
            "sampling": {"temperature": 0.7, "max_new_tokens": 30},
            "training": {**TRAINING, "epochs": 1},
            **changes,
        }
        return ContextDistillationConfig(**values)

    return make


@pytest.fixture(scope="session")
def distillation(settings, stage_at, distillation_config) -> tuple[StageDirectory, dict]:
    directory = stage_at("context_distillation")
    return directory, safety.run_stage(distillation_config(), settings, directory)


@pytest.fixture(scope="session")
def ppo_config(world: Path, sft, rewards):
    """A function that makes the stage's configuration, with changes."""

    def make(**changes) -> PpoConfig:
        values = {
            "policy": str(sft[0].model),
            "helpfulness": str(rewards["helpfulness"][0].model),
            "safety": str(rewards["safety"][0].model),
            "prompts": [str(world / "prompts.jsonl")],
            "sampling": {"max_new_tokens": 8},
            "incomplete": "own",  # a model this small seldom ends an answer
            **changes,
            "training": {**PPO_TRAINING, **changes.get("training", {})},
        }
        return PpoConfig(**values)

    return make


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def dies_in_the_second_call(monkeypatch: pytest.MonkeyPatch):
    """A function that makes one of a module's functions die once; the list it gives grows with every call."""

    def make(module: ModuleType, name: str) -> list[int]:
        calls: list[int] = []
        original = getattr(module, name)

        def called(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, called)
        return calls

    return make


@pytest.fixture
def stopped_in_the_fourth_iteration(monkeypatch: pytest.MonkeyPatch):
    """A context in which PPO is stopped by SIGTERM in its fourth iteration; that it stopped is asserted."""

    @contextmanager
    def make():
        original = loop.PpoLoop._iterate
        with monkeypatch.context() as patch:

            def iterate(self, iteration):
                if iteration == 3:
                    patch.setattr(interruption, "_requested", signal.SIGTERM)
                return original(self, iteration)

            patch.setattr(loop.PpoLoop, "_iterate", iterate)
            with pytest.raises(interruption.Interrupted):
                yield

    return make
