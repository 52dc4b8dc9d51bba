"""The command `bayes-merge`: each verb parses its arguments, calls one library function and prints.

Nothing heavy is imported at the top of these files, so that `--help` and a recipe's errors appear at once.
"""
