"""The host's side of guests' networks: a bridge with NAT, and on it a TAP device for each microVM.

`plan` decides names and addresses, `links` speaks rtnetlink, `nat` speaks nftables, and `networks` puts them together.
Nothing is kept in files. What belongs to a network is written on the interfaces themselves (their "alias", which
`ip link` shows), so that it ends when they do, in a network namespace too. Only the `crackle` command imports this
package, never the VMM process.
"""

DEFAULT_NETWORK = "crackle"
"""The name of the network, and of its bridge, that is meant where none is given."""
