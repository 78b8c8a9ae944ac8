"""`save: adapter_only`: models without weights of their own are, loaded, to the bit those that were saved whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from llama2_chat import RewardScorer
from llama2_chat.adapter_base import base_of, whole_model
from llama2_chat.dialogue import Message
from llama2_chat.errors import MissingFileError, UserInputError
from llama2_chat.generation.backends import _folder_for_vllm
from llama2_chat.models import load_policy, load_reward_model
from llama2_chat.pipeline.fingerprints import fingerprint_of_files
from llama2_chat.pipeline.plan import _base_size
from llama2_chat.pipeline.reference_checks import model_problems
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.train import run_stage as run_ppo
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage as run_reward
from llama2_chat.safety import build as safety
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.train import run_stage as run_sft
from llama2_chat.stage import EventLog, StageDirectory

IDS = torch.tensor([[1, 20, 33, 48, 5, 2]])
LORA = {"rank": 4, "alpha": 8}
TRAINING = {"learning_rate": 1e-2, "batch_size": 8, "epochs": 1, "sequence_length": 128, "max_steps": 3}


class Run(NamedTuple):
    """A run directory with a chain of two policies, a reward model and PPO on top, all LoRA."""

    path: Path
    save: str
    settings: RunSettings
    world: Path

    def stage(self, name: str) -> StageDirectory:
        (path,) = self.path.glob(f"stages/*-{name}")
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    def make(self, folder: str) -> StageDirectory:
        path = self.path / "stages" / folder
        path.mkdir(parents=True)
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    def model(self, name: str) -> str:
        return str(self.stage(name).model)

    def lora(self, **changes: object) -> dict[str, object]:
        return {"lora": {**LORA, "save": self.save, **changes}}

    def fine_tune(self, folder: str, start: str) -> StageDirectory:
        config = SftConfig(
            model=start,
            dialogues=[str(self.world / "demonstrations.jsonl")],
            training={**TRAINING, **self.lora()},
        )
        directory = self.make(folder)
        run_sft(config, self.settings, directory)
        return directory


def make_run(path: Path, save: str, settings: RunSettings, world: Path) -> Run:
    run = Run(path, save, settings.model_copy(update={"chat_format": "tokenizer"}), world)
    run.fine_tune("01-sft", str(world / "base"))
    run.fine_tune("02-second", run.model("sft"))
    reward = RewardConfig(
        model=run.model("second"),
        preferences=[str(world / "helpful_pairs.jsonl")],
        domain="helpfulness",
        training={**TRAINING, **run.lora()},
    )
    run_reward(reward, run.settings, run.make("03-reward"))
    ppo = PpoConfig(
        policy=run.model("second"),
        helpfulness=run.model("reward"),
        prompts=[str(world / "prompts.jsonl")],
        sampling={"max_new_tokens": 6},
        incomplete="own",
        training={
            "iterations": 2,
            "batch_size": 8,
            "mini_batch_size": 8,
            "learning_rate": 1e-2,
            **run.lora(),
        },
    )
    run_ppo(ppo, run.settings, run.make("04-ppo"))
    return run


@pytest.fixture(scope="module")
def whole(world: Path, settings, tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("whole"), "merged", settings, world)


@pytest.fixture(scope="module")
def adapters(world: Path, settings, tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("adapters"), "adapter_only", settings, world)


@pytest.fixture
def copied(adapters: Run, tmp_path: Path) -> Run:
    """The run in another place, to be changed."""
    shutil.copytree(adapters.path, tmp_path / "elsewhere" / "run")
    return adapters._replace(path=tmp_path / "elsewhere" / "run")


def bits(model: PreTrainedModel) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def load(run: Run, name: str) -> PreTrainedModel:
    return (load_reward_model if name == "reward" else load_policy)(run.model(name), run.settings)


@pytest.mark.parametrize("name", ["sft", "second", "reward", "ppo"])
def test_weights_and_outputs_are_those_of_the_whole_model_to_the_bit(
    adapters: Run, whole: Run, name: str
) -> None:
    """Of each stage, which all but the first began from the one before, and PPO was judged by the third."""
    one, other = load(adapters, name), load(whole, name)
    assert type(one) is type(other)
    assert bits(one) == bits(other)
    assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
    assert all(parameter.requires_grad for parameter in one.parameters())
    assert not any(module.training for module in one.modules())
    own, same = one.config.to_dict(), other.config.to_dict()
    assert one.name_or_path == own.pop("_name_or_path") == adapters.model(name)
    assert same.pop("_name_or_path") == whole.model(name)
    assert own == same
    assert own["chat_format"] == "tokenizer"
    metrics = [run.stage(name).metrics_file.read_bytes() for run in (adapters, whole)]
    assert metrics[0] == metrics[1] != b""


@pytest.mark.parametrize("name", ["sft", "second", "reward", "ppo"])
def test_the_folder_holds_the_adapter_and_all_but_weights(adapters: Run, whole: Run, name: str) -> None:
    own, other = (
        {file.name: file.stat().st_size for file in run.stage(name).model.iterdir()}
        for run in (adapters, whole)
    )
    assert set(own) - set(other) == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    assert set(other) - set(own) == {"model.safetensors"}
    assert own["adapter_model.safetensors"] < 0.3 * other["model.safetensors"]
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (adapters.stage(name).model / file).read_bytes() == (
            whole.stage(name).model / file
        ).read_bytes()
    told = ["`base.json`" in (run.stage(name).model / "README.md").read_text() for run in (adapters, whole)]
    assert told == [True, False]
    assert not adapters.stage(name).adapter.exists()
    assert whole.stage(name).adapter.exists()


def test_scores_are_the_same(adapters: Run, whole: Run) -> None:
    dialogue = [Message(role="user", content="What is 2 plus 2?"), Message(role="assistant", content="4.")]
    one, other = (
        RewardScorer.from_pretrained(run.model("reward"), device="cpu").score([dialogue])[0].helpfulness
        for run in (adapters, whole)
    )
    assert one == other


def test_loading_leaves_the_random_numbers_as_they_are(adapters: Run) -> None:
    for name in ("second", "reward"):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        load(adapters, name)
        assert torch.equal(torch.get_rng_state(), before)


def test_peft_loads_the_adapter_on_the_base(adapters: Run, whole: Run) -> None:
    for name, auto, options in (
        ("sft", AutoModelForCausalLM, {}),
        ("reward", AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        start = adapters.world / "base" if name == "sft" else whole.model("second")
        base = auto.from_pretrained(start, **options)
        plain = base(input_ids=IDS).logits
        adapted = peft.PeftModel.from_pretrained(base, adapters.stage(name).model).eval()
        adapted.config.pad_token_id = 0
        ours = load(adapters, name)(input_ids=IDS).logits
        torch.testing.assert_close(adapted(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-2


def test_a_run_directory_can_be_moved(copied: Run, adapters: Run, whole: Run) -> None:
    """With the run that it was copied from gone, and its stages with other numbers."""
    hidden = adapters.path.rename(adapters.path.with_name("hidden"))
    try:
        stages = copied.path / "stages"
        assert json.loads((stages / "02-second/model/base.json").read_text())["path"] == "../../01-sft/model"
        base = json.loads((stages / "01-sft/model/base.json").read_text())["path"]
        assert Path(base) == (copied.world / "base").resolve()
        assert bits(load(copied, "ppo")) == bits(load(whole, "ppo"))
        (stages / "01-sft").rename(stages / "03-sft")
        (stages / "04-no-sft").mkdir()
        assert bits(load(copied, "ppo")) == bits(load(whole, "ppo"))
    finally:
        hidden.rename(adapters.path)


def test_a_base_that_is_not_there_is_named(copied: Run) -> None:
    sft = copied.stage("sft")
    shutil.rmtree(sft.model)
    with pytest.raises(
        MissingFileError, match=r"02-second/model: holds an adapter alone.*01-sft/model.*put it back"
    ):
        load(copied, "reward")


def test_a_base_with_other_weights_is_refused(copied: Run) -> None:
    file = copied.stage("sft").model / "adapter_model.safetensors"
    written = bytearray(file.read_bytes())
    written[-1] ^= 1
    file.write_bytes(bytes(written))
    for name in ("second", "ppo"):  # ppo stands on second
        with pytest.raises(UserInputError, match=r"02-second/model: .*01-sft/model has other weights now"):
            load(copied, name)
    assert load(copied, "sft") is not None


def test_a_base_file_that_cannot_be_read_is_named(copied: Run) -> None:
    file = copied.stage("second").model / "base.json"
    for text in ("{", "[]", '{"path": 3}'):
        file.write_text(text)
        with pytest.raises(UserInputError, match=r"02-second/model/base\.json: is not as a stage writes it"):
            load(copied, "second")


def test_stopped_and_resumed_ends_with_the_same_bytes(
    adapters: Run, tmp_path: Path, interrupted_after
) -> None:
    run = adapters._replace(path=tmp_path)
    shutil.copytree(adapters.path / "stages" / "01-sft", tmp_path / "stages" / "01-sft")
    with interrupted_after(2):
        run.fine_tune("02-second", run.model("sft"))
    directory = run.stage("second")
    assert not directory.model.exists()
    config = SftConfig(
        model=run.model("sft"),
        dialogues=[str(run.world / "demonstrations.jsonl")],
        training={**TRAINING, **run.lora()},
    )
    # A run that was killed while it wrote its model has left the adapter.
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").write_bytes(b"half")
    run_sft(config, run.settings, directory)
    for file in ("adapter_model.safetensors", "adapter_config.json", "base.json", "config.json"):
        same = adapters.stage("second").model / file
        assert (directory.model / file).read_bytes() == same.read_bytes()
    assert not directory.adapter.exists()


def test_a_policy_that_nothing_is_distilled_into_goes_on_as_an_adapter(
    adapters: Run, whole: Run, distillation_config, monkeypatch
) -> None:
    config = distillation_config(
        policy=adapters.model("second"), training={**TRAINING, **adapters.lora(target_modules=["q_proj"])}
    )
    directory = adapters.make("05-unchanged")
    safety._keep_policy(config, adapters.settings, directory, "")
    assert not list(directory.model.glob("model*.safetensors"))
    assert bits(load(adapters, "unchanged")) == bits(load(whole, "second"))


def test_vllm_is_given_a_whole_model_for_as_long_as_it_runs(adapters: Run, whole: Run) -> None:
    with _folder_for_vllm(adapters.model("second"), adapters.settings, None) as folder:
        given = AutoModelForCausalLM.from_pretrained(folder)
        assert bits(given) == bits(load(whole, "second"))
    assert not Path(folder).exists()
    with _folder_for_vllm(whole.model("second"), whole.settings, None) as folder:
        assert folder == whole.model("second")


def test_how_a_model_is_saved_is_no_part_of_what_it_is(adapters: Run) -> None:
    def fingerprint(lora: dict[str, object]) -> str:
        config = SftConfig(
            model=str(adapters.world / "base"),
            dialogues=[str(adapters.world / "demonstrations.jsonl")],
            training={**TRAINING, "lora": lora},
        )
        return fingerprint_of_files(config, adapters.settings)

    assert fingerprint({**LORA, "save": "merged"}) == fingerprint({**LORA, "save": "adapter_only"})
    assert fingerprint({**LORA, "rank": 5}) != fingerprint(LORA)


def test_a_recipe_that_names_an_adapter_without_its_base_is_told_so(copied: Run) -> None:
    folder = copied.path / "stages" / "02-second"
    assert model_problems({"models": {"small": "model"}}, folder) == []
    shutil.rmtree(copied.stage("sft").model)
    (problem,) = model_problems({"models": {"small": "model"}}, folder)
    assert problem.startswith(f"models.small.path: {folder / 'model'}: holds an adapter alone")


def test_a_plan_counts_the_model_below_the_adapters(adapters: Run, whole: Run) -> None:
    assert _base_size(adapters.model("ppo"), None) == _base_size(whole.model("ppo"), None)
    base = BaseModelSource(path=str((adapters.world / "base").resolve()))
    assert whole_model(BaseModelSource(path=adapters.model("ppo"))) == base
    assert base_of(whole.model("ppo")) is None
