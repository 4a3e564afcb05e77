"""The guest's side of the devices, and networks, for tests with and without a guest."""
