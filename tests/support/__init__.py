"""The guest's side of the devices, for tests without a guest."""
