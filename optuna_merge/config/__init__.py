"""The study file: YAML text to a frozen ``StudyConfig``, or every problem in it at once."""
