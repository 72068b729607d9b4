"""The life of a study: what it scores, how its trials run, what it ends with."""
