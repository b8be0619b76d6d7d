"""Several processes, each with its share of the rows: sums, row figures and errors that are the same in all of them."""

from hf_iau.parallel.processes import (
    SAME_START,
    agree,
    from_one_process,
    gather_arrays,
    is_main_process,
    is_parallel,
    of_main_process,
    process_count,
    process_number,
    share_of,
    sum_over_processes,
    together,
)
from hf_iau.parallel.sharded import class_name, is_sharded, on_whole_parameters, refuse_wrapped, whole_parameters

__all__ = [
    "SAME_START",
    "agree",
    "class_name",
    "from_one_process",
    "gather_arrays",
    "is_main_process",
    "is_parallel",
    "is_sharded",
    "of_main_process",
    "on_whole_parameters",
    "process_count",
    "process_number",
    "refuse_wrapped",
    "share_of",
    "sum_over_processes",
    "together",
    "whole_parameters",
]
