"""The process that is one microVM: controller, API, timers and signals in one loop. Called by `cli` only."""
