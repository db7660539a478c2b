"""The command line: one file for each noun. Reading commands change nothing."""
