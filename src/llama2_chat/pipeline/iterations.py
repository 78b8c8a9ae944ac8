"""From a recipe's `iterations` to plain stages, before anything else is checked.

For each version n, in this order: `vn_helpfulness_pairs`, `vn_safety_pairs`, `vn_helpfulness_rm`, `vn_safety_rm`,
`vn_rejection_sampling`, `vn_ppo`, `vn_ghost_attention`, as far as the recipe has them; last `context_distillation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2_chat.errors import RecipeError, did_you_mean
from llama2_chat.pipeline.iterations_config import (
    FILLED_IN,
    Fields,
    IterationsConfig,
    VersionOverrides,
)
from llama2_chat.pipeline.problems import validated
from llama2_chat.pipeline.reference_checks import start_problems

_KEY = "iterations"
_DOMAINS = ("helpfulness", "safety")
_REPLACED_WHOLE = ("annotator", "margin")
"""Mappings that are one value; all others are merged key by key."""


@dataclass(frozen=True)
class Layer:
    """Fields of a stage as they are written at one place of the recipe."""

    key: str
    fields: Mapping[Any, Any]


@dataclass(frozen=True)
class Expansion:
    """A recipe without `iterations`, and where each field of the stages made of it was written."""

    recipe: dict[str, Any]
    layers: Mapping[str, Sequence[Layer]] = field(default_factory=dict)
    """By stage; later ones win."""

    def located(self, problems: Sequence[str]) -> list[str]:
        """Problems with the keys that the recipe's author wrote; what several stages share is told once."""
        return list(dict.fromkeys(map(self._located, problems)))

    def _located(self, problem: str) -> str:
        key, colon, message = problem.partition(": ")
        section, _, rest = key.partition(".")
        stage, _, place = rest.partition(".")
        if section != "stages" or stage not in self.layers:
            return problem
        layers = self.layers[stage]
        holding = [layer for layer in layers if _holds(layer.fields, place)]
        # What is written nowhere is missing in the section, not in the stage at the start.
        found = holding[-1] if holding else next(layer for layer in layers if layer.key.startswith(_KEY))
        return f"{found.key}{'.' if place else ''}{place}{colon}{message}"


