"""A federation on one machine for a researcher."""
