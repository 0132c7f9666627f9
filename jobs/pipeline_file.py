"""Reads a YAML file into a model, and names the line that says what isn't allowed.

Knows nothing of what the settings mean.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jobs.config import Pipeline
from models.naming import suggestion

ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A file says something that isn't allowed; the message names file and line."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: The YAML file.
        overrides: `key=value` each, the key dotted (`sweep.families.forest.packs=2`, `a.0` for a
            list's first), the value in YAML; they replace what the file says, or add to it.

    Raises:
        ConfigError: As for `read`.
    """
    return read(path, Pipeline, overrides)


def read(path: str | Path, model: type[ModelT], overrides: Sequence[str] = ()) -> ModelT:
    """Read and check a file.

    Args:
        path: The YAML file.
        model: What it says.
        overrides: As for `load`.

    Raises:
        ConfigError: The file can't be read, isn't YAML, or says something that isn't allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); name a YAML file") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: a value can't be read: {error}") from error
    if not isinstance(values, dict):
        needed = [name for name, field in model.model_fields.items() if field.is_required()]
        raise ConfigError(f"{path}:1: got {values!r}; allowed: a mapping with {', '.join(needed)}")
    for override in overrides:
        _override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            loc = problem["loc"]
            said = f"{'.'.join(map(str, loc))}: {_say(problem, model)}"
            lines.append(f"{path}:{_line(root, loc)}: {said}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def place(path: Path, key: tuple[str, ...]) -> str:
    """ "FILE:LINE: " of a key of a file that was read before; "" of no key."""
    return f"{path}:{_line(yaml.compose(path.read_text(encoding='utf-8')), key)}: " if key else ""


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """The 1-based line of the deepest node on `loc`; a key's own line in a mapping."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1 if node is not None else line
        else:
            break
    return line


def _say(problem: Any, model: type[BaseModel]) -> str:
    kind, loc, value = problem["type"], problem["loc"], problem["input"]
    if kind == "extra_forbidden":
        fields = _fields(loc[:-1], model)
        return f"unknown key {loc[-1]!r}; allowed: {', '.join(fields)}{suggestion(loc[-1], fields)}"
    if kind == "missing":
        return "this key is missing; add it"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"got {value!r}; allowed: {', '.join(options)}{suggestion(value, options)}"
    return f"got {value!r}; {problem['msg']}"


def _fields(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The keys allowed in the mapping at `loc`."""
    at: Any = model
    for part in loc:
        at = _within(at, str(part))
    return list(at.model_fields) if _is_model(at) else []


def _within(annotation: Any, part: str) -> Any:
    """The annotation of a model's field, a mapping's value or a list's item."""
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else field.annotation
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        # pydantic puts the union's member into the location, by its class's name.
        named = [each for each in arguments if getattr(each, "__name__", "") == part]
        inside = [_within(each, part) for each in arguments if each is not NoneType]
        return next((each for each in [*named, *inside] if each is not None), None)
    return next((each for each in reversed(arguments) if each is not Ellipsis), None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: give KEY=VALUE, such as seed=11")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value isn't YAML: {error}") from error
    *path, last = key.split(".")
    at: Any = values
    try:
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"--set {override!r}: {key!r} leads through a value that is neither a mapping nor a "
            "list with that place; see the pipeline file for the keys"
        ) from error
