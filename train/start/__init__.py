"""What a run starts from: its first weights, and a linear part that is taken away before."""
