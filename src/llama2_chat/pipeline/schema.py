"""JSON Schema of recipes, so that an editor can complete and check them."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.data_entries import FileData, GeneratedData, ImportedData
from llama2_chat.pipeline.iterations_config import FILLED_IN, IterationsConfig
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
    properties["iterations"] = {"anyOf": [defined(IterationsConfig), {"type": "null"}]}
    _describe_sections(definitions)
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


def _describe_sections(definitions: dict[str, Any]) -> None:
    """Sections of `iterations`: their own keys and those of their kind of stage, none of which has to be there."""
    iterations = definitions[IterationsConfig.__name__]["properties"]
    for name, filled_in in FILLED_IN.items():
        annotation = IterationsConfig.model_fields[name].annotation
        own = next((part for part in (annotation, *get_args(annotation)) if _is_model(part)), None)
        of_stage = definitions[STAGE_KINDS[name].load_config_class().__name__]["properties"]
        properties = {key: value for key, value in of_stage.items() if key not in filled_in}
        properties |= definitions[own.__name__]["properties"] if own is not None else {}
        section = {"type": "object", "properties": properties, "additionalProperties": False}
        definitions[f"{name}_section"] = section
        described = {"$ref": f"#/$defs/{name}_section"}
        optional = iterations[name].get("anyOf") is not None
        iterations[name] = {"anyOf": [described, {"type": "null"}]} if optional else described


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)
