"""aeon's MiniRocket beside phasewatch's own: `PYTHONPATH=examples phasewatch train RUN --add-model rocket:Rocket`.

Needs aeon in the environment: `pip install aeon`.
"""

from aeon.classification.convolution_based import MiniRocketClassifier

from phasewatch.models.adapters import CollectionAdapter


class Rocket(CollectionAdapter):
    """Random convolutions over the window's 20 bins, missing ones filled with train's medians."""

    key = "rocket"

    def make(self, seed):
        """Give the classifier, not fitted."""
        return MiniRocketClassifier(n_kernels=1000, class_weight="balanced", random_state=seed, n_jobs=1)
