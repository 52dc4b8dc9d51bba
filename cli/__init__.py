"""The `bayes-merge` command: parse, call one library function, print."""
