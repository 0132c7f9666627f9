"""Keys, roles and rates, on real files."""

import json
import os
import stat
from pathlib import Path

import pytest

from serving.access import Access, AccessError, AccessFiles, Denied, add_key, revoke_key, rotate_key


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
    assert access.allow(f"Bearer {caller}", "score", "lapse_30d") == "crm"
    assert denied(access, caller, "score", "churn") == 403
    assert denied(access, caller, "explain", "lapse_30d") == 403
    for _ in range(2):
        assert access.allow(f"Bearer {slow}", "score", "churn") == "batch"
    with pytest.raises(Denied) as caught:
        access.allow(f"Bearer {slow}", "score", "churn")
    assert caught.value.status == 429
    assert 1 <= (caught.value.retry_after_s or 0) <= 101


def test_only_a_whole_unexpired_key_gets_in(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "crm", "service")
    soon = add_key(keys, "old", "service", days=1e-9)
    access = Access(AccessFiles(keys=str(keys)))
    assert access.allow(f"bearer {key}", "score", "churn") == "crm"
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
        assert access.allow(f"Bearer {key}", "score", "churn") == "crm"
    third = rotate_key(keys, "crm", grace_s=0)
    access.reload()
    assert [denied(access, key, "score") for key in (first, second)] == [401, 401]
    assert access.allow(f"Bearer {third}", "score", "churn") == "crm"
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
    assert access.allow(f"Bearer {key}", "score", "churn") == "crm"
    for name, days, reason in (("a_b", 1.0, "allowed are"), ("a", 0.0, "later than now")):
        with pytest.raises(AccessError, match=reason):
            add_key(tmp_path / "other.json", name, "service", days=days)
    with pytest.raises(AccessError, match="no key 'none'"):
        rotate_key(tmp_path / "other.json", "none")
