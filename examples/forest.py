"""A random forest in phasewatch's leaderboard: `PYTHONPATH=examples phasewatch train RUN --add-model forest:Forest`."""

from sklearn.ensemble import RandomForestClassifier

from phasewatch.models.adapters import TableAdapter


class Forest(TableAdapter):
    """300 trees over the columns of a window; missing values are passed to scikit-learn as NaN."""

    key = "forest"
    imputes = False

    def make(self, seed):
        """Return the classifier, not fitted."""
        return RandomForestClassifier(300, min_samples_leaf=2, class_weight="balanced", random_state=seed, n_jobs=1)
