"""What the coordinator and the sites agree on: run configuration, records, strategies."""
