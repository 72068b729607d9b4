"""The study file: from YAML text to a frozen ``StudyConfig``, or to every problem in the file at once.

Each section of a study file has the file of its name here (``genome``, ``tasks``, ``study`` with its ``sampler`` and
``pruner``, ``engine``, ``search``); ``study_config`` is the whole file, and ``read`` loads one.
"""
