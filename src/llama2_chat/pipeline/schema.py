"""JSON Schema of recipes, so that an editor can complete and check them."""

from __future__ import annotations

from typing import Any

from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.data_entries import FileData, GeneratedData, ImportedData
from llama2_chat.pipeline.recipe import RecipeHead
from llama2_chat.settings import StrictModel
from llama2_chat.stage import STAGE_KINDS


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe file (JSON Schema 2020-12)."""
    definitions: dict[str, Any] = {}

    def defined(model: type[StrictModel]) -> dict[str, str]:
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        definitions[model.__name__] = schema
        return {"$ref": f"#/$defs/{model.__name__}"}

    head = RecipeHead.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(head.pop("$defs", {}))
    stages = [defined(kind.load_config_class()) for kind in STAGE_KINDS.values()]
    for kind in STAGE_KINDS.values():
        name = kind.load_config_class().__name__
        definitions[name]["required"] = sorted({*definitions[name].get("required", []), "kind"})
    entries = [{"type": "string"}, *(defined(model) for model in (FileData, ImportedData, GeneratedData))]
    properties = head["properties"]
    properties["base_model"] = {"anyOf": [{"type": "string"}, properties["base_model"]]}
    properties["models"]["additionalProperties"] = {
        "anyOf": [{"type": "string"}, properties["models"]["additionalProperties"]]
    }
    properties["data"] = {"type": "object", "additionalProperties": {"anyOf": entries}}
    properties["stages"] = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": stages}}
    properties["evaluation"] = {"anyOf": [defined(EvaluationConfig), {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llama2-chat recipe",
        "type": "object",
        "properties": properties,
        "required": ["name", "base_model", "stages"],
        "additionalProperties": False,
        "$defs": definitions,
    }
