"""What each role may do: actions, models, fields. A policy file in YAML, decided on by casbin.

The file's roles become casbin's rules, each (role, action, model, field, effect). A rule without a
field is about the action itself; one with a field about what its answers may show. Knows nothing
of who has which role.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ACTIONS = ("score", "explain", "customers", "models", "metrics")

# Decisions kept; an asker may invent models' names without end.
MOST_KEPT = 10_000

_MODEL = """
[request_definition]
r = role, action, model, field
[policy_definition]
p = role, action, model, field, eft
[policy_effect]
e = some(where (p.eft == allow)) && !some(where (p.eft == deny))
[matchers]
m = r.role == p.role && r.action == p.action && fits(r.model, p.model) && shows(r.field, p.field)
"""


class AccessError(ValueError):
    """A file of access, or a change of it, can't be so; the message says what to do."""


class Role(BaseModel):
    """What holders of a role may do.

    Attributes:
        actions: Of `ACTIONS`.
        models: Names of models, or patterns such as "lapse_*".
        fields: Names or patterns of the features that its answers show.
        hidden: Those of `fields` that they don't show after all.
        requests_per_s: What each holder may ask a second; None for no limit.
        burst: Requests that may come at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    actions: tuple[str, ...]
    models: tuple[str, ...] = ("*",)
    fields: tuple[str, ...] = ("*",)
    hidden: tuple[str, ...] = ()
    requests_per_s: float | None = Field(default=None, gt=0)
    burst: int = Field(default=20, ge=1)


DEFAULT_ROLES = {
    "viewer": Role(actions=("models",)),
    "service": Role(actions=("models", "score", "customers")),
    "analyst": Role(actions=("models", "score", "explain", "customers")),
    "admin": Role(actions=ACTIONS),
}


class Policy:
    """Decides what a role may, and remembers what it has decided."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        import casbin

        self.roles = dict(roles)
        model = casbin.Model()
        model.load_model_from_text(_MODEL)
        self._enforcer = casbin.Enforcer(model)
        self._enforcer.add_function("fits", _fits)
        self._enforcer.add_function("shows", _shows)
        self._enforcer.add_policies([rule for name in roles for rule in _rules(name, roles[name])])
        self._decided: dict[tuple[str, str, str, str], bool] = {}

    def allows(self, role: str, action: str, model: str | None = None, field: str = "") -> bool:
        """Whether the role may.

        Args:
            role: A role's name.
            action: One of `ACTIONS`.
            model: The model's name; None where the action is about none.
            field: A feature that an answer would show; empty for the action itself.
        """
        asked = (role, action, model or "", field)
        known = self._decided.get(asked)
        if known is None:
            if len(self._decided) >= MOST_KEPT:
                self._decided.clear()
            known = self._decided[asked] = bool(self._enforcer.enforce(*asked))
        return known


def read_policy(path: Path) -> dict[str, Role]:
    """The roles of a policy file.

    Raises:
        AccessError: It isn't such a file; the message says where.
        OSError: It can't be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.keys() != {"roles"}:
            raise AccessError(f"{path}: holds 'roles' and nothing else, one entry a role")
        roles = {name: Role.model_validate(role) for name, role in content["roles"].items()}
    except (yaml.YAMLError, ValidationError, AttributeError) as error:
        raise AccessError(f"{path}: {error}") from error
    for name, role in roles.items():
        if unknown := sorted(set(role.actions) - set(ACTIONS)):
            raise AccessError(f"{path}: role {name!r}: actions {unknown}; allowed are {ACTIONS}")
    return roles


def _rules(name: str, role: Role) -> list[list[Any]]:
    places = [(action, model) for action in role.actions for model in role.models]
    return [
        [name, action, model, field, effect]
        for action, model in places
        for field, effect in (
            ("", "allow"),
            *((shown, "allow") for shown in dict.fromkeys(role.fields)),
            *((hidden, "deny") for hidden in dict.fromkeys(role.hidden)),
        )
    ]


def _fits(model: str, pattern: str) -> bool:
    return not model or fnmatchcase(model, pattern)


def _shows(field: str, pattern: str) -> bool:
    # The action itself is no field, not even of the pattern "*".
    return fnmatchcase(field, pattern) if field and pattern else field == pattern
