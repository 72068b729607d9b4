"""The life of a study: building its objective, running its trials, and the holdout at its end."""
