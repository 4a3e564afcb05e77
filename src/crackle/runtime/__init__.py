"""What a process needs whatever it runs: threads, I/O loop, main loop, terminal, housekeeping. Knows no device."""
