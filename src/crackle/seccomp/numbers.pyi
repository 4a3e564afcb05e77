"""The numbers that a policy has names for: see `build.names`."""
