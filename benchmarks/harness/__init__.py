"""How ``kiln bench`` measures: workloads, child processes that take turns, and what is read off them."""
