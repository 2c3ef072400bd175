"""What stands around the method: the command line, files, ranks, checkpoints, directories in and out, figures."""
