"""Keys, roles and rates, on real files."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.access import Access, AccessFiles, Denied, add_key, revoke_key, rotate_key
from serving.policy import AccessError, Policy, Role
from serving.rates import Buckets


def denied(access: Access, key: str | None, action: str, model: str | None = None) -> int:
    with pytest.raises(Denied) as caught:
        access.allow(None if key is None else f"Bearer {key}", action, model)
    return caught.value.status


def test_a_role_may_what_its_policy_says(tmp_path: Path) -> None:
    keys, policy = tmp_path / "keys.json", tmp_path / "policy.yaml"
    policy.write_text(
        "roles:\n"
        "  caller: {actions: [score], models: ['lapse_*']}\n"
        "  slow: {actions: [score], requests_per_s: 0.01, burst: 2}\n"
    )
    caller = add_key(keys, "crm", "caller")
    slow = add_key(keys, "batch", "slow")
    access = Access(AccessFiles(keys=str(keys), policy=str(policy)))
    assert access.allow(f"Bearer {caller}", "score", "lapse_30d") == ("crm", "caller")
    assert denied(access, caller, "score", "churn") == 403
    assert denied(access, caller, "explain", "lapse_30d") == 403
    assert access.allow(f"Bearer {slow}", "score", "churn") == ("batch", "slow")
    assert (access.rate("caller"), access.rate("slow")) == (None, (0.01, 2))


def test_a_bucket_is_each_askers_own_and_tells_how_long_to_wait() -> None:
    buckets = Buckets()
    asking = [("batch", 0.01, 2), ("crm", 0.01, 2), ("batch", 0.01, 2), ("batch", 0.01, 2)]
    *let_in, wait_s = buckets.take(asking)
    assert let_in == [0.0, 0.0, 0.0]
    assert 0 < wait_s <= 100
    assert buckets.take([("crm", 0.01, 2), ("fast", 1e9, 1), ("fast", 1e9, 1)]) == [0.0, 0.0, 0.0]


NAMES = st.text("ab*", min_size=1, max_size=3)
GRANTS = st.builds(
    Role,
    actions=st.lists(st.sampled_from(["score", "explain"]), unique=True).map(tuple),
    models=st.lists(NAMES, max_size=2).map(tuple),
    fields=st.lists(NAMES, max_size=2).map(tuple),
    hidden=st.lists(NAMES, max_size=2).map(tuple),
)


@given(
    roles=st.dictionaries(st.sampled_from(["one", "two"]), GRANTS),
    asked=st.lists(
        st.tuples(
            st.sampled_from(["one", "two"]),
            st.sampled_from(["score", "explain", "models"]),
            st.none() | st.text("ab", min_size=1, max_size=3),
            st.text("ab", max_size=3),
        ),
        max_size=5,
    ),
)
def test_a_decision_is_what_the_role_says_of_action_model_and_field(
    roles: dict[str, Role], asked: list[tuple[str, str, str | None, str]]
) -> None:
    policy = Policy(roles)
    for name, action, model, field in asked * 2:
        role = roles.get(name, Role(actions=()))

        def one_of(value: str, patterns: tuple[str, ...]) -> bool:
            return any(
                re.fullmatch(pattern.replace("*", ".*"), value) is not None for pattern in patterns
            )

        expected = action in role.actions and bool(role.models)
        expected = expected and (model is None or one_of(model, role.models))
        if field:
            expected = expected and one_of(field, role.fields) and not one_of(field, role.hidden)
        assert policy.allows(name, action, model, field) is expected


def test_a_changed_policy_counts_from_then_on(tmp_path: Path) -> None:
    keys, policy = tmp_path / "keys.json", tmp_path / "policy.yaml"
    policy.write_text("roles: {service: {actions: [score], hidden: [income]}}")
    key = add_key(keys, "crm", "service")
    access = Access(AccessFiles(keys=str(keys), policy=str(policy)))
    asker = access.allow(f"Bearer {key}", "score", "churn")
    assert not access.may(asker.role, "score", "churn", "income")
    assert access.may(asker.role, "score", "churn", "spend")
    aside = tmp_path / "next.yaml"
    aside.write_text("roles: {service: {actions: [score], fields: [income]}}")
    aside.replace(policy)
    access.reload()
    assert access.may(asker.role, "score", "churn", "income")
    assert not access.may(asker.role, "score", "churn", "spend")


def test_only_a_whole_unexpired_key_gets_in(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "crm", "service")
    soon = add_key(keys, "old", "service", days=1e-9)
    access = Access(AccessFiles(keys=str(keys)))
    assert access.allow(f"bearer {key}", "score", "churn").who == "crm"
    forged = f"ly_old_{key.split('_', 2)[2]}"
    for bad in (None, "", key[:-1], key + "x", forged, "ly_none_x", "ly_crm_\ud800", soon):
        assert denied(access, bad, "score", "churn") == 401
    with pytest.raises(Denied, match="expired"):
        access.allow(f"Bearer {soon}", "score", "churn")


def test_keys_are_hashed_rotated_and_revoked(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    first = add_key(keys, "crm", "service")
    assert stat.S_IMODE(os.stat(keys).st_mode) == 0o600
    access = Access(AccessFiles(keys=str(keys)))
    access.allow(f"Bearer {first}", "score", "churn")
    second = rotate_key(keys, "crm")
    access.reload()
    for key in (first, second):
        assert access.allow(f"Bearer {key}", "score", "churn").who == "crm"
    third = rotate_key(keys, "crm", grace_s=0)
    access.reload()
    assert [denied(access, key, "score") for key in (first, second)] == [401, 401]
    assert access.allow(f"Bearer {third}", "score", "churn").who == "crm"
    text = keys.read_text()
    assert not any(key.split("_", 2)[2] in text for key in (first, second, third))
    revoke_key(keys, "crm")
    access.reload()
    assert denied(access, third, "score") == 401


def test_files_that_do_not_fit_are_told_and_the_former_hold(tmp_path: Path) -> None:
    keys, policy = tmp_path / "keys.json", tmp_path / "policy.yaml"
    key = add_key(keys, "crm", "service")
    for text, reason in (
        ("roles: {a: {actions: [fly]}}", "fly"),
        ("roles: {a: {actions: [score], rate: 1}}", "rate"),
        ("rules: {}", "holds 'roles'"),
        ("roles: {service: ", "policy.yaml"),
        ("roles: {a: {actions: [score]}}", "key 'crm' has the role 'service'"),
    ):
        policy.write_text(text)
        with pytest.raises(AccessError, match=reason):
            Access(AccessFiles(keys=str(keys), policy=str(policy)))
    access = Access(AccessFiles(keys=str(keys)))
    keys.write_text(json.dumps({"crm": {"sha256": "x"}}))
    with pytest.raises(AccessError, match="isn't a keys file"):
        access.reload()
    assert access.allow(f"Bearer {key}", "score", "churn").who == "crm"
    for name, days, reason in (("a_b", 1.0, "allowed are"), ("a", 0.0, "later than now")):
        with pytest.raises(AccessError, match=reason):
            add_key(tmp_path / "other.json", name, "service", days=days)
    with pytest.raises(AccessError, match="no key 'none'"):
        rotate_key(tmp_path / "other.json", "none")
