"""aeon's MiniRocket in phasewatch's leaderboard: `PYTHONPATH=examples phasewatch train RUN --add-model rocket:Rocket`.

Install aeon first: `pip install aeon`.
"""

from aeon.classification.convolution_based import MiniRocketClassifier

from phasewatch.models.adapters import CollectionAdapter


class Rocket(CollectionAdapter):
    """Random convolutions over the window's 20 bins; missing values are replaced by training medians."""

    key = "rocket"

    def make(self, seed):
        """Return the classifier, not fitted."""
        return MiniRocketClassifier(n_kernels=1000, class_weight="balanced", random_state=seed, n_jobs=1)
