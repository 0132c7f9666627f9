"""Models by name and version, and the sweeps they came from, in MLflow.

A version is what a `Scorer` needs (the encoder as JSON, the predict function pickled) in MLflow's
layout with signature and input example, so that MLflow's own tools load it too when they run from
the repository's root. What is known of it, its `Card`, is in its tags. Loading runs pickled code:
connect only to a registry whose writers you trust. Knows nothing of how models are trained.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import polars as pl

from models import registry_layout, registry_sweeps
from models.registry_connection import (
    Connection,
    RegistryError,
    mlflow_errors_as_oserror,
    require_name,
)
from models.registry_versions import Card, Versions
from models.scoring import Scorer

_FORMER = "former_champions"
# A registered model's tag holds 5,000 characters.
_FORMER_KEPT = 500


class Registry:
    """A model registry and its sweeps, on a SQLite file or an MLflow server.

    Attributes:
        uri: Its address; SQLite's with an absolute path.
    """

    def __init__(self, uri: str) -> None:
        """Connects; a SQLite database that isn't there is made.

        Args:
            uri: sqlite:///path/mlflow.db, or the http:// or https:// address of a server.

        Raises:
            RegistryError: The URI is of another kind.
            OSError: The folder can't be written, or no server answers.
        """
        self._mlflow = Connection(uri)
        self._versions = Versions(self._mlflow)
        self.uri = self._mlflow.uri

    @mlflow_errors_as_oserror
    def register(
        self,
        name: str,
        scorer: Scorer,
        *,
        example: pl.DataFrame,
        family: str,
        variant: Mapping[str, Any],
        features: Sequence[Mapping[str, str]],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
    ) -> Card:
        """Adds a version, with no alias; the first version makes the model.

        Args:
            name: Letters, digits, "_", "-", "." and spaces.
            scorer: What `load` gives back, with scores identical to the bit.
            example: Rows with the encoder's columns; the first five are kept as input example.
            family: See `Card`, as for all that follows.
            variant: JSON values.
            features: Names are those of the encoder.
            metrics: Values on the test rows.
            data_version: The training table and its version.
            seed: Seed of the run.
            git_revision: Revision of the code.

        Raises:
            RegistryError: The name has other characters, or features and encoder disagree.
            EncodingError: The example isn't what the encoder takes.
            OSError: The storage or the server fails.
        """
        require_name("model", name)
        encoded = set(scorer.encoder.feature_names)
        listed = {feature["name"] for feature in features}
        if encoded != listed:
            raise RegistryError(
                f"features of {name!r} and its encoder disagree: only the encoder has "
                f"{sorted(encoded - listed)}, only the list has {sorted(listed - encoded)}; "
                "list each of the encoder's columns"
            )
        with tempfile.TemporaryDirectory() as folder:
            registry_layout.write(Path(folder), scorer, example)
            return self._versions.add(
                name,
                Path(folder),
                family=family,
                variant=variant,
                features=features,
                metrics=metrics,
                data_version=data_version,
                seed=seed,
                git_revision=git_revision,
            )

    @mlflow_errors_as_oserror
    def register_folder(
        self,
        name: str,
        folder: Path,
        *,
        family: str,
        variant: Mapping[str, Any],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
        history: Sequence[Mapping[str, float]] = (),
    ) -> Card:
        """Adds a version that is a folder and not rows to a score, such as a transformer.

        `folder` gives it back; `load` doesn't. Promotion and rollback are as for others.

        Args:
            name: As for `register`.
            folder: All of it is kept.
            family: See `Card`, as for all that follows but history.
            variant: JSON values.
            metrics: Values on the test rows; names may have a slice, such as recall.language_pl.
            data_version: What it was trained on.
            seed: Seed of the run.
            git_revision: Revision of the code.
            history: Validation metrics by "step"; MLflow shows them as curves.

        Raises:
            RegistryError: The name has other characters.
            OSError: The storage or the server fails, or the folder can't be read.
        """
        require_name("model", name)
        return self._versions.add(
            name,
            folder,
            family=family,
            variant=variant,
            features=(),
            metrics=metrics,
            data_version=data_version,
            seed=seed,
            git_revision=git_revision,
            history=history,
        )

    @mlflow_errors_as_oserror
    def models(self) -> list[Card]:
        """Every version that `register` made, by name, then version."""
        return self._versions.all()

    @mlflow_errors_as_oserror
    def champion(self, name: str) -> Card | None:
        """The champion, or None where none was promoted yet or no such model is registered."""
        return self._aliased(name, "champion")

    @mlflow_errors_as_oserror
    def challenger(self, name: str) -> Card | None:
        """The challenger, or None where there is none or no such model is registered."""
        return self._aliased(name, "challenger")

    def _aliased(self, name: str, alias: str) -> Card | None:
        model = self._versions.found(name)
        version = None if model is None else _at(model, alias)
        return None if version is None else self._versions.card(name, version)

    @mlflow_errors_as_oserror
    def card(self, name: str, version: int) -> Card:
        """What is known of a version.

        Raises:
            RegistryError: There is no such model or version.
            OSError: The storage or the server fails.
        """
        return self._versions.card(name, version)

    @mlflow_errors_as_oserror
    def load(self, name: str, version: int | None = None) -> tuple[Card, Scorer]:
        """A version's card and scorer; runs the pickled code that `register` stored.

        Args:
            name: A registered model.
            version: Which; None for the champion.

        Raises:
            RegistryError: There is no such model or version, or no champion.
            OSError: The storage or the server fails.
        """
        card = self._chosen(name, version)
        if not card.features:
            raise RegistryError(
                f"version {card.version} of {name!r} is a folder ({card.family}) and scores no "
                "rows; use `folder`, or name another model"
            )
        made = self._mlflow.client.get_model_version(name, str(card.version))
        with tempfile.TemporaryDirectory() as folder:
            stored = self._mlflow.client.download_artifacts(made.run_id, "model/scorer", folder)
            return card, Scorer.load(Path(stored))

    @mlflow_errors_as_oserror
    def folder(self, name: str, into: Path, version: int | None = None) -> tuple[Card, Path]:
        """A version's card and the folder that `register_folder` kept, copied below `into`.

        Args:
            name: A registered model.
            into: A folder that is there.
            version: Which; None for the champion.

        Raises:
            RegistryError: There is no such model or version, or no champion.
            OSError: The storage or the server fails.
        """
        card = self._chosen(name, version)
        made = self._mlflow.client.get_model_version(name, str(card.version))
        return card, Path(self._mlflow.client.download_artifacts(made.run_id, "model", str(into)))

    def _chosen(self, name: str, version: int | None) -> Card:
        """The version's card; the champion's for None."""
        card = self.champion(name) if version is None else self._versions.card(name, version)
        if card is None:
            self._versions.model(name)
            raise RegistryError(
                f"model {name!r} has no champion; promote one of its versions: "
                f"{list(self._versions.of(name))}"
            )
        return card

    @mlflow_errors_as_oserror
    def promote(self, name: str, version: int) -> Card:
        """Makes the version champion; a challenger that wins is one no longer.

        Two promotions at once through a server may leave one of them out of the history that
        `rollback` uses; on SQLite they take turns.

        Raises:
            RegistryError: There is no such model or version.
            OSError: The storage or the server fails.
        """
        with self._mlflow.alone():
            self._versions.card(name, version)
            model = self._versions.model(name)
            before = _at(model, "champion")
            former = _former(model)
            if before is not None and before != version:
                # The history first: stopped in between, rollback passes over the champion itself.
                if former[-1:] != [before]:
                    former.append(before)
                self._set_former(name, former)
            # One write, so that no moment is without a champion.
            self._mlflow.client.set_registered_model_alias(name, "champion", str(version))
            if _at(model, "challenger") == version:
                self._mlflow.client.delete_registered_model_alias(name, "challenger")
        return self._versions.card(name, version)

    @mlflow_errors_as_oserror
    def rollback(self, name: str) -> Card:
        """Makes the champion before the present one champion again; twice goes two back.

        Raises:
            RegistryError: There is no such model, or no champion before.
            OSError: The storage or the server fails.
        """
        with self._mlflow.alone():
            model = self._versions.model(name)
            champion = _at(model, "champion")
            versions = self._versions.of(name)
            former = _former(model)
            # Versions deleted since, and what a promotion stopped halfway left.
            while former and (former[-1] not in versions or former[-1] == champion):
                former.pop()
            if not former:
                now = "it has no champion" if champion is None else f"champion is {champion}"
                raise RegistryError(
                    f"model {name!r} has no champion to go back to ({now}); promote one of its "
                    f"versions: {list(versions)}"
                )
            version = former.pop()
            self._mlflow.client.set_registered_model_alias(name, "champion", str(version))
            self._set_former(name, former)
        return self._versions.card(name, version)

    @mlflow_errors_as_oserror
    def challenge(self, name: str, version: int) -> Card:
        """Makes the version challenger.

        Raises:
            RegistryError: There is no such model or version, or it is the champion.
            OSError: The storage or the server fails.
        """
        if "champion" in self._versions.card(name, version).aliases:
            raise RegistryError(
                f"version {version} of {name!r} is the champion; challenge it with another of "
                f"{list(self._versions.of(name))}"
            )
        self._mlflow.client.set_registered_model_alias(name, "challenger", str(version))
        return self._versions.card(name, version)

    def sweep(
        self,
        experiment: str,
        *,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> AbstractContextManager[registry_sweeps.SweepLog]:
        """A parent run under which each variant of a sweep becomes a child run.

        A sweep with the same run_name in the same experiment goes on in the same parent: variants
        that are there aren't logged again, those missing or half-written are.

        Args:
            experiment: Made if absent.
            run_name: Name of the parent.
            params: The sweep's own settings, on the parent.
            tags: On the parent and on each child, such as data_version and git_revision.

        Raises:
            RegistryError: A name has characters not allowed, or the sweep was begun with other
                params.
            OSError: The storage or the server fails; one while variants are written is raised at
                the end, so that it doesn't stop the training.
        """
        return registry_sweeps.sweep(self._mlflow, experiment, run_name, params, tags)

    def _set_former(self, name: str, former: Sequence[int]) -> None:
        self._mlflow.client.set_registered_model_tag(
            name, _FORMER, json.dumps(list(former[-_FORMER_KEPT:]))
        )


def _load_pyfunc(path: str) -> registry_layout.PyFunc:
    """What MLflow calls for a model whose loader_module is this one."""
    return registry_layout.PyFunc(Scorer.load(Path(path)))


def _at(model: Any, alias: str) -> int | None:
    """The version that has the alias; SQLite gives an int, a server a str."""
    return int(model.aliases[alias]) if alias in model.aliases else None


def _former(model: Any) -> list[int]:
    former: list[int] = json.loads(model.tags.get(_FORMER, "[]"))
    return former
