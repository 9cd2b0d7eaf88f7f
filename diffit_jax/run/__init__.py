"""What a run keeps: its state, checkpoints, averages and folder."""
