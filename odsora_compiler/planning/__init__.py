"""When which chunk is loaded and let go: workloads, plans, their simulation and their bound."""
