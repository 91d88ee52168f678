"""The plan of an SPT config: found, or made by measuring the base on the config's data."""
