"""Evaluation as the paper did it: a file per command of evaluate.py, and the rows that they share."""
