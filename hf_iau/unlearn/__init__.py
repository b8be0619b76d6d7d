"""One request, file by file in the order in which it runs."""
