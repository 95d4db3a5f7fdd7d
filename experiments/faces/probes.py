"""What features of faces know: linear SVMs for attributes, and verification of identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

Floats = NDArray[np.float32]
Labels = NDArray[np.int8]
Indices = NDArray[np.int64]
SCORES = {"accuracy": accuracy_score, "balanced_accuracy": balanced_accuracy_score}
SPLITS = 100  # random ones that are tried


@dataclass(frozen=True)
class Probe:
    """One linear SVM an attribute (paper, §4.2), on standardised features.

    C times the number of features is the one of `costs` with the best `score` on a third of the training people, held
    out; then the SVM is trained on all. People are drawn again, up to `SPLITS` times, until both classes are among
    those held out and among the others. In these units the best ones lie close together for few features and for many;
    which one was taken is told with the result. `balanced` weighs the classes by their rarity.
    """

    costs: Sequence[float] = (0.03, 0.1, 0.3, 1.0)
    score: str = "balanced_accuracy"
    balanced: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"probe.score: {self.score!r} is not one of {', '.join(SCORES)}")
        if not self.costs or not all(cost > 0 for cost in self.costs):
            raise ValueError(f"probe.costs: {list(self.costs)} is not a list of positive numbers")

    def __call__(
        self, train: Floats, y_train: Labels, people: NDArray[np.int64], test: Floats, y_test: Labels
    ) -> dict[str, float]:
        """`accuracy`, `balanced_accuracy` and `auc` on the test features [M, d], percent, and the `cost` of C.

        train: features [N, d]. y_train, y_test: 0 or 1, [N] and [M]. people: [N], whose sample each is. Raises
        ValueError where a class is missing, or `can_choose` is False.
        """
        cost = self.costs[0] if len(self.costs) == 1 else self._best(train, y_train, people)
        machine = self._machine(cost, train).fit(train, y_train)
        distance = machine.decision_function(test)
        values = {name: score(y_test, distance > 0) for name, score in SCORES.items()}
        values["auc"] = roc_auc_score(y_test, distance)
        return {name: 100.0 * float(value) for name, value in values.items()} | {"cost": cost}

    def can_choose(self, y: Labels, people: NDArray[np.int64]) -> bool:
        """Whether there is one cost only, or people can be held out; y and people [N] are of the training samples."""
        return len(self.costs) == 1 or self._split(y, people) is not None

    def _split(self, y: Labels, people: NDArray[np.int64]) -> tuple[Indices, Indices] | None:
        """Indices of the samples to train on and of those held out; None if no split has both classes on both sides."""
        if len(np.unique(people)) < 2:
            return None
        splits = GroupShuffleSplit(SPLITS, test_size=1 / 3, random_state=self.seed).split(y, y, people)
        return next((split for split in splits if all(y[side].min() < y[side].max() for side in split)), None)

    def _best(self, x: Floats, y: Labels, people: NDArray[np.int64]) -> float:
        if (split := self._split(y, people)) is None:
            raise ValueError("probe: no third of the people has both classes and leaves both to the others")
        kept, held = split
        found = [
            SCORES[self.score](y[held], self._machine(c, x).fit(x[kept], y[kept]).predict(x[held])) for c in self.costs
        ]
        return self.costs[int(np.argmax(found))]

    def _machine(self, cost: float, x: Floats) -> Pipeline:
        weight = "balanced" if self.balanced else None
        by_dual = x.shape[1] > len(x) / 4  # the same machine; there up to five times as fast
        return make_pipeline(
            StandardScaler(), LinearSVC(C=cost / x.shape[1], class_weight=weight, dual=by_dual, random_state=0)
        )


def verification(embeddings: Tensor, pairs: Tensor, same: Tensor, folds: int = 10) -> float:
    """Percent of pairs that are told right by a threshold of the distance between unit embeddings, each tenth of them
    by the best threshold for the others (LFW's protocol; Huang et al. 2007).

    embeddings: [N, d]. pairs: int64 [P, 2], of them. same: bool [P], whether a pair is one person's.
    """
    unit = embeddings / embeddings.norm(dim=1, keepdim=True).clamp(min=1e-12)
    distance = (unit[pairs[:, 0]] - unit[pairs[:, 1]]).norm(dim=1).double().cpu().numpy()
    truth, right = same.cpu().numpy(), 0
    fold = np.arange(len(truth)) % folds
    for k in range(folds):
        threshold = _best_threshold(distance[fold != k], truth[fold != k])
        right += int(((distance[fold == k] < threshold) == truth[fold == k]).sum())
    return 100.0 * right / len(truth)


def _best_threshold(distance: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """Half-way between the two distances that it stands between."""
    order = np.argsort(distance)
    right = np.concatenate([[0], np.cumsum(np.where(same[order], 1, -1))])  # more than with a threshold below all
    ends = np.concatenate([[-np.inf], distance[order], [np.inf]])
    best = int(np.where(ends[:-1] < ends[1:], right, -len(same)).argmax())  # none stands between two equal ones
    return float(np.mean(ends[best : best + 2]))
