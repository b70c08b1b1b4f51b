"""From a 2:4 model to one that runs faster: the cost gate, the lowered graph, modules in place."""
