"""Error tables: one step, rollouts, ensembles, cost."""

from densitykit.assess.one_step import (
    ab_initio_seconds,
    cost_table,
    error_curves,
    matrix_rate,
    one_step_errors,
    one_step_table,
    operations_per_step,
    rollout_table,
    seconds_per_step,
    standardised,
    validation_error,
    wide_table,
)

__all__ = [
    "ab_initio_seconds",
    "cost_table",
    "error_curves",
    "matrix_rate",
    "one_step_errors",
    "one_step_table",
    "operations_per_step",
    "rollout_table",
    "seconds_per_step",
    "standardised",
    "validation_error",
    "wide_table",
]
