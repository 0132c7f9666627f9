"""Each module's rules, and the form of every file; nothing is applied."""

from pathlib import Path

import pytest

from tests.infra.conftest import ROOT, Terraform

SOURCES = ROOT / "infra" / "terraform"
MODULES = sorted(path.name for path in (SOURCES / "modules").iterdir())


def test_files_are_formatted(terraform: Terraform) -> None:
    terraform.run("modules", "fmt", "-recursive", "-check", "-diff")
    terraform.run("environments/aws", "fmt", "-recursive", "-check", "-diff")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_holds_its_rules(terraform: Terraform, module: str) -> None:
    folder = f"modules/{module}"
    terraform.init(folder)
    # `test` validates the module first.
    assert "0 failed" in terraform.run(folder, "test")


@pytest.fixture(scope="module")
def initialised(terraform: Terraform) -> Terraform:
    terraform.init("environments/aws")
    return terraform


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("image_tag", "latest"),
        ("availability_zones", '["us-east-1a","us-east-1b"]'),
        ("tags", '{"environment"="other"}'),
        ("account_id", "12"),
        ("budget_usd", "0"),
        ("alarm_emails", '["nobody"]'),
    ],
)
def test_the_environment_refuses(initialised: Terraform, variable: str, value: str) -> None:
    """A faulty value is refused before AWS is asked for anything."""
    folder = "environments/aws"
    example = (SOURCES / folder / "terraform.tfvars.example").read_text()
    file = Path(initialised.root) / folder / "refused.tfvars"
    kept = [line for line in example.splitlines() if not line.startswith(f"{variable} ")]
    quoted = value if value[0] in "[{" or value == "0" else f'"{value}"'
    file.write_text("\n".join([*kept, f"{variable} = {quoted}"]))
    with pytest.raises(pytest.fail.Exception, match="Invalid value for variable") as refused:
        initialised.run(folder, "plan", f"-var-file={file}", "-refresh=false")
    assert f"│ {variable} " in str(refused.value)  # the rule's own message begins so
