"""What is measured and how: workloads, processes, the race in rounds, identity of bits, the whole command."""
