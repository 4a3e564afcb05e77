"""The host's side of guests' networks: a bridge, on it a TAP device for each microVM, and what these may reach.

`plan` decides names and addresses, `rules` what is closed and open, `links` speaks rtnetlink, `nft` speaks nftables,
and `networks` puts them together. Nothing is kept in files. What belongs to a network is written on the interfaces
themselves (their "alias", which `ip link` shows) and in its tables of the packet filter, so that it ends when they do,
in a network namespace too. Only the `crackle` command imports this package, never the VMM process.
"""

DEFAULT_NETWORK = "crackle"
"""The name of the network, and of its bridge, that is meant where none is given."""
