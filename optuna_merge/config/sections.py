"""Old place of the sections, until every importer has moved."""

from optuna_merge.config.sampler import SAMPLERS as SAMPLERS
from optuna_merge.config.search import Range as Range
from optuna_merge.config.study_config import StudyConfig as StudyConfig
from optuna_merge.config.tasks import TaskConfig as TaskConfig
