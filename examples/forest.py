"""A random forest beside phasewatch's own models: `PYTHONPATH=examples phasewatch train RUN --add-model forest:Forest`."""

from sklearn.ensemble import RandomForestClassifier

from phasewatch.models.adapters import TableAdapter


class Forest(TableAdapter):
    """300 trees over the five stats of each channel; takes missing values as they come."""

    key = "forest"
    imputes = False

    def make(self, seed):
        """Give the classifier, not fitted."""
        return RandomForestClassifier(300, min_samples_leaf=2, class_weight="balanced", random_state=seed, n_jobs=1)
