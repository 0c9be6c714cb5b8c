"""How a network is read: blocks, layers, links and attention, found by running it once."""
