"""Notebooks in batches: one job a run of a notebook, a whole profile, or a search over settings."""

from focusdpo_lib.batch.engines import run_all
from focusdpo_lib.batch.jobs import Job, execute, resolved
