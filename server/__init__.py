"""The coordinator: ServerApp, command line, checkpoints, metrics and report."""
