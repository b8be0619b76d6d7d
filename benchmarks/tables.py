def write_summary(cells, suite, folder):
    return ""
