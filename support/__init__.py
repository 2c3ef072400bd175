"""What stands around the method.

The command line, files, ranks, checkpoints, directories in and out, figures.
"""
