"""The program at a hospital: ClientApp, command line, data, training."""
