"""What a network's first layer takes of a row: standardised numbers, or a vector a column.

A category's vector is looked up in a trained table (Guo and Berkhahn 2016, Entity Embeddings of
Categorical Variables); a number's is ReLU(linear(cos, sin)) of trained frequencies (PLR of
Gorishniy and others 2022, On Embeddings for Numerical Features in Tabular Deep Learning). Knows
nothing of layers or of training but the first values.

Suffixes: K networks, B rows, P number columns, Q category columns, F frequencies, D and E sizes
of a number's and of a category's vector, V known values and one more a category column, I inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Scaling = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Which columns are numbers and which categories; made by `columns_of`.

    Attributes:
        scaling: Of the number columns, from `scaling_of`.
        numbers: (P,) their positions.
        categories: (Q,) positions of the columns whose codes are looked up.
        counts: (Q,) how many values each of those knows.
        number_size: D; 0 where numbers go in as they are.
        category_size: E.
        frequencies: F.
    """

    scaling: Scaling
    numbers: np.ndarray
    categories: np.ndarray
    counts: np.ndarray
    number_size: int
    category_size: int
    frequencies: int

    @property
    def plain(self) -> bool:
        """Whether no column has a vector."""
        return not self.number_size and not self.categories.size

    @property
    def width(self) -> int:
        """I."""
        return self.owners_i().size

    def numbers_of(self, x: np.ndarray) -> np.ndarray:
        """Standardised numbers and indicators of missing ones, (n, P + gappy) float32."""
        return scaled(self.scaling, x[:, self.numbers])

    def codes_of(self, x: np.ndarray) -> np.ndarray:
        """Places in the table, (n, Q) int64; missing, or not known, is a column's last place."""
        codes = x[:, self.categories]
        known = (codes >= 0) & (codes < self.counts)
        starts = np.cumsum(self.counts + 1) - (self.counts + 1)
        places: np.ndarray = np.where(known, codes, self.counts).astype(np.int64) + starts
        return places

    def rows_of(self, x: np.ndarray) -> list[np.ndarray]:
        """What a row goes in as: numbers, and places where there are categories."""
        return [self.numbers_of(x), *([self.codes_of(x)] if self.categories.size else [])]

    def owners_i(self) -> np.ndarray:
        """Position of the column that each input is of, (I,)."""
        return np.concatenate(
            [
                np.repeat(self.numbers, self.number_size or 1),
                self.numbers[self.scaling[2]],
                np.repeat(self.categories, self.category_size),
            ]
        )

    def first_values(self, draws: np.random.Generator, frequency_scale: float) -> dict[str, Any]:
        """What is trained of the vectors, float32: `Vectors` without its other attributes."""
        p, f, d = self.numbers.size, self.frequencies, self.number_size
        values: dict[str, np.ndarray] = {}
        if d:
            values["frequencies"] = draws.standard_normal((p, f)) * frequency_scale
            # He's rule: of a cosine and a sine the squares add up to 1.
            values["weights"] = draws.standard_normal((p * 2 * f, d)) * np.sqrt(2 / f)
            values["biases"] = np.zeros((p, d))
        if self.categories.size:
            table = draws.standard_normal((int((self.counts + 1).sum()), self.category_size))
            # Where no training row is missing, a missing one adds nothing.
            table[np.cumsum(self.counts + 1) - 1] = 0
            values["table"] = table
        return {name: value.astype(np.float32) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """One trained network's first step; called with (n, p) float32, it gives (n, I) float32.

    Attributes:
        columns: Which are which.
        base_i: (I,) inputs of the row that explanations start from: numbers at their mean, none
            missing, and each category at the mean of its training rows' vectors.
        trained: The arrays that `Columns.first_values` names, as training left them.
    """

    columns: Columns
    base_i: np.ndarray
    trained: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, columns: Columns, trained: dict[str, np.ndarray], codes: np.ndarray | None
    ) -> "Vectors":
        """With its base from the places (`Columns.codes_of`) of the rows that trained it."""
        made = cls(columns=columns, base_i=np.zeros(columns.width, np.float32), trained=trained)
        zeros = np.zeros((1, columns.numbers.size + columns.scaling[2].size), np.float32)
        parts = [made._from_numbers(zeros)[0]]
        for codes_n in () if codes is None else codes.T:
            counts = np.bincount(codes_n)
            places = np.flatnonzero(counts)
            vectors = trained["table"][places].astype(np.float64)
            parts.append(counts[places] @ vectors / counts.sum())
        base_i = np.concatenate(parts).astype(np.float32)
        return cls(columns=columns, base_i=base_i, trained=trained)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The first layer's inputs; a row's are the same alone as among others."""
        return self.of_rows(*self.columns.rows_of(x))

    def of_rows(self, numbers: np.ndarray, codes: np.ndarray | None = None) -> np.ndarray:
        """The same of what `Columns.rows_of` gives."""
        parts = [self._from_numbers(numbers)]
        if codes is not None:
            parts.append(self.trained["table"][codes].reshape(len(codes), -1))
        return np.hstack(parts)

    def _from_numbers(self, numbers: np.ndarray) -> np.ndarray:
        if not self.columns.number_size:
            return numbers
        p, f = self.trained["frequencies"].shape
        angles_bpf = numbers[:, :p, None] * (np.float32(2 * np.pi) * self.trained["frequencies"])
        waves_pbf = np.concatenate([np.cos(angles_bpf), np.sin(angles_bpf)], axis=2).swapaxes(0, 1)
        weights_pfd = self.trained["weights"].reshape(p, 2 * f, -1)
        # A column at a time and by einsum: other products add up in an order that depends on how
        # many rows there are.
        out = [
            np.maximum(np.einsum("bi,io->bo", waves, weights) + bias, 0)
            for waves, weights, bias in zip(
                waves_pbf, weights_pfd, self.trained["biases"], strict=True
            )
        ]
        return np.hstack([*out, numbers[:, p:]])


def columns_of(
    x: np.ndarray,
    categories: Sequence[int],
    *,
    category_size: int,
    number_size: int,
    frequencies: int,
) -> Columns:
    """Sorts a training matrix's columns.

    Args:
        x: (n, p) float32, NaN where missing.
        categories: How many values each column knows, 0 for a number; empty where all are numbers.
        category_size: E; 0 takes codes for numbers.
        number_size: D; 0 takes numbers as they are.
        frequencies: F.
    """
    counts = np.array(categories or [0] * x.shape[1], dtype=np.int64)
    if not category_size:
        counts = np.zeros_like(counts)
    numbers = np.flatnonzero(counts == 0)
    return Columns(
        scaling=scaling_of(x[:, numbers]),
        numbers=numbers,
        categories=np.flatnonzero(counts),
        counts=counts[counts > 0],
        number_size=number_size if numbers.size else 0,
        category_size=category_size,
        frequencies=frequencies,
    )


def stacked(
    columns: Columns, parameters: Any, numbers_bi: Any, codes_bq: Any = None
) -> tuple[Any, Any]:
    """`Vectors` of K networks at once, in torch.

    Args:
        columns: Which are which.
        parameters: By the names of `Columns.first_values`, each (K, ., .).
        numbers_bi: From `Columns.numbers_of`.
        codes_bq: From `Columns.codes_of`.

    Returns:
        The inputs in two: those before the first that is trained, (B, .), which all networks
        share, and the others, (K, B, .).
    """
    import torch

    parts = []
    fixed_bi = numbers_bi
    if columns.number_size:
        fixed_bi = numbers_bi[:, :0]
        frequencies_kpf = parameters["frequencies"]
        k, p, f = frequencies_kpf.shape
        rows = len(numbers_bi)
        # Products in batches of K x P, (B, 1) by (1, F).
        x_pb1 = numbers_bi[:, :p].T.unsqueeze(2).expand(k, p, rows, 1)
        angles = torch.bmm(
            x_pb1.reshape(k * p, rows, 1), (2 * torch.pi * frequencies_kpf).view(k * p, 1, f)
        )
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=2)
        weights = parameters["weights"].view(k * p, 2 * f, -1)
        biases = parameters["biases"].view(k * p, 1, -1)
        out = torch.relu(torch.baddbmm(biases, waves, weights))
        parts.append(out.view(k, p, rows, -1).transpose(1, 2).reshape(k, rows, -1))
        parts.append(numbers_bi[:, p:].expand(k, -1, -1))
    if columns.categories.size:
        table_kve = parameters["table"]
        k, v, e = table_kve.shape
        # A place's vectors side by side, so that one look-up, and one sum of its gradients, is of
        # all networks.
        looked = torch.nn.functional.embedding(codes_bq, table_kve.transpose(0, 1).reshape(v, -1))
        parts.append(
            looked.view(*codes_bq.shape, k, e)
            .permute(2, 0, 1, 3)
            .reshape(k, -1, looked.shape[1] * e)
        )
    return fixed_bi, parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def scaling_of(x: np.ndarray) -> Scaling:
    """Mean (p,), spread (p,) and the positions of features with a missing value."""
    present = ~np.isnan(x)
    counts = np.maximum(present.sum(axis=0), 1)
    filled = np.where(present, x, 0).astype(np.float64)
    mean = filled.sum(axis=0) / counts
    spread = np.sqrt((np.where(present, filled - mean, 0) ** 2).sum(axis=0) / counts)
    return mean, np.where(spread > 0, spread, 1.0), np.flatnonzero(~present.all(axis=0))


def scaled(scaling: Scaling, x: np.ndarray) -> np.ndarray:
    """Standardised features, missing at the mean, then an indicator a gappy feature; float32."""
    mean, spread, gappy = scaling
    missing = np.isnan(x)
    standard = np.where(missing, 0.0, (x - mean) / spread)
    return np.hstack([standard, missing[:, gappy]]).astype(np.float32)
