"""The versions of registered models as MLflow keeps them: what is known of each is in its tags."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.naming import suggestion
from models.registry_connection import Connection, RegistryError, pages

# A model version's tag holds 100,000 characters; a thousand described features take more.
_TAG_CHARACTERS = 90_000


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one registered version, read without loading it.

    Attributes:
        name: The model's name, which is its target's.
        version: From 1 upwards.
        aliases: "champion", "challenger", or neither.
        family: One of `models.families.FAMILIES`, or "ensemble".
        variant: The settings it was trained with.
        features: One a column: "name", "kind" (number, string, boolean), "description", "unit".
        metrics: On the test rows, such as auc and log_loss.
        data_version: The training table and its version, such as "training/lapse_30d@3".
        seed: Seed of the run that trained it.
        git_revision: Revision of the code that trained it.
        created: ISO 8601, UTC.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    family: str
    variant: dict[str, Any]
    features: tuple[dict[str, str], ...]
    metrics: dict[str, float]
    data_version: str
    seed: int
    git_revision: str
    created: str


class Versions:
    """Adds and finds versions."""

    def __init__(self, mlflow: Connection) -> None:
        self._mlflow = mlflow

    def add(
        self,
        name: str,
        folder: Path,
        *,
        family: str,
        variant: Mapping[str, Any],
        features: Sequence[Mapping[str, str]],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
        history: Sequence[Mapping[str, float]] = (),
    ) -> Card:
        """See `Registry.register` and `Registry.register_folder`."""
        client = self._mlflow.client
        run = client.create_run(
            self._mlflow.experiment(name),
            tags={
                "data_version": data_version,
                "git_revision": git_revision,
                "seed": str(seed),
            },
            run_name=f"register {name}",
        )
        client.log_artifacts(run.info.run_id, str(folder), "model")
        self._mlflow.log(
            run.info.run_id,
            params={**variant, "family": family},
            metrics={f"test_{metric}": value for metric, value in metrics.items()},
        )
        for at in history:
            for metric, value in at.items():
                if metric != "step":
                    step = int(at["step"])
                    client.log_metric(run.info.run_id, f"valid_{metric}", value, step=step)
        client.set_terminated(run.info.run_id)
        self._require_registered_model(name)
        said = json.dumps([dict(feature) for feature in features], ensure_ascii=False)
        pieces = [said[at : at + _TAG_CHARACTERS] for at in range(0, len(said), _TAG_CHARACTERS)]
        made = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/model",
            run_id=run.info.run_id,
            tags={
                "family": family,
                "variant": json.dumps(dict(variant)),
                "metrics": json.dumps({metric: float(value) for metric, value in metrics.items()}),
                "data_version": data_version,
                "seed": str(seed),
                "git_revision": git_revision,
                **{f"features.{place}": piece for place, piece in enumerate(pieces)},
            },
            await_creation_for=0,
        )
        return self.card(name, int(made.version))

    def _require_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._mlflow.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def all(self) -> list[Card]:
        """Every version that `register` made, by name, then version."""
        aliases = {
            model.name: dict(model.aliases)
            for model in pages(self._mlflow.client.search_registered_models)
        }
        cards = [
            _card(version, aliases.get(version.name, {}))
            for version in pages(self._mlflow.client.search_model_versions)
            if "features.0" in version.tags
        ]
        return sorted(cards, key=lambda card: (card.name, card.version))

    def found(self, name: str) -> Any:
        """MLflow's entry of the model, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._mlflow.client.get_registered_model(name)
        except MlflowException as error:
            # The second: a name that MLflow doesn't allow.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        return None

    def model(self, name: str) -> Any:
        """MLflow's entry of the model; RegistryError where there is none."""
        model = self.found(name)
        if model is not None:
            return model
        names = sorted(model.name for model in pages(self._mlflow.client.search_registered_models))
        there = f"there are: {names}" if names else "none is registered yet"
        raise RegistryError(f"model {name!r} isn't registered; {there}{suggestion(name, names)}")

    def of(self, name: str) -> dict[int, Any]:
        """MLflow's entries of the versions that `register` made of a model, ascending."""
        found = pages(
            lambda **page: self._mlflow.client.search_model_versions(f"name = '{name}'", **page)
        )
        ours = {int(each.version): each for each in found if "features.0" in each.tags}
        return dict(sorted(ours.items()))

    def card(self, name: str, version: int) -> Card:
        """What is known of a version; RegistryError where it isn't there."""
        model = self.model(name)
        versions = self.of(name)
        if version not in versions:
            raise RegistryError(
                f"version {version} of model {name!r} isn't registered; there are: {list(versions)}"
            )
        return _card(versions[version], model.aliases)


def _card(made: Any, aliases: Mapping[str, str]) -> Card:
    tags = made.tags
    # Tags come in any order.
    pieces = (name for name in tags if name.startswith("features."))
    features = "".join(tags[name] for name in sorted(pieces, key=lambda name: int(name[9:])))
    return Card(
        name=made.name,
        version=int(made.version),
        aliases=tuple(sorted(each for each, v in aliases.items() if int(v) == int(made.version))),
        family=tags["family"],
        variant=json.loads(tags["variant"]),
        features=tuple(json.loads(features)),
        metrics=json.loads(tags["metrics"]),
        data_version=tags["data_version"],
        seed=int(tags["seed"]),
        git_revision=tags["git_revision"],
        created=datetime.fromtimestamp(made.creation_timestamp / 1000, UTC).isoformat(),
    )