def expand_iterations(recipe: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """The recipe with `iterations` written out as stages after those of `stages`; as it is where it has none.

    Args:
        folder: What relative paths in the recipe start from.

    Raises:
        RecipeError: with everything that is wrong with the compact form itself.
    """
    return expansion(recipe, folder).recipe


def expansion(recipe: Mapping[str, Any], folder: Path) -> Expansion:
    """The same, with what tells where a field was written."""
    rest = {key: value for key, value in recipe.items() if key != _KEY}
    stages = recipe.get("stages")
    if recipe.get(_KEY) is None or not isinstance(stages, Mapping):
        return Expansion(rest)
    problems: list[str] = []
    config = validated(IterationsConfig, recipe[_KEY], _KEY, problems)
    problems += start_problems(recipe, folder)
    if config is not None:
        problems += _schedule_problems(config, stages)
    if config is None or problems:
        raise RecipeError("recipe", problems)
    versions = _Versions(config, stages)
    versions.make()
    data = recipe.get("data")
    names = {*stages, *(data if isinstance(data, Mapping) else ())}
    if taken := [name for name in versions.made if name in names]:
        raise RecipeError("recipe", [_clash(name, versions.layers[name]) for name in taken])
    return Expansion({**rest, "stages": {**stages, **versions.made}}, versions.layers)


def _clash(name: str, layers: Sequence[Layer]) -> str:
    return (
        f"{_KEY}: makes a stage {name}, a name that stages or data has too; rename that one, or, if the version's "
        f"stage is meant, set {layers[-1].key}"
    )


class _Versions:
    """The stages, made one after the other."""

    def __init__(self, config: IterationsConfig, stages: Mapping[str, Any]) -> None:
        self.config, self.stages = config, stages
        self.made: dict[str, dict[str, Any]] = {}
        self.layers: dict[str, list[Layer]] = {}
        self._policies = [config.start]
        self._judges: dict[str, Any] = {
            domain: judge for domain in _DOMAINS if (judge := _plain(getattr(config, domain))) is not None
        }
        self._batches: dict[str, list[str]] = {domain: [] for domain in _DOMAINS}

    def make(self) -> None:
        """All of them."""
        for number in range(1, self.config.count + 1):
            own = self.config.of_version(number)
            fresh = [domain for domain in self._judges if self._collect(number, domain, own)]
            for domain in fresh:
                self._retrain(number, domain, own)
            self._sample(number, own)
            ppo, ghost = self.config.ppo, self.config.ghost_attention
            if ppo is not None and number >= ppo.first:
                layers = [Layer(f"{_KEY}.ppo", ppo.fields), _override(number, "ppo", own.ppo)]
                self._policy(f"v{number}_ppo", "ppo", layers, self._judges)
            if ghost is not None and number == ghost.after:
                layers = [Layer(f"{_KEY}.ghost_attention", ghost.fields)]
                layers.append(_override(number, "ghost_attention", own.ghost_attention))
                self._policy(f"v{number}_ghost_attention", "ghost_attention", layers)
        if self.config.context_distillation is not None:
            layers = [Layer(f"{_KEY}.context_distillation", self.config.context_distillation)]
            judge = {"safety": self._judges["safety"]}
            self._policy("context_distillation", "context_distillation", layers, judge)

    def _collect(self, number: int, domain: str, own: VersionOverrides) -> bool:
        """The stage that collects a domain's pairs for this version; false where there is none."""
        section = self.config.preferences
        if section is None or own.preferences is None or section.of_domain(domain) is None:
            return False
        layers = _by_domain(f"{_KEY}.preferences", section.fields, section.of_domain(domain) or {}, domain)
        layers += _override_by_domain(number, "preferences", own.preferences, domain)
        name = f"v{number}_{domain}_pairs"
        policies = self._policies[: -section.variants - 1 : -1]
        self._add(
            name, layers, {"kind": "preferences", "policies": policies, "domain": domain, "iteration": number}
        )
        self._batches[domain].append(name)
        return True

    def _retrain(self, number: int, domain: str, own: VersionOverrides) -> None:
        """The domain's reward model, from the start again on the first pairs and those of all batches so far."""
        section = self.config.reward
        if section is None or own.reward is None or section.of_domain(domain) is None:
            return
        first = getattr(self.config, domain)
        at_start = {key: value for key, value in self.stages[first].items() if key != "model"}
        layers = [Layer(f"stages.{first}", at_start)]
        layers += _by_domain(f"{_KEY}.reward", section.fields, section.of_domain(domain) or {}, domain)
        layers += _override_by_domain(number, "reward", own.reward, domain)
        given = _merged(layers)
        batches, others = self._batches[domain], self._batches[_DOMAINS[domain == "helpfulness"]]
        filled: dict[str, Any] = {
            "model": given.get("model", self.config.start),
            "preferences": _extended(given.get("preferences", []), batches),
            "held_out": _extended(given.get("held_out", []), [f"{batch}.held_out" for batch in batches]),
        }
        if given.get("other_preferences"):
            filled["other_preferences"] = _extended(given["other_preferences"], others)
        name = f"v{number}_{domain}_rm"
        self._add(name, layers, filled)
        self._judges[domain] = name

    def _sample(self, number: int, own: VersionOverrides) -> None:
        layers = [Layer(f"{_KEY}.rejection_sampling", self.config.rejection_sampling)]
        layers.append(_override(number, "rejection_sampling", own.rejection_sampling))
        filled: dict[str, Any] = {**self._judges, "iteration": number}
        if number > 1:
            filled["earlier_samples"] = [
                f"v{before}_rejection_sampling.samples" for before in range(1, number)
            ]
        self._policy(f"v{number}_rejection_sampling", "rejection_sampling", layers, filled)

    def _policy(
        self, name: str, kind: str, layers: list[Layer], filled: Mapping[str, Any] | None = None
    ) -> None:
        """A stage that goes on from the last policy and makes the next one."""
        self._add(name, layers, {"kind": kind, "policy": self._policies[-1], **(filled or {})})
        self._policies.append(name)

    def _add(self, name: str, layers: list[Layer], filled: Mapping[str, Any]) -> None:
        given = {key: value for key, value in _merged(layers).items() if key not in filled}
        kind = {"kind": filled.get("kind", given.pop("kind", None))}
        self.made[name] = deepcopy({**kind, **filled, **given})
        self.layers[name] = layers


def _plain(reward: Any) -> Any:
    """A reward model's name, or a custom reward as a mapping."""
    return reward if reward is None or isinstance(reward, str) else reward.model_dump()


def _by_domain(key: str, common: Fields, own: Fields, domain: str) -> list[Layer]:
    return [Layer(key, common), Layer(f"{key}.{domain}", own)]


def _override(number: int, section: str, fields: Fields) -> Layer:
    return Layer(f"{_KEY}.overrides.v{number}.{section}", fields)


def _override_by_domain(number: int, section: str, fields: Fields, domain: str) -> list[Layer]:
    common = {key: value for key, value in fields.items() if key not in _DOMAINS}
    own = fields.get(domain)
    key = f"{_KEY}.overrides.v{number}.{section}"
    return _by_domain(key, common, own if isinstance(own, Mapping) else {}, domain)  # type: ignore[arg-type]


def _merged(layers: Sequence[Layer]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for layer in layers:
        result = _over(result, layer.fields)
    return result


def _over(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """`above` over `below`, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping) and key not in _REPLACED_WHOLE
        result[key] = _over(under, value) if both else value  # type: ignore[arg-type]
    return result


def _extended(names: Any, more: Sequence[str]) -> Any:
    """A list with more names; what is no list is left for the stage's own check."""
    return [*names, *more] if isinstance(names, list) else names


def _holds(fields: Mapping[Any, Any], place: str) -> bool:
    """Whether a dotted place, or as much of it as is a key, is written in `fields`."""
    key, _, rest = place.partition(".")
    if key not in fields:
        return False
    value = fields[key]
    return _holds(value, rest) if rest and isinstance(value, Mapping) and value else True


def _schedule_problems(config: IterationsConfig, stages: Mapping[str, Any]) -> Iterator[str]:
    """What no single stage can tell."""
    versions = "1 version" if config.count == 1 else f"{config.count} versions"
    if config.ghost_attention is not None and config.ghost_attention.after > config.count:
        yield (
            f"{_KEY}.ghost_attention.after: {config.ghost_attention.after}, but there are {versions}; "
            "lower it, or set ghost_attention to null"
        )
    if config.ppo is not None and config.ppo.first > config.count:
        yield f"{_KEY}.ppo.from: {config.ppo.first}, but there are {versions}; lower it, or set ppo to null"
    if config.context_distillation is not None and config.safety is None:
        yield f"{_KEY}.context_distillation: needs a safety reward model; name it in {_KEY}.safety"
    if config.preferences is not None and config.reward is not None:
        yield from _retraining_problems(config, stages)
    if (
        config.preferences is None
        and config.reward is not None
        and config.reward.model_dump(exclude_unset=True)
    ):
        yield (
            f"{_KEY}.reward: without {_KEY}.preferences there are no new pairs to train on; add them, or leave it out"
        )
    yield from _override_problems(config)
    yield from _filled_in_problems(config)


def _retraining_problems(config: IterationsConfig, stages: Mapping[str, Any]) -> Iterator[str]:
    for domain in _DOMAINS:
        first = getattr(config, domain)
        retrained = config.reward is not None and config.reward.of_domain(domain) is not None
        collected = config.preferences is not None and config.preferences.of_domain(domain) is not None
        if first is None or not retrained or not collected:
            continue
        if not isinstance(first, str):
            yield (
                f"{_KEY}.{domain}: a custom reward cannot be trained on new pairs; name a reward stage, or set "
                f"{_KEY}.reward to null"
            )
        elif not isinstance(stages.get(first), Mapping):
            yield f"{_KEY}.{domain}: {first} is no mapping in stages, so versions cannot be trained as it is"


def _override_problems(config: IterationsConfig) -> Iterator[str]:
    known = [f"v{number}" for number in range(1, config.count + 1)]
    for name, own in config.overrides.items():
        key = f"{_KEY}.overrides.{name}"
        if name not in known:
            yield f"{key}: no such version{did_you_mean(name, known)}; there are {', '.join(known)}"
            continue
        number, ppo, ghost = int(name[1:]), config.ppo, config.ghost_attention
        if own.ppo and (ppo is None or number < ppo.first):
            yield f"{key}.ppo: version {number} has no PPO; see {_KEY}.ppo.from"
        if own.ghost_attention and (ghost is None or number != ghost.after):
            yield f"{key}.ghost_attention: it does not come after version {number}; see {_KEY}.ghost_attention.after"
        for section in ("preferences", "reward"):
            if getattr(own, section) and (config.preferences is None or getattr(config, section) is None):
                yield f"{key}.{section}: there are no new pairs and reward models; see {_KEY}.{section}"


def _filled_in_problems(config: IterationsConfig) -> Iterator[str]:
    for key, section, fields in _written(config):
        for name in fields:
            if name in FILLED_IN[section]:
                yield f"{key}.{name}: follows from the schedule and is filled in; leave it out"


def _written(config: IterationsConfig) -> Iterator[tuple[str, str, Fields]]:
    """Every place where fields of a stage may stand: its key, its section, the fields."""
    for section in FILLED_IN:
        value = getattr(config, section)
        if value is None:
            continue
        yield f"{_KEY}.{section}", section, value if isinstance(value, dict) else value.fields
        for domain in _DOMAINS if section in ("preferences", "reward") else ():
            yield f"{_KEY}.{section}.{domain}", section, value.of_domain(domain) or {}
    for name, own in config.overrides.items():
        for section in VersionOverrides.model_fields:
            fields = getattr(own, section) or {}
            key = f"{_KEY}.overrides.{name}.{section}"
            yield key, section, fields
            for domain in _DOMAINS if section in ("preferences", "reward") else ():
                inside = fields.get(domain)
                yield f"{key}.{domain}", section, inside if isinstance(inside, dict) else {}
