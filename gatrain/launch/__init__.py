"""Start the ranks of a run: on this machine, on several nodes, or through Slurm."""
