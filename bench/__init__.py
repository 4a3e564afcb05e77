"""What `make bench` runs: speed and memory of Crackle, as ratios measured in one run on one machine.

One module per area, each with `rows(bench) -> Iterator[Row]`; `python -m bench` runs them all, prints a table
and writes build/bench.json. Comparisons run in pairs, ours and the other's by turns, and a ratio is the
median of the pairs' ratios. The machines this runs on are noisy, and noise only adds: of several short slices
within a measurement the best one counts.
"""
