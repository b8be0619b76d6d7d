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

__all__ = [
    "SAME_START",
    "agree",
    "from_one_process",
    "gather_arrays",
    "is_main_process",
    "is_parallel",
    "of_main_process",
    "process_count",
    "process_number",
    "share_of",
    "sum_over_processes",
    "together",
]
