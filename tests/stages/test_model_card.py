"""A model card names its inputs by their place in the run, never the folder of this machine."""

from llama2_chat.model_card import model_card
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft.config import SftConfig


def test_the_card_is_the_same_wherever_the_run_lies() -> None:
    def card(root: str) -> str:
        settings = RunSettings(base_model=BaseModelSource(path=f"{root}/models/tiny"))
        config = SftConfig(
            model=f"{root}/stages/01-x/model", dialogues=[f"{root}/data/d.jsonl", "/own/d.jsonl"]
        )
        return model_card("sft", config, settings)

    assert card("/somewhere/run") == card("/else")
    assert "- data/d.jsonl" in card("/somewhere/run")
    assert "model: stages/01-x/model" in card("/somewhere/run")
    assert "/own" not in card("/somewhere/run")
