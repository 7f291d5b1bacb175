"""The test bed: real NIXL agents, each in a process of its own, in network namespaces that the tests make."""
