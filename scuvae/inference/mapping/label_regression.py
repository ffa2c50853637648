"""Multinomial logistic regression of labels on values, sparse or dense."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse as sp
from scipy.optimize import minimize
from scipy.special import log_softmax

# The precision of a weight's normal prior, for values of unit variance, by the number of genes.
_RIDGE = 0.1
_STEPS = 100


@dataclass(frozen=True)
class LabelRegression:
    """ln p(label | values) = values · weight + intercept − log Σ: (genes, labels), (labels,)."""

    weight: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(cls, values: Any, label: np.ndarray, n_labels: int) -> "LabelRegression":
        """The posterior's maximum under normal priors of weights; intercepts have none.

        Parameters
        ----------
        values
            (cells, genes), an array or a CSR matrix, which stays sparse.
        label
            The number of each cell's label, (cells,).
        """
        n_genes = values.shape[1]
        mean, scale = _moments(values)
        inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1.0), 0.0)[:, None]
        centre = mean[:, None] * inverse
        of_label = np.zeros((len(label), n_labels))
        of_label[np.arange(len(label)), label] = 1.0
        ridge = _RIDGE * n_genes

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight, intercept = flat[:-n_labels].reshape(n_genes, n_labels), flat[-n_labels:]
            log_p = log_softmax(
                values @ (weight * inverse) + (intercept - (centre * weight).sum(0)), 1
            )
            slope = np.exp(log_p) - of_label
            total = slope.sum(0)
            of_weight = (values.T @ slope) * inverse - centre * total + ridge * weight
            value = 0.5 * ridge * np.square(weight).sum() - (log_p * of_label).sum()
            return float(value), np.concatenate([of_weight.ravel(), total])

        start = np.zeros((n_genes + 1) * n_labels)
        start[-n_labels:] = np.log(of_label.mean(0) + 1e-6)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
        weight = found[:-n_labels].reshape(n_genes, n_labels)
        return cls(weight * inverse, found[-n_labels:] - (centre * weight).sum(0))

    def probabilities(self, values: Any) -> np.ndarray:
        """Of each label, (cells, labels)."""
        return np.exp(log_softmax(values @ self.weight + self.intercept, 1))


def _moments(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each gene's mean and standard deviation, (genes,), float64."""
    if sp.issparse(values):
        square = values.copy()
        square.data = np.square(square.data, dtype=np.float64)
        mean, of_square = (
            np.asarray(part.mean(0, dtype=np.float64)).ravel() for part in (values, square)
        )
    else:
        mean = values.mean(0, dtype=np.float64)
        of_square = np.square(values, dtype=np.float64).mean(0)
    variance = of_square - np.square(mean)
    # A constant's is a rounding.
    return mean, np.sqrt(np.where(variance > 1e-10 * of_square, variance, 0.0))
