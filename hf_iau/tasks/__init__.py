"""Models and rows by name: what the command line and the examples share."""

from hf_iau.tasks.rows import encode_labels, label_names, load_files, load_rows, read_ids, rows_of_labels
from hf_iau.tasks.task import Task, load_task
from hf_iau.tasks.where import rows_where

__all__ = [
    "Task",
    "encode_labels",
    "label_names",
    "load_files",
    "load_rows",
    "load_task",
    "read_ids",
    "rows_of_labels",
    "rows_where",
]
